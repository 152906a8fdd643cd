"""``python -m bench memory``: memory, time and gradients of Glow's training step against its depth.

Three ways to train the same flow: activations are kept (``stored``), each layer is run again by torch's checkpointing,
which keeps its input (``checkpoint``), or inputs are found by the inverses of the layers (``reversible``).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import _environment, _memory_vectors
from bench._results import too_busy, write
from bench._timing import Neighbours
from pyflowkern import flows, nn

__all__ = ["draw", "measure", "table"]

WAYS = ("stored", "checkpoint", "reversible")
SHAPE, LEVELS, HIDDEN, BATCH = (3, 32, 32), 3, 64, 32
DEPTHS, ROUNDS = (4, 8, 16, 32, 64), 9
MIB = 2**20
RESULTS = Path(__file__).parent / "results"


class Checkpointed(nn.Bijection):
    """A layer that keeps its input alone, and is run again in the backward pass."""

    def __init__(self, layer: nn.Bijection) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return checkpoint(self.layer, x, context, use_reentrant=False)  # type: ignore[no-any-return]


def glow(way: str, depth: int) -> flows.Glow:
    """Return the same flow for each way, started from data, with weights away from zero and memory for gradients."""
    torch.manual_seed(0)
    memory = "reversible" if way == "reversible" else "stored"
    flow = flows.Glow(SHAPE, levels=LEVELS, steps=depth, hidden=HIDDEN, memory=memory)
    with torch.no_grad():
        flow.log_prob(torch.randn(BATCH, *SHAPE))
        for p in flow.parameters():
            p.add_(0.01 * torch.randn_like(p))
            p.grad = torch.ones_like(p)  # zeros would take no memory before they are written
    if way == "checkpoint":
        for level in flow.bijection.levels:  # type: ignore[union-attr]
            layers: Any = level.layers  # type: ignore[union-attr]
            for i, layer in enumerate(layers):
                layers[i] = Checkpointed(layer)
    return flow


def step(flow: flows.Glow, x: Tensor) -> Tensor:
    """Run a training step without its optimizer."""
    flow.zero_grad(set_to_none=False)
    loss = -flow.log_prob(x).mean()
    loss.backward()
    return loss.detach()


def gradient(flow: flows.Glow, x: Tensor) -> Tensor:
    """Return the gradient of a step, of all parameters, in float64."""
    step(flow, x)
    return torch.cat([p.grad.flatten().double() for p in flow.parameters() if p.grad is not None])


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_of_tensors(flow: flows.Glow, x: Tensor) -> float:
    """Return the MiB of tensors that a step has at once, beyond those there before: the same number at each run."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(flow, x)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / MIB


def kept_for_backward(flow: flows.Glow, x: Tensor) -> float:
    """Return the MiB that autograd holds between forward and backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (*flow.parameters(), *flow.buffers(), x)}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = -flow.log_prob(x).mean()
    del loss
    return sum(found.values()) / MIB


def resident(flow: flows.Glow, x: Tensor) -> float:
    """Return by how many MiB the resident memory of this process grows at most during a step."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    step(flow, x)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def memory_of(way: str, depth: int) -> dict[str, float]:
    """Return what one way takes at one depth, in a process that did nothing else before."""
    flow, x = glow(way, depth), torch.randn(BATCH, *SHAPE)
    found = {"resident_mib": resident(flow, x)}  # the first step of all
    found["kept_mib"] = kept_for_backward(flow, x)
    found["peak_mib"] = peak_of_tensors(flow, x)
    return {name: round(value, 2) for name, value in found.items()}


# --- time and gradients ----------------------------------------------------------------------------------------------


