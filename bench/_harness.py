"""Check, time and compare the providers of a case.

Providers take turns in rounds, and every call takes the next of several random input sets, which together exceed the
last-level cache.  A large copy (and a matrix product, where a case has flops) takes turns with them: it measures what
the machine can do at that moment, which gives the floor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from bench._case import (
    Case,
    Inputs,
    InputSet,
    Lazy,
    Provider,
    caller,
    direction,
    disagreement,
    kept_bytes,
    make_sets,
    nbytes,
    outputs_of,
    runs_kernel,
)
from bench._environment import usable_cores
from bench._timing import Plan, Sampler, percentiles, take_turns

__all__ = ["Row", "run_case"]


@dataclass
class Row:
    """One result: times in ms, memory in MiB, or page faults.

    ``status`` is "ok" or the reason why there is no result.  ``kernel`` is "yes" or "no" for the provider "ours":
    whether a kernel ran or the reference.  ``neighbours`` is the number of cores that other processes kept busy;
    ``noisy``: they left too few for our threads.
    """

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
    neighbours: float = math.nan
    noisy: bool = False
    kernel: str = ""
    status: str = "ok"


def _ceilings(case: Case, plan: Plan) -> dict[str, tuple[Sampler, float]]:
    """Return a large copy with its bytes and, for cases with flops, a matrix product with its flops."""
    least = 64 << 20 if plan.device.type == "cpu" else 512 << 20
    size = max(least, 2 * plan.cache_bytes) // 4
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
    """Return the larger of the times that bytes and flops take at the speeds measured in this run."""
    if pass_ == "call":
        return math.nan
    with torch.no_grad():
        outputs = outputs_of(eager(**s.inputs, **direction(pass_)))
    moved = case.forward_bytes(s.inputs, outputs)
    flops = case.flops(s.inputs) if case.flops else 0.0
    if pass_.endswith("backward"):
        moved, flops = moved + case.backward_bytes(s.inputs, outputs), 3 * flops
    return max(moved * medians["copy"], flops * medians.get("gemm", 0.0))


def _build(provider: Provider | Lazy, example: Inputs) -> Provider | str:
    """Return a provider that can be called, or the reason why there is none."""
    if not isinstance(provider, Lazy):
        return provider
    try:
        return provider.build(example)
    except ImportError as error:
        return f"not installed ({error.name})"


def _compiled(eager: Provider) -> Provider:
    torch.compiler.reset()
    return torch.compile(lambda **kwargs: eager(**kwargs), dynamic=False)


def run_case(case: Case, plan: Plan) -> list[Row]:
    """Check and time every pass of a case and return its rows."""
    generator = torch.Generator(plan.device).manual_seed(0)
    eager = _build(case.providers["eager"], case.make_inputs(generator, plan.device, case.dtype))
    if isinstance(eager, str):
        return [Row(case.name, "eager", "all", _name(case.dtype), status=eager)]
    rows = []
    for pass_ in case.passes:
        if not plan.passes or pass_ in plan.passes:
            rows += _run_pass(case, plan, pass_, eager)
    if "forward+backward" in case.passes and (not plan.passes or "memory" in plan.passes):
        rows += _run_memory(case, plan, eager)
    return rows


def _checked(
    case: Case, plan: Plan, eager: Provider, pass_: str, s: InputSet
) -> dict[str, Provider | str]:
    """Return the providers to time, and for each of the others the reason why not."""
    wanted = {n: p for n, p in case.providers.items() if not plan.providers or n in plan.providers}
    found: dict[str, Provider | str] = {"eager": eager}
    if case.compiles and (not plan.providers or "compile" in plan.providers):
        found["compile"] = _compiled(eager)
    for name, source in (found | wanted).items():
        try:
            provider = found[name] = _build(source, s.inputs) if name != "eager" else eager
            if isinstance(provider, str):
                continue
            wrong = disagreement(case, provider, eager, pass_, s)
            if wrong and not (isinstance(source, Lazy) and not source.comparable):
                found[name] = wrong
        except Exception as error:  # another library may fail in any way; the rest is still timed
            found[name] = f"failed: {type(error).__name__}: {str(error)[:80]}".replace("\n", " ")
    return found


def _run_pass(case: Case, plan: Plan, pass_: str, eager: Provider) -> list[Row]:
    """Check, time and compare one pass of every provider."""
    sets = make_sets(case, plan.device, plan.cache_bytes, eager, pass_)
    checked = _checked(case, plan, eager, pass_, sets[0])
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
    times, neighbours = take_turns(
        samplers | {name: sampler for name, (sampler, _) in ceilings.items()}, sets, plan
    )
    costs = {name: percentiles(times[name])[1] / amount for name, (_, amount) in ceilings.items()}
    floor = _floor_ms(case, pass_, sets[0], eager, costs)
    noisy = neighbours > usable_cores() - torch.get_num_threads() + 0.2
    row_of = partial(
        Row,
        case.name,
        pass_=pass_,
        dtype=_name(case.dtype),
        neighbours=neighbours,
        noisy=noisy,
    )
    rows = []
    if math.isfinite(floor):
        rows.append(row_of("floor", p20=floor, p50=floor, p80=floor, ratio_to_floor=1.0))
    for name, provider in checked.items():
        row = row_of(name)
        if isinstance(provider, str):
            row.status = provider
        else:
            if name == "ours":
                row.kernel = "yes" if runs_kernel(provider, pass_, sets[0]) else "no"
            row.p20, row.p50, row.p80 = percentiles(times[name])
            row.ratio_to_floor = row.p50 / floor
            row.speedup_vs_eager = _per_round(times, "eager", name)
            row.speedup_vs_compile = _per_round(times, "compile", name)
            row.time_vs_ours = _per_round(times, name, "ours")
        rows.append(row)
    if pass_ == "call" and plan.device.type == "cpu" and sys.platform != "win32":
        rows += _run_faults(case, samplers, sets)
    return rows


def _run_faults(case: Case, samplers: Mapping[str, Sampler], sets: list[InputSet]) -> list[Row]:
    """Count the page faults of a call, such as a training step, when only it is called again and again."""
    import resource

    rows = []
    for name, sampler in samplers.items():
        sampler(sets)
        sampler(sets)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        sampler(sets)
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / sampler.calls
        row = Row(case.name, name, "page faults of a call", _name(case.dtype), metric="faults")
        row.p20 = row.p50 = row.p80 = faults
        rows.append(row)
    return rows


def _per_round(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Return the median over the rounds of the ratio of two providers' times, NaN where one is missing."""
    if above not in times or below not in times:
        return math.nan
    return percentiles([a / b for a, b in zip(times[above], times[below], strict=True)])[1]


def _run_memory(case: Case, plan: Plan, eager: Provider) -> list[Row]:
    """Measure the memory that is kept for the backward and, on CUDA, the peak of a training step."""
    s = make_sets(case, plan.device, plan.cache_bytes, eager, "forward+backward")[0]
    checked = _checked(case, plan, eager, "forward+backward", s)
    rows = []
    for name, provider in checked.items():
        if isinstance(provider, str):
            continue
        row_of = partial(Row, case.name, name, dtype=_name(case.dtype), metric="MiB")
        kept = kept_bytes(case, provider, s) / 2**20
        rows.append(row_of(pass_="kept for backward", p20=kept, p50=kept, p80=kept))
        if kept:  # as for times: eager's over this provider's
            rows[-1].speedup_vs_eager = rows[0].p50 / kept
        if plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(plan.device)
            before = torch.cuda.memory_allocated(plan.device)
            caller(provider, "forward+backward")(s)
            peak = (torch.cuda.max_memory_allocated(plan.device) - before) / 2**20
            rows.append(row_of(pass_="peak of a step", p20=peak, p50=peak, p80=peak))
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
