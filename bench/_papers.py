"""``python -m bench papers``: training steps of the flows that papers have for POWER, and the hours that they come to.

Times are CPU times of one thread, which other processes on the machine change little.  Providers take turns.  "layers"
is our flow with an op for each layer, "eager" the reference in plain PyTorch, and the others are the libraries' own
flows of the same sizes.
"""

from __future__ import annotations

import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyflowkern
from bench import _environment
from bench._results import write
from bench._timing import Neighbours, percentiles
from bench.models import ffjord, nsf, small_flows
from pyflowkern import flows

__all__ = ["MODELS", "measure", "table"]

MODELS = ("MAF (5)", "RealNVP (5)", "RealNVP (10)", "NSF (C)", "NSF (AR)", "FFJORD")
PROVIDERS = ("ours", "layers", "eager", "nflows", "zuko", "torchdiffeq")
ROUNDS, LEAST_MS, ROWS = 9, 50.0, 1_659_900
Step = Callable[[Tensor], Any]


def settings(name: str) -> Any:
    """Return the published settings of a model, as examples/power_density.py has them."""
    folder = str(Path(__file__).parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("power_density").PUBLISHED[name]


def steps_of(name: str) -> int:
    """Return the published steps, or for FFJORD, whose number we do not know, those of a hundred epochs."""
    run = settings(name)
    return run.published or 100 * ROWS // run.batch  # type: ignore[no-any-return]


def moved(flow: Any) -> Any:
    """Return a flow with weights away from their initial values, as after some training."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * p.shape[-1] ** -0.5 * torch.randn_like(p) if p.dim() > 1 else 0.0)
    return flow


def spline_autoregressive() -> Any:
    """Return NSF (AR) of nflows: residual networks of two blocks, each followed by a permutation and an LU matrix."""
    from nflows import transforms as t
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow

    layers: list[Any] = []
    for _ in range(10):
        layers += [
            t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                6, 256, num_bins=8, tails="linear", tail_bound=3.0, num_blocks=2
            ),
            t.RandomPermutation(6),
            t.LULinear(6, identity_init=True),
        ]
    return Flow(t.CompositeTransform(layers), StandardNormal([6]))


def libraries(name: str) -> dict[str, Callable[[], Any]]:
    """Return functions that make the same flow in other libraries, as far as these have it."""
    kind, _, number = name.rstrip(")").partition(" (")
    if kind == "NSF":
        size = nsf.Size(6, 512, 10, 256, 8, 1.0)
        coupled = partial(nsf.nflows, size, torch.device("cpu"))
        return {"nflows": coupled if number == "C" else spline_autoregressive}
    model = small_flows.Model(kind, 6, (100, 100), int(number))
    return {"zuko": model.zuko} | ({"nflows": model.nflows} if kind == "MAF" else {})


def within_reference(step: Step) -> Step:
    def run(x: Tensor) -> Any:
        with pyflowkern.use_reference():
            return step(x)

    return run


def providers(name: str) -> dict[str, Step]:
    """Return training steps, each of a flow of its own; those of FFJORD are without an optimizer."""
    torch.manual_seed(0)
    found: dict[str, Step] = {}
    if name == "FFJORD":
        inputs = {"x": torch.zeros(2, ffjord.DIMS)}
        ours = ffjord.ours({})(inputs)
        found = {"ours": ours, "eager": within_reference(ours)}
        with suppress(ImportError):
            found["torchdiffeq"] = ffjord.theirs(inputs)
        return found
    run = settings(name)
    for provider in ("ours", "layers", "eager"):
        flow: flows.Flow = moved(run.make())
        if provider == "layers":
            for layer in flow.bijection:  # type: ignore[union-attr]
                layer.register_forward_hook(lambda *_: None)  # keeps the layers
        step = partial(small_flows.whole_step, flow)
        found[provider] = within_reference(step) if provider == "eager" else step
    for library, make in libraries(name).items():
        with suppress(ImportError):
            found[library] = partial(small_flows.whole_step, moved(make()))
    return found


def milliseconds(step: Step, batches: Sequence[Tensor], calls: int) -> float:
    """Return the mean CPU time of a call."""
    begin = time.process_time()
    for x in islice(cycle(batches), calls):
        step(x)
    return 1e3 * (time.process_time() - begin) / calls


def row(name: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time the steps of a model by all providers in turns; return medians in ms, and what they come to in hours."""
    batch, steps = settings(name).batch, steps_of(name)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, 6, generator=generator) for _ in range(16)]
    timed = providers(name)
    calls: dict[str, int] = {}
    for provider, step in timed.items():
        milliseconds(step, batches, 2)
        calls[provider] = 1 + int(LEAST_MS / milliseconds(step, batches, 2))
    times: dict[str, list[float]] = {provider: [] for provider in timed}
    order, random_order, neighbours = list(timed), random.Random(0), Neighbours()
    for _ in range(rounds):
        random_order.shuffle(order)
        for provider in order:
            times[provider].append(milliseconds(timed[provider], batches, calls[provider]))
    medians = {provider: statistics.median(values) for provider, values in times.items()}
    return {
        "model": name,
        "batch": batch,
        "steps": steps,
        "ms": medians,
        "neighbours": neighbours.cores(),
        "p20_p80": {p: percentiles(values)[::2] for p, values in times.items()},
        "hours": {provider: steps * ms / 3.6e6 for provider, ms in medians.items()},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table: hours and ms of each provider, and the hours saved."""
    titles = {"ours": "ours", "layers": "ours, an op a layer", "eager": "plain PyTorch"}
    heads = [titles.get(p, p) for p in PROVIDERS]
    saved = ["saved by one op", "saved beside libraries"]
    lines = ["| " + " | ".join(["model", "steps x batch", *heads, *saved]) + " |"]
    lines.append("|---" * (len(heads) + 4) + "|")
    for r in rows:
        hours, ms = r["hours"], r["ms"]
        cells = [r["model"], f"{r['steps']} x {r['batch']}"]
        cells += [f"{hours[p]:.2f} h ({ms[p]:.3g} ms)" if p in hours else "" for p in PROVIDERS]
        cells.append(f"{hours['layers'] - hours['ours']:.2f} h" if "layers" in hours else "")
        others = [hours[p] for p in PROVIDERS[3:] if p in hours]
        cells.append(f"{min(others) - hours['ours']:.2f} h" if others else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def measure(
    out: Path, names: Sequence[str] = MODELS, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Measure the models one after the other, and write ``papers.json`` and ``papers.md`` after each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        kept = pyflowkern.keep_memory()  # as trainings do; for all providers
        facts = _environment.describe(torch.device("cpu")) | {"keep_memory": kept}
        for name in names:
            rows.append(row(name, rounds))
            print("\n".join(table(rows[-1:])), flush=True)
            write(out / "papers.json", {"rows": rows, "facts": facts}, table(rows))
    finally:
        torch.set_num_threads(threads)
    return rows
