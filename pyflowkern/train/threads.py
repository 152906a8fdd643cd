"""How many CPU threads a flow is worth."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["limited_threads"]

#: Multiply-adds of a forward pass below which one thread is taken.  A core does them in about 3 ms; a step has
#: hundreds of parallel regions, and each waits for the slowest thread.  Beside other work that is a time slice.
_WORTH_SHARING = 5e7


@contextmanager
def limited_threads(
    model: nn.Module, rows: int, shape: tuple[int, ...], threads: int = 0, processes: int = 1
) -> Iterator[None]:
    """Run the block with ``threads`` CPU threads; with 0, one thread where a batch is little work.

    The choice depends on the sizes alone, so that a resumed run makes the same one.

    Args:
        model: the flow.
        rows: the size of a batch.
        shape: the shape of a row; every weight is taken to work once for each of its pixels.
        threads: how many, or 0.
        processes: how many share this machine: as many share its threads, unless OMP_NUM_THREADS or SLURM says how
            many each has.
    """
    before = torch.get_num_threads()
    weights = sum(p.numel() for p in model.parameters())
    if not threads:
        work = weights * rows * math.prod(shape[1:])
        threads = 1 if work < _WORTH_SHARING else _own_threads(before, processes)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _own_threads(most: int, processes: int) -> int:
    """Return how many threads a process has for itself."""
    if "OMP_NUM_THREADS" in os.environ:
        return most
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(most, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, most // processes)
