"""Timing: providers take turns in rounds, and no call finds its inputs in the cache."""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Neighbours", "Plan", "Sampler", "percentiles", "take_turns"]


@dataclass(frozen=True)
class Plan:
    """Settings of a run."""

    device: torch.device
    cache_bytes: int
    rounds: int = 40
    seconds: float = 4.0
    providers: Sequence[str] = ()
    passes: Sequence[str] = ()
    graphs: bool = False


class Sampler:
    """Times one provider: a sample is ``inner`` calls in a row, at least 0.5 ms."""

    def __init__(self, call: Callable[[Any], Any], plan: Plan, grad: bool) -> None:
        self.call, self.plan, self.grad, self.inner = call, plan, grad, 1
        self.warm = True
        self.graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, sets: Sequence[Any], inner: int | None = None) -> None:
        """Warm up, then choose the number of inner calls; with --graphs, capture them."""
        once = min(self(sets[i:]) for i in range(2))
        if once < 20.0:
            self.inner = 5
            once = min(self(sets) for _ in range(3))
        self.warm = once < 20.0
        self.inner = inner or max(1, math.ceil(0.5 / once))
        if self.plan.graphs and self.plan.device.type == "cuda" and inner is None:
            graph = torch.cuda.CUDAGraph()
            self.inner = max(len(sets), self.inner)
            with torch.set_grad_enabled(self.grad), torch.cuda.graph(graph):
                for i in range(self.inner):
                    self.call(sets[i % len(sets)])
            self.graph = graph

    @property
    def calls(self) -> int:
        """How often a sample calls the provider."""
        return self.inner + self.warm

    def __call__(self, sets: Sequence[Any]) -> float:
        """Return the time of one call in ms, taking the sets in turn.

        Unless calls are long, one call before them is not timed: it brings code and allocator memory back into the
        caches after another provider's turn.
        """
        with torch.set_grad_enabled(self.grad):
            if self.warm:
                self.call(sets[-1])
            if self.plan.device.type == "cuda":
                return self._on_cuda(sets) / self.inner
            begin = time.perf_counter_ns()
            for i in range(self.inner):
                self.call(sets[i % len(sets)])
            return (time.perf_counter_ns() - begin) / 1e6 / self.inner

    def _on_cuda(self, sets: Sequence[Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for i in range(self.inner):
                self.call(sets[i % len(sets)])
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))


class Neighbours:
    """Counts the cores that other processes, and other guests of the host, kept busy since the start.

    Where threads outnumber free cores, each barrier waits for a time slice of the scheduler, milliseconds instead of
    microseconds, and timings mean little.
    """

    def __init__(self) -> None:
        self.start = self._read()

    def cores(self) -> float:
        """Return the mean number of busy cores, NaN where the operating system does not report it."""
        wall, busy = (b - a for a, b in zip(self.start, self._read(), strict=True))
        return round(max(0.0, busy / wall), 2)

    @staticmethod
    def _read() -> tuple[float, float]:
        path, own = Path("/proc/stat"), os.times()
        if not path.is_file():
            return time.monotonic(), math.nan
        ticks = [int(n) for n in path.read_text().splitlines()[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - sum(own[:4])


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80 by linear interpolation."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def take_turns(
    samplers: Mapping[str, Sampler], sets: list[Any], plan: Plan
) -> tuple[dict[str, list[float]], float]:
    """Let all samplers take turns, in a new random order each round.

    Returns:
        The samples of each in ms, and the number of cores that other processes kept busy.
    """
    times: dict[str, list[float]] = {name: [] for name in samplers}
    names, cursor, begin = list(samplers), 0, time.monotonic()
    order, neighbours = random.Random(0), Neighbours()
    gc.collect()
    gc.disable()
    try:
        for r in range(plan.rounds):
            if r >= 5 and time.monotonic() - begin > plan.seconds:
                break
            order.shuffle(names)
            for name in names:
                sampler = samplers[name]
                times[name].append(sampler(sets[cursor:] + sets[:cursor]))
                cursor = (cursor + sampler.inner) % len(sets)
    finally:
        gc.enable()
    return times, neighbours.cores()
