"""Several processes that train one flow: who starts them, what they agree on, and what they say when one is lost."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from pyflowkern.data import Batches, DataSet
from pyflowkern.nn import ActNorm, BatchNorm
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.data_model import DataModel

__all__ = [
    "ProcessLost",
    "check_alike",
    "check_shares",
    "lost_processes",
    "start_together",
    "started_by_torchrun",
    "strategy_options",
    "sum_of_all",
    "threads_for_processes",
]

#: What backends say when another process is gone.
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")


class ProcessLost(RuntimeError):
    """Another process of the run ended, so that this one cannot go on.  The message is one line."""

    exit_code = 1


def started_by_torchrun(config: TrainConfig) -> TrainConfig:
    """Return the config with as many processes as torchrun has started; as it is without torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return config
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // devices
    return TrainConfig.create(config.to_dict() | {"devices": devices, "nodes": nodes})


def strategy_options(config: TrainConfig, model: DataModel, data: DataSet) -> dict[str, Any]:
    """Return what Lightning's trainer must know of the processes.

    Buffers are equal in all processes without being sent: layers start from the same batch, see :func:`start_together`.
    """
    options: dict[str, Any] = {"devices": config.devices, "num_nodes": config.nodes}
    ranks = config.devices * config.nodes
    check_shares(min(config.batch_size, len(data.train)), ranks)
    if ranks > 1:
        options["strategy"] = DDPStrategy(
            broadcast_buffers=False,
            find_unused_parameters=_has_idle_parameters(model, data, config.seed),
        )
    return options


def check_shares(rows: int, ranks: int) -> None:
    """Raise ConfigError unless each process gets a row of every batch."""
    if rows < ranks:
        raise ConfigError(
            f"a batch of {rows} rows is too small for {ranks} processes: each needs a row at least"
        )


def _has_idle_parameters(model: DataModel, data: DataSet, seed: int) -> bool:
    """Whether a step leaves parameters without a gradient: those of a layer without effect, or of the other direction.

    Processes must know it, and looking for such parameters in every step takes time; so a copy takes one step.
    """
    rows = Batches(data, 16, seed).batch(0)
    trial = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.objective(rows)[0].backward()
    return any(p.requires_grad and p.grad is None for p in trial.parameters())


def start_together(model: torch.nn.Module) -> None:
    """Make layers that start from data, or normalize by them, take the batch of all processes."""
    for layer in model.modules():
        if isinstance(layer, (ActNorm, BatchNorm)):
            layer.process_group = dist.group.WORLD


def check_alike(facts: dict[str, Any]) -> None:
    """Raise ConfigError in all processes unless all of them have the same facts."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, facts)
    for rank, others in enumerate(found):
        for name, value in facts.items():
            if value != (theirs := others[name]):
                raise ConfigError(
                    f"process {rank} has another {name} ({theirs}) than process {dist.get_rank()} ({value}): "
                    "all must see the same files"
                )


def sum_of_all(t: Tensor, ranks: int) -> Tensor:
    """Return the sum over all processes, which is written to ``t``."""
    if ranks > 1:
        dist.all_reduce(t)
    return t


@contextmanager
def lost_processes(out: Path, ranks: int) -> Iterator[None]:
    """Make what the backend says of a lost process one line that tells how to go on."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        known = isinstance(error, dist.DistError) or any(word in text for word in _LOST)
        text = re.sub(r"^\[/[^\]]*\] *", "", text)  # the place in gloo's sources
        if ranks < 2 or not known:
            raise
        raise ProcessLost(
            f"another process of the run ended ({text[:120]}); "
            f"go on with: pyflowkern train --resume {out}"
        ) from None


@contextmanager
def threads_for_processes(ranks: int) -> Iterator[None]:
    """Keep Lightning from choosing a number of threads, which has been chosen."""
    name = "OMP_NUM_THREADS"
    if ranks < 2 or name in os.environ:
        yield
        return
    os.environ[name] = str(torch.get_num_threads())
    try:
        yield
    finally:
        os.environ.pop(name, None)