def times_and_gradients(depth: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return median times of a step, in turns, and how far gradients are from those of the stored way."""
    models, x = {way: glow(way, depth) for way in WAYS}, torch.randn(BATCH, *SHAPE)
    found: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    wanted = gradient(models["stored"], x)
    for way in WAYS:
        found[way]["difference"] = _relative(gradient(models[way], x), wanted)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, model in models.items():
            begin = time.perf_counter()
            step(model, x)
            times[way].append(1e3 * (time.perf_counter() - begin))
    for way in WAYS:
        ratios = [a / b for a, b in zip(times[way], times["stored"], strict=True)]
        found[way] |= {
            "ms": round(statistics.median(times[way]), 2),
            "time": round(statistics.median(ratios), 3),
        }
    exact = gradient(models["stored"].double(), x.double())
    found["stored"]["rounding"] = _relative(wanted, exact)  # of float32 itself
    found["reversible"]["difference_float64"] = _relative(
        gradient(models["reversible"].double(), x.double()), exact
    )
    return found


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float(f"{float((found - wanted).norm() / wanted.norm()):.2e}")


# --- the whole -------------------------------------------------------------------------------------------------------


def in_a_process(way: str, depth: int) -> dict[str, float]:
    """Return what :func:`memory_of` does, from a process of its own."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "bench._memory", way, str(depth), threads]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    out: Path,
    depths: Sequence[int] = DEPTHS,
    rounds: int = ROUNDS,
    one: Callable[[str, int], dict[str, float]] = in_a_process,
) -> list[dict[str, Any]]:
    """Measure all ways at all depths; print them and write ``memory.json``, ``memory.md`` and ``memory.png``.

    What was timed beside busy neighbours replaces no committed result: it goes to ``out/bench``.
    """
    facts = _environment.describe(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    before = Neighbours()
    for depth in depths:
        timed = times_and_gradients(depth, rounds)
        for way in WAYS:
            rows.append({"K": depth, "way": way} | one(way, depth) | timed[way])
            print(rows[-1], flush=True)
    busy = before.cores()
    kept = {"rows": rows, "neighbours": busy} | facts
    if too_busy(busy, torch.get_num_threads()) and out.is_relative_to(RESULTS):
        out = RESULTS.parents[1] / "out" / "bench" / out.name
    write(out / "memory.json", kept, table(rows))
    draw(out / "memory.png", rows)
    _memory_vectors.measure(out)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: a row for each depth and way."""
    lines = [
        "| K | activations | kept for backward (MiB) | peak of a step (MiB) | resident (MiB) | ms | vs stored "
        "| gradients differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['K']} | {row['way']} | {row['kept_mib']:.1f} | {row['peak_mib']:.1f} | {row['resident_mib']:.0f} "
            f"| {row['ms']:.0f} | {row['time']:.2f} | {row['difference']:.1e} |"
        )
    return lines


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw memory, time and differences of gradients against the depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4))
    FigureCanvasAgg(figure)
    *panels, last = figure.subplots(1, 3)
    drawn = (("peak_mib", "peak of a step (MiB)"), ("time", "time of a step, stored = 1"))
    for axes, (name, label) in zip(panels, drawn, strict=True):
        for way in WAYS:
            points = sorted((row["K"], row[name]) for row in rows if row["way"] == way)
            axes.plot(*zip(*points, strict=True), "o-", label=way, markersize=4)
        axes.set(ylabel=label, ylim=(0, None))
    differences = (
        ("stored", "rounding", "float32 from float64, both stored"),
        ("reversible", "difference", "reversible from stored, float32"),
        ("reversible", "difference_float64", "reversible from stored, float64"),
    )
    for way, name, label in differences:
        points = sorted((row["K"], row[name]) for row in rows if row["way"] == way)
        last.plot(*zip(*points, strict=True), "o-", label=label, markersize=4)
    last.set(ylabel="relative difference of gradients", yscale="log")
    for axes in (*panels, last):
        axes.set(xlabel="K, steps a level")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=8)
    batch = "x".join(map(str, (BATCH, *SHAPE)))
    figure.suptitle(f"Glow, {batch}, L={LEVELS}, hidden {HIDDEN}: a training step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":  # one measurement in a process of its own
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(memory_of(sys.argv[1], int(sys.argv[2]))))
