"""``python -m bench.clients.table``: typical models of other libraries, as they are and accelerated.

Errors are the largest differences in float64, of log-densities, of gradients of all parameters (relative to the largest
of a tensor) and of samples from the same random numbers.  Times are medians of calls in turns, in float32; steps have
torch's fused AdamW.  Memory is what a forward keeps for its backward.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyflowkern
from bench import _environment
from bench._results import read, too_busy, write
from bench._timing import Neighbours
from bench.clients.models import MODELS, Foreign

Numbers = dict[str, Any]


def built(model: Foreign, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the model as it is, and an accelerated copy, with weights as after some training."""
    torch.manual_seed(0)
    plain = model.build()
    spread = 0.1 if len(model.shape) == 1 else 0.01
    with torch.no_grad():
        for p in plain.parameters():
            if p.requires_grad and p.dim() > 1:
                p.add_(spread * p.shape[-1] ** -0.5 * torch.randn_like(p))
    plain = plain.to(dtype)
    fast = copy.deepcopy(plain)
    pyflowkern.accelerate(fast)
    return plain, fast


def data(model: Foreign, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, *model.shape, generator=draw, dtype=dtype)
    c = torch.randn(n, model.context, generator=draw, dtype=dtype) if model.context else None
    return x, c


def errors(model: Foreign) -> Numbers:
    """Return the largest differences between the two in float64, in which libraries then draw, too."""
    torch.set_default_dtype(torch.float64)
    try:
        return _errors(model)
    finally:
        torch.set_default_dtype(torch.float32)


def _errors(model: Foreign) -> Numbers:
    found: list[tuple[Tensor, ...]] = []
    for each in built(model, torch.float64):
        x, c = data(model, 64, torch.float64)
        value = model.log_prob(each, x, c)
        leaves = [p for p in each.parameters() if p.requires_grad]
        grads = torch.autograd.grad(value.mean(), leaves, allow_unused=True)
        torch.manual_seed(2)
        with torch.no_grad():
            drawn = model.sample(each, 16, None if c is None else c[:16])
        drawn = drawn[0] if isinstance(drawn, tuple) else drawn
        filled = [torch.zeros(()) if g is None else g for g in grads]
        found.append((value.detach(), drawn, *filled))
    gaps = [
        float((a - b).abs().max() / (b.abs().max() + 1e-12))
        for a, b in zip(*found[::-1], strict=True)
    ]
    return {"log_prob error": gaps[0], "sample error": gaps[1], "gradient error": max(gaps[2:])}


def kept_mib(run: Callable[[], Any], parameters: list[Tensor]) -> float:
    """Return what a forward keeps for its backward, without parameters."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = run()
    for p in parameters:
        kept.pop(p.untyped_storage().data_ptr(), None)
    del alive
    return sum(kept.values()) / 2**20


def work(model: Foreign, each: Any) -> dict[str, Callable[[], Any]]:
    """Return what is timed of a model."""
    x, c = data(model, model.batch, torch.float32)
    _, given = data(model, model.samples, torch.float32)
    parameters = [p for p in each.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-model.log_prob(each, x, c).mean()).backward()
        optimizer.step()

    return {
        "log_prob": torch.no_grad()(partial(model.log_prob, each, x, c)),
        "step": step,
        "sample": torch.no_grad()(partial(model.sample, each, model.samples, given)),
    }


def in_turns(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Return the median time of each in ms."""
    for call in calls:
        call()
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < 5:
        for call, own in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if (once := time.perf_counter() - begin) < 5e-3:  # again, with warm caches
                begin = time.perf_counter()
                call()
                once = time.perf_counter() - begin
            own.append(once)
    return [1e3 * statistics.median(own) for own in times]


def measured(model: Foreign, seconds: float) -> Numbers:
    """Return all numbers of a model."""
    found = errors(model)
    plain, fast = built(model, torch.float32)
    pairs = work(model, plain), work(model, fast)
    before = Neighbours()
    for name in pairs[0]:
        times = in_turns([pair[name] for pair in pairs], seconds)
        found |= {f"{name} library (ms)": times[0], f"{name} ours (ms)": times[1]}
        found[f"{name} ratio"] = times[0] / times[1]
        if (goal := model.goals.get(name)) is not None:
            found[f"{name} goal"] = goal
    found["neighbours"] = before.cores()
    x, c = data(model, model.batch, torch.float32)
    for name, each in (("library", plain), ("ours", fast)):
        keep = partial(model.log_prob, each, x, c)
        found[f"kept {name} (MiB)"] = kept_mib(keep, [*each.parameters()])
    return found


HEAD = (
    "| model | log_prob | training step | samples | kept for backward | largest error: log_prob, gradient, samples |",
    "|---|---|---|---|---|---|",
)


def line(name: str, found: Numbers) -> str:
    """Return a model's line of the table."""
    if "failed" in found:
        return f"| {name} | {found['failed']} | | | | |"

    def times(what: str) -> str:
        ratio, goal = found[f"{what} ratio"], found.get(f"{what} goal")
        note = "" if goal is None else f" ({goal:g}: {'met' if ratio >= goal else 'missed'})"
        return f"{found[f'{what} library (ms)']:.3g} / {found[f'{what} ours (ms)']:.3g} ms = **{ratio:.3g}x**{note}"

    kept = f"{found['kept library (MiB)']:.3g} / {found['kept ours (MiB)']:.3g} MiB"
    gaps = ", ".join(
        f"{found[f'{what} error']:.0e}" for what in ("log_prob", "gradient", "sample")
    )
    return (
        f"| {name} | {times('log_prob')} | {times('step')} | {times('sample')} | {kept} | {gaps} |"
    )


def main() -> None:
    """Measure what was asked for, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.clients.table", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only models whose name contains this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair of times")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    facts = _environment.describe(device)
    folder = args.out or Path(__file__).parents[1] / "results" / _environment.slug(facts, device)
    path = folder / "accelerate.json"
    kept = {"models": {}} | read(path) | {"facts": facts}
    print("\n".join(HEAD))
    for model in MODELS:
        if args.name in model.name:
            try:
                found = measured(model, args.seconds)
            except ModuleNotFoundError as error:
                found = {"failed": f"not installed ({error.name})"}
            print(line(model.name, found), flush=True)
            if not too_busy(found.get("neighbours", 0.0), args.threads):
                kept["models"][model.name] = found
    lines = [line(name, each) for name, each in kept["models"].items()]
    write(path, kept, [*HEAD, *lines])


if __name__ == "__main__":
    main()
