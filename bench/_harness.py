"""Check, time and compare the providers of a case.

Providers take turns in rounds and every call takes the next of several random input sets, which
together exceed the last-level cache.  A large copy (and a matrix product, where flops count) takes
turns with them: it measures what the machine can do at that moment, and gives the floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from bench._case import (
    Case,
    Inputs,
    InputSet,
    Lazy,
    Provider,
    caller,
    disagreement,
    kept_bytes,
    make_sets,
    nbytes,
    outputs_of,
)
from bench._timing import Plan, Sampler, percentiles, take_turns

__all__ = ["Row", "run_case"]

_Built = list[tuple[str, Provider | str, bool]]  # name, provider or why there is none, must agree


@dataclass
class Row:
    """One result: times in ms, or bytes in MiB; ``status`` is not "ok" where there is none."""

    case: str
    provider: str
    pass_: str
    dtype: str
    metric: str = "ms"
    p20: float = math.nan
    p50: float = math.nan
    p80: float = math.nan
    ratio_to_floor: float = math.nan
    speedup_vs_eager: float = math.nan
    speedup_vs_compile: float = math.nan
    time_vs_ours: float = math.nan
    status: str = "ok"


def _ceilings(case: Case, plan: Plan) -> dict[str, tuple[Sampler, float]]:
    """Return the copy, and the matrix product where flops count, with a call's bytes or flops."""
    size = max(64 << 20, 2 * plan.cache_bytes) // 4
    source, target = (torch.randn(size, device=plan.device) for _ in range(2))
    found = {"copy": (Sampler(lambda _: target.copy_(source), plan, False), 2 * nbytes(source))}
    if case.flops is not None:
        n = 1024 if plan.device.type == "cpu" else 8192
        a, b, c = (torch.randn(n, n, device=plan.device, dtype=case.dtype) for _ in range(3))
        found["gemm"] = (Sampler(lambda _: torch.mm(a, b, out=c), plan, False), 2 * n**3)
    return found


def _floor_ms(
    case: Case, pass_: str, s: InputSet, eager: Provider, medians: Mapping[str, float]
) -> float:
    """Return the larger of the times that bytes and flops take at this run's ceilings."""
    if pass_ == "call":
        return math.nan
    with torch.no_grad():
        outputs = outputs_of(
            eager(**s.inputs, **({"inverse": True} if pass_.startswith("inverse") else {}))
        )
    moved, flops = (
        case.forward_bytes(s.inputs, outputs),
        case.flops(s.inputs) if case.flops else 0.0,
    )
    if pass_.endswith("backward"):
        moved, flops = moved + case.backward_bytes(s.inputs, outputs), 3 * flops
    return max(moved * medians["copy"], flops * medians.get("gemm", 0.0))


def _built(case: Case, plan: Plan, example: Inputs) -> Iterable[tuple[str, Provider | str, bool]]:
    """Yield name, provider (or why there is none) and whether it must agree with eager."""
    for name, provider in case.providers.items():
        wanted = not plan.providers or name in plan.providers
        if wanted or name == "eager":
            comparable = provider.comparable if isinstance(provider, Lazy) else True
            try:
                yield (
                    name,
                    provider.build(example) if isinstance(provider, Lazy) else provider,
                    comparable,
                )
            except ImportError as error:
                yield name, f"not installed ({error.name})", comparable
        if (
            name == "eager"
            and case.compiles
            and (not plan.providers or "compile" in plan.providers)
        ):
            yield "compile", "compile", True


def _compiled(eager: Provider) -> Provider:
    torch.compiler.reset()
    return torch.compile(lambda **kwargs: eager(**kwargs), dynamic=False)


