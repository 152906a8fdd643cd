"""Speed and memory of a training step, kernels beside reference, measured so that a noisy machine is fair to both."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from pyflowkern._library import use_reference
from pyflowkern.data import Batches, DataSet
from pyflowkern.train.bridges import load_data
from pyflowkern.train.config import TrainConfig
from pyflowkern.train.model import build

__all__ = ["forget_peak", "peak", "peak_memory", "seconds_of", "step_seconds"]


def _stepper(config: TrainConfig, data: DataSet) -> Callable[[int], None]:
    """Return a function that takes one training step."""
    torch.manual_seed(config.seed)
    model = build(config, data).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batches = Batches(data, config.batch_size, config.seed)

    def step(number: int) -> None:
        optimizer.zero_grad()
        model.objective(batches.batch(number))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

    return step


def step_seconds(
    config: TrainConfig, data: DataSet, *, blocks: int = 7, limit: float = 30.0
) -> tuple[float, float]:
    """Return the median seconds of a training step with kernels and with the reference."""
    return seconds_of(_stepper(config, data), blocks=blocks, limit=limit)


def seconds_of(
    work: Callable[[int], None], *, blocks: int = 7, limit: float = 30.0
) -> tuple[float, float]:
    """Return the median seconds of ``work(number)`` with kernels and with the reference.

    Blocks of two calls alternate between the paths, so that a busy neighbour slows both.  Measuring ends after
    ``blocks`` pairs or ``limit`` seconds, after one pair at least.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    end = time.monotonic() + limit
    for block in range(blocks + 1):
        for reference in (False, True):
            with use_reference(reference):
                start = time.perf_counter()
                work(2 * block)
                work(2 * block + 1)
                if block:  # the first block warms up
                    times[reference].append((time.perf_counter() - start) / 2)
        if block and time.monotonic() > end:
            break
    return statistics.median(times[False]), statistics.median(times[True])


def peak_memory(config: TrainConfig, *, reference: bool) -> float:
    """Return by how many MB three training steps raise the peak memory of a fresh process."""
    request = json.dumps({"config": config.to_dict(), "reference": reference})
    command = [sys.executable, "-m", "pyflowkern.train.measure", request]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def peak() -> float:
    """Return the peak resident memory in MB since :func:`forget_peak`; elsewhere than on Linux since the start."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def forget_peak() -> None:
    """Lower the kernel's high-water mark to what is resident now (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _main() -> None:
    request = json.loads(sys.argv[1])
    config = TrainConfig.create(request["config"])
    step = _stepper(config, load_data(config))
    forget_peak()
    before = peak()
    with use_reference(request["reference"]):
        for number in range(3):
            step(number)
    print(peak() - before)


if __name__ == "__main__":
    _main()
