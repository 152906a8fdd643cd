"""One picture of a family: the speedup of every provider over eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bench._harness import Row

__all__ = ["plot"]


def plot(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Draw the rows into a PNG; return False where matplotlib is not installed."""
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
    cases = list(dict.fromkeys(f"{row.case} {row.dtype}" for row in shown))
    passes = list(dict.fromkeys(row.pass_ for row in shown))
    providers = list(dict.fromkeys(row.provider for row in shown))
    figure = Figure(
        figsize=(1.5 + 3.2 * len(passes), 1.2 + 0.18 * len(cases) * (len(providers) + 1))
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    height = 0.85 / len(providers)
    for panel, pass_ in zip(panels, passes, strict=True):
        for i, provider in enumerate(providers):
            bars = [row for row in shown if (row.pass_, row.provider) == (pass_, provider)]
            places = [cases.index(f"{row.case} {row.dtype}") + height * i for row in bars]
            panel.barh(
                places,
                [row.speedup_vs_eager for row in bars],
                height,
                label=provider,
                color=f"C{i}",
            )
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(pass_, fontsize=9)
        panel.set_xlabel("speedup over eager", fontsize=8)
    panels[0].set_yticks([i + 0.4 for i in range(len(cases))], cases, fontsize=7)
    panels[0].invert_yaxis()
    handles = [panels[0].barh([0], [0], color=f"C{i}") for i in range(len(providers))]
    figure.legend(handles, providers, loc="lower center", ncols=len(providers), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    return True
