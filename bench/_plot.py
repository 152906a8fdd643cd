"""One picture of a family: the speedup of every provider over eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._harness import Row

__all__ = ["plot"]

COLORS = (*(f"C{i}" for i in range(10)), "black", "goldenrod", "navy", "lime", "crimson")


def plot(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Draw the rows into a PNG; return False where no row has a speed-up, or matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    title += " (NOISY)" if any(row.noisy for row in rows) else ""
    shown = [
        row for row in rows if math.isfinite(row.speedup_vs_eager) and row.provider != "eager"
    ]
    if not shown:
        return False
    passes = list(dict.fromkeys(row.pass_ for row in shown))
    providers = list(dict.fromkeys(["ours", "compile", *(row.provider for row in shown)]))
    colors = dict(zip(providers, COLORS, strict=False))
    places, ticks = _places(shown, providers)
    labels = 0.4 + 0.055 * max(map(len, ticks))  # inches
    width = max(5.5, labels + (3.8 if len(passes) == 1 else 2.6 * len(passes)))
    columns = int(width / 1.5)  # of the legend
    drawn = [provider for provider in providers if any(p == provider for _, p in places)]
    height = 0.9 + 0.2 * -(-len(drawn) // columns) + 0.13 * max(places.values())
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(passes), sharey=True, sharex=True, squeeze=False)[0]
    for panel, pass_ in zip(panels, passes, strict=True):
        bars = [row for row in shown if row.pass_ == pass_]
        _bars(panel, bars, places, colors)
        unit = bars[0].metric
        panel.set_title(pass_ if unit == "ms" else f"{pass_}: times less {unit}", fontsize=9)
    panels[0].set_yticks([*ticks.values()], [*ticks], fontsize=7)
    panels[0].set_ylim(max(places.values()) + 1.2, 0)
    handles = [panels[0].barh([0], [0], left=1, color=colors[provider]) for provider in drawn]
    place = "outside lower center"
    figure.legend(handles, drawn, loc=place, ncols=min(columns, len(drawn)), fontsize=8)
    figure.suptitle(f"{title}: speedup over eager PyTorch", fontsize=10)
    figure.savefig(path, dpi=110)
    return True


def _name(row: Row) -> str:
    return row.case if row.dtype == "float32" else f"{row.case} {row.dtype}"


def _places(
    rows: Sequence[Row], providers: Sequence[str]
) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """Return where the bar of each case and provider lies, from top to bottom, and the middle of each case."""
    places: dict[tuple[str, str], float] = {}
    ticks: dict[str, float] = {}
    end = 0.0
    for case in dict.fromkeys(_name(row) for row in rows):
        found = {row.provider for row in rows if _name(row) == case}
        chosen = [provider for provider in providers if provider in found]
        places |= {(case, provider): end + 1 + i for i, provider in enumerate(chosen)}
        ticks[case] = end + (1 + len(chosen)) / 2
        end += 1 + len(chosen)
    return places, ticks


def _bars(
    panel: Any,
    rows: Sequence[Row],
    places: dict[tuple[str, str], float],
    colors: dict[str, str],
) -> None:
    """Draw bars from 1, which is eager PyTorch, to the right where a provider is faster; the axis is logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator

    for row in rows:
        length = row.speedup_vs_eager - 1
        place = places[_name(row), row.provider]
        panel.barh(place, length, 1, left=1, color=colors[row.provider])
    panel.set_xscale("log")
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="x", labelsize=7)
