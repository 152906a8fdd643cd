"""A picture of how time grows with a number in the names of cases, such as the dimension in "D=64"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench._harness import Row

__all__ = ["plot_scaling"]

NUMBER = re.compile(r"\bD=(\d+)")
LEAST = 4  # points that a curve must have


def plot_scaling(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Draw time against the number, with a line proportional to it through the first point of ours.

    Returns:
        False where no cases differ only in the number, or matplotlib is not installed.
    """
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.status == "ok" and row.metric == "ms" and (found := NUMBER.search(row.case)):
            name = f"{row.provider}: {NUMBER.sub('D', row.case)}"
            curves.setdefault(name, {})[int(found[1])] = row.p50
    curves = {name: points for name, points in curves.items() if len(points) >= LEAST}
    if not curves:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.5, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        numbers = sorted(points)
        axes.loglog(numbers, [points[n] for n in numbers], "o-", label=name, markersize=4)
        if name.startswith("ours"):
            line = [points[numbers[0]] * n / numbers[0] for n in numbers]
            axes.loglog(numbers, line, ":", color="gray", label="proportional to D")
    axes.set(xlabel="D", ylabel="ms", title=title)
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True