def run_case(case: Case, plan: Plan) -> list[Row]:
    """Check and time every pass of a case and return its rows."""
    generator = torch.Generator(plan.device).manual_seed(0)
    example = case.make_inputs(generator, plan.device, case.dtype)
    built = list(_built(case, plan, example))
    eager = next(provider for name, provider, _ in built if name == "eager")
    rows = []
    for pass_ in case.passes:
        if not plan.passes or pass_ in plan.passes:
            rows += _run_pass(case, plan, pass_, built, eager)
    if "forward+backward" in case.passes and (not plan.passes or "memory" in plan.passes):
        rows += _run_memory(case, plan, built, eager)
    return rows


def _check(
    case: Case, built: _Built, eager: Provider, pass_: str, s: InputSet
) -> dict[str, Provider | str]:
    """Return the providers that may be timed, and for each other one the reason."""
    found: dict[str, Provider | str] = {}
    for name, provider, comparable in built:
        if provider == "compile":
            provider = _compiled(eager)
        if not isinstance(provider, str):
            try:
                wrong = disagreement(case, provider, eager, pass_, s) if comparable else ""
            except Exception as error:  # a peer may fail in any way; the others still count
                wrong = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            provider = wrong or provider
        found[name] = provider
    return found


def _run_pass(case: Case, plan: Plan, pass_: str, built: _Built, eager: Provider) -> list[Row]:
    """Check, time and compare one pass of every provider."""
    sets = make_sets(case, plan.device, plan.cache_bytes, eager, pass_.startswith("inverse"))
    checked = _check(case, built, eager, pass_, sets[0])
    grad = pass_.endswith("backward") or pass_ == "call"
    samplers = {
        name: Sampler(caller(provider, pass_), plan, grad)
        for name, provider in checked.items()
        if not isinstance(provider, str)
    }
    ceilings = _ceilings(case, plan)
    for sampler in samplers.values():
        sampler.prepare(sets)
    for sampler, _ in ceilings.values():
        sampler.prepare(sets, inner=1)
    times = take_turns(
        samplers | {name: sampler for name, (sampler, _) in ceilings.items()}, sets, plan
    )
    costs = {name: percentiles(times[name])[1] / amount for name, (_, amount) in ceilings.items()}
    floor = _floor_ms(case, pass_, sets[0], eager, costs)
    rows = [Row(case.name, "floor", pass_, _name(case.dtype), "ms", floor, floor, floor, 1.0)]
    for name, provider in checked.items():
        row = Row(case.name, name, pass_, _name(case.dtype))
        if isinstance(provider, str):
            row.status = provider
        else:
            row.p20, row.p50, row.p80 = percentiles(times[name])
            row.ratio_to_floor = row.p50 / floor
            row.speedup_vs_eager = _per_round(times, "eager", name)
            row.speedup_vs_compile = _per_round(times, "compile", name)
            row.time_vs_ours = _per_round(times, name, "ours")
        rows.append(row)
    return rows


def _per_round(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Return the median over the rounds of the ratio of two providers' times."""
    if above not in times or below not in times:
        return math.nan
    return percentiles([a / b for a, b in zip(times[above], times[below], strict=True)])[1]


def _run_memory(case: Case, plan: Plan, built: _Built, eager: Provider) -> list[Row]:
    """Measure what is kept for the backward and, on CUDA, the peak of a training step."""
    s = make_sets(case, plan.device, plan.cache_bytes, eager, inverse=False)[0]
    checked = _check(case, built, eager, "forward+backward", s)
    rows = []
    for name, provider in checked.items():
        if isinstance(provider, str):
            continue
        kept = kept_bytes(provider, s) / 2**20
        rows.append(
            Row(case.name, name, "kept for backward", _name(case.dtype), "MiB", kept, kept, kept)
        )
        if plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(plan.device)
            before = torch.cuda.memory_allocated(plan.device)
            caller(provider, "forward+backward")(s)
            peak = (torch.cuda.max_memory_allocated(plan.device) - before) / 2**20
            rows.append(
                Row(case.name, name, "peak of a step", _name(case.dtype), "MiB", peak, peak, peak)
            )
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
