"""Pictures of how time grows with a number in the names of cases, such as the dimension in "D=64"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._harness import Row

__all__ = ["plot_scaling"]

NUMBER = re.compile(r"\b([DTN])=(\d+)")  # dimensions, transforms, samples
LEAST = 4  # points that a curve must have


def plot_scaling(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Draw time against each number, with a line proportional to it through the first point of ours.

    Returns:
        False where no cases differ only in a number, or matplotlib is not installed.
    """
    panels = {letter: _curves(rows, letter) for letter in "DTN"}
    panels = {letter: curves for letter, curves in panels.items() if curves}
    if not panels:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.5 * len(panels), 4))
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (letter, curves) in zip(all_axes, panels.items(), strict=True):
        _draw(axes, letter, curves)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def _curves(rows: Sequence[Row], letter: str) -> dict[str, dict[int, float]]:
    """Return the times of each provider by the number behind a letter, of cases that are alike but for it."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.status != "ok" or row.metric != "ms":
            continue
        for found in NUMBER.finditer(row.case):
            if found[1] == letter:
                name = (
                    f"{row.provider}: {row.case[: found.start()]}{letter}{row.case[found.end() :]}"
                )
                curves.setdefault(name, {})[int(found[2])] = row.p50
    return {name: points for name, points in curves.items() if len(points) >= LEAST}


def _draw(axes: Any, letter: str, curves: dict[str, dict[int, float]]) -> None:
    for name, points in curves.items():
        numbers = sorted(points)
        axes.loglog(numbers, [points[n] for n in numbers], "o-", label=name, markersize=4)
        if name.startswith("ours"):
            line = [points[numbers[0]] * n / numbers[0] for n in numbers]
            label = f"proportional to {letter}"
            axes.loglog(numbers, line, ":", color="gray", label=label)
    axes.set(xlabel=letter, ylabel="ms")
    axes.legend(fontsize=6)
