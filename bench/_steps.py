"""``python -m bench steps``: kernel launches of whole training steps, and their capture as CUDA graphs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import _environment
from pyflowkern import flows, use_reference

__all__ = ["measure"]

SHAPE, BATCH, WARM = (3, 16, 16), 32, 3


def models() -> dict[str, Callable[[], torch.nn.Module]]:
    """Return functions that make the flows whose training steps are measured."""
    return {
        "Glow": lambda: flows.Glow(SHAPE, levels=2, steps=4, hidden=32),
        "RealNVP": lambda: flows.RealNVP(SHAPE, hidden=16),
        "NSF": lambda: flows.NSF(20, transforms=4, hidden=(64, 64)),
        "MAF": lambda: flows.MAF(43, transforms=4, hidden=(128, 128)),
    }


class Step:
    """A training step that always uses the same memory, as graph capture requires."""

    def __init__(
        self, make: Callable[[], torch.nn.Module], device: torch.device, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.flow: Any = make().to(device)
        self.x = torch.randn(BATCH, *self.flow.event_shape, device=device)
        self.flow.log_prob(self.x)  # initialises ActNorm
        capturable = device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.flow.parameters(), 1e-3, capturable=capturable)
        log_prob = self.flow.log_prob
        self.log_prob = torch.compile(log_prob, dynamic=False) if compiled else log_prob

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = -self.log_prob(self.x).mean()
        loss.backward()
        self.optimizer.step()

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.flow.parameters()])


def launches(step: Step) -> int:
    """Return the number of kernels that one step launches, including copies and fills."""
    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(
        event.device_type == cuda and not getattr(event, "is_user_annotation", False)
        for event in profile.events()
    )


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """Return a whole step as a graph; the capture fails if anything in it waits for the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    return graph


def milliseconds(run: Callable[[], None], repeats: int = 30) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[repeats // 2]


def plain_row(name: str, provider: str, device: torch.device) -> dict[str, object]:
    """Count the launches of a step, and time it."""
    with use_reference(provider != "ours"):
        step = Step(models()[name], device, provider == "compile")
        row: dict[str, object] = {"model": name, "provider": provider}
        return row | {"launches": launches(step), "ms": milliseconds(step)}


def graph_row(name: str, device: torch.device) -> dict[str, object]:
    """Time a replayed graph, and compare its parameters with those after plain steps."""
    make = models()[name]
    plain, step = Step(make, device, False), Step(make, device, False)
    graph = captured(step)
    for _ in range(WARM + 5):
        plain()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    error = (step.parameters() - plain.parameters()).abs().max().item()
    row: dict[str, object] = {"model": name, "provider": "ours, graph", "launches": 1}
    return row | {"ms": milliseconds(graph.replay), "difference": error}


def measure(device: torch.device, out: Path | None) -> list[dict[str, object]]:
    """Count launches and compare a replayed graph with plain steps, for every model.

    Compiling takes long and comes last, and every row is written as soon as it is measured: a run that is cut off keeps
    the rows so far.
    """
    if device.type != "cuda":
        raise SystemExit("steps counts kernel launches: it needs --device cuda")
    facts = _environment.describe(device)
    rows: list[dict[str, object]] = []
    calls = [partial(plain_row, name, p, device) for name in models() for p in ("ours", "eager")]
    calls += [partial(graph_row, name, device) for name in models()]
    calls += [partial(plain_row, name, "compile", device) for name in models()]
    for call in calls:
        rows.append(call())
        print(rows[-1], flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps([row | facts for row in rows], indent=1)
            (out / "steps.json").write_text(text + "\n")
    return rows
