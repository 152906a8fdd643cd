"""README.md's picture and its rows: how long other libraries take for real work, in units of our time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bench._summary import find_row, milliseconds

__all__ = ["Entry", "describe", "draw_overview", "entries", "headlines"]


class Entry(NamedTuple):
    """One bar: the work, our time in ms, the other library, and its time over ours."""

    work: str
    ours: float
    peer: str
    ratio: float


#: The bars from top to bottom: label, results' file, start of the case's name, pass, provider, and its name in the
#: picture if that differs.  Whole training steps come first; cases where we are level or slower are shown as well.
SHOWN = (
    ("train MAF: D=6, batch 200", "small_flows", "step MAF D=6", "call", "zuko", ""),
    ("train RealNVP: D=6, batch 200", "small_flows", "step RealNVP", "call", "zuko", ""),
    ("train NSF, no blocks: D=6, batch 200", "small_flows", "step NSF D=6", "call", "nflows", ""),
    ("train NSF: D=6, batch 200", "nsf", "training step D=6 batch 200", "call", "nflows", ""),
    ("train NSF: D=10, batch 1000", "nsf", "training step D=10", "call", "nflows", ""),
    ("train NSF: D=20, batch 4096", "nsf", "training step D=20", "call", "nflows", ""),
    ("train NSF: D=6, hidden 256", "nsf", "training step D=6 batch 512", "call", "nflows", ""),
    ("train FFJORD: D=6, batch 1000", "ffjord", "training step", "call", "eager", "torchdiffeq"),
    ("train Glow: 32x32, batch 32", "glow", "training step", "call", "eager", "plain PyTorch"),
    ("1000 samples of MAF, D=43", "autoregressive", "MAF D=43", "call", "zuko", ""),
    (
        "1000 samples of NSF (autoregressive), D=43",
        "autoregressive",
        "NSF D=43",
        "call",
        "zuko",
        "",
    ),
    (
        "1 sample of MAF, D=43",
        "autoregressive",
        "MAF D=43 5 x (512, 512), 1 sample",
        "call",
        "nflows",
        "",
    ),
    ("solve an ODE: dopri5, 512 x 2", "ode", "dopri5 2-64x3-2", "call", "eager", "torchdiffeq"),
    (
        "solve and differentiate: constant memory",
        "ode",
        "dopri5 and gradient, reversible",
        "call",
        "eager",
        "torchdiffeq",
    ),
    (
        "rational-quadratic spline and gradient",
        "spline",
        "rq 4096x32 K=8",
        "forward+backward",
        "nflows",
        "",
    ),
    (
        "the same, other side compiled",
        "spline",
        "rq 4096x32 K=8",
        "forward+backward",
        "zuko compile",
        "zuko, compiled",
    ),
    (
        "ReLU network alone and gradient, 4096 x 64",
        "relu_network",
        "residual 4096",
        "forward+backward",
        "eager",
        "plain PyTorch",
    ),
)
#: The rows of README.md's small table.
HEADLINES = (
    "train NSF: D=10, batch 1000",
    "train FFJORD: D=6, batch 1000",
    "train Glow: 32x32, batch 32",
    "1000 samples of NSF (autoregressive), D=43",
    "rational-quadratic spline and gradient",
)


def entries(folder: Path) -> list[Entry]:
    """Return the bars, from the committed results of one device."""
    found = []
    for work, family, case, pass_, provider, name in SHOWN:
        path = folder / f"{family}.csv"
        ours, peer = (find_row(path, case, pass_, who) for who in ("ours", provider))
        found.append(
            Entry(work, float(ours["p50"]), name or provider, float(peer["time_vs_ours"]))
        )
    return found


def headlines(folder: Path) -> str:
    """Return README.md's small table."""
    lines = ["| work | pyflowkern | others take |", "|---|---|---|"]
    known = {entry.work: entry for entry in entries(folder)}
    for work in HEADLINES:
        _, ours, peer, ratio = known[work]
        lines.append(f"| {work} | {milliseconds(ours)} ms | {_short(ratio)}x ({peer}) |")
    return "\n".join(lines)


def draw_overview(folder: Path, path: Path) -> None:
    """Draw the entries as bars; the PNG's description holds the numbers, for a test to read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = entries(folder)
    peers = list(dict.fromkeys(entry.peer for entry in shown))
    figure = Figure(figsize=(9.6, 0.9 + 0.32 * len(shown)))
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for i, (_, _, peer, ratio) in enumerate(shown):
        # on a logarithmic axis bars start at 1, and go to the left where the other library is faster
        panel.barh(i, ratio - 1, 0.7, left=1, color=f"C{peers.index(peer)}")
        place = {"va": "center", "ha": "left" if ratio >= 1 else "right", "fontsize": 8}
        panel.text(ratio, i, f" {_short(ratio)}x ", **place)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xlim(0.3, 600)
    panel.set_xticks([1, 2, 5, 10, 100], ["equal", "2x", "5x", "10x", "100x"])
    panel.set_yticks(range(len(shown)), [entry.work for entry in shown], fontsize=8)
    panel.invert_yaxis()
    handles = [panel.barh([0], [0], color=f"C{i}") for i in range(len(peers))]
    panel.legend(handles, peers, loc="lower right", fontsize=8)
    panel.set_xlabel(
        "time of the other library, over ours (CPU, two threads, float32)", fontsize=8
    )
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Description": describe(shown)})


def describe(shown: list[Entry]) -> str:
    """Write the entries as text."""
    return "\n".join(f"{work}: {ours} ms, {peer} {ratio}" for work, ours, peer, ratio in shown)


def _short(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
