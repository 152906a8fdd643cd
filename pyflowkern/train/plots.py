"""Pictures from numbers: grids of images, the learning curve, pair plots and densities of two columns."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from pyflowkern.core.files import write_atomic

__all__ = [
    "MOST_COLUMNS",
    "MOST_POINTS",
    "blank_figure",
    "curve_picture",
    "image_grid",
    "save_beside",
    "save_density",
    "save_grid",
    "save_pairs",
]

#: Columns of a pair plot, rows of a set in it, and rows of each set from which on contours are drawn.
MOST_COLUMNS, MOST_POINTS, _ENOUGH = 8, 2000, 100
_COLOURS = ("#1f5fa8", "#d9660f", "#2f8a4b")
#: Shares of a set that the contours of a pair plot hold, and the bins of a side that they are found with.
_HELD, _BINS = (0.9, 0.5), 40
#: Points of a side of a density, and nats below its top that have a colour of their own.
_GRID, _DEPTH = 100, 12.0


def blank_figure(width: float, height: float, *, constrained: bool = True) -> Any:
    """Return an empty figure, in inches.

    Raises:
        ModuleNotFoundError: that names matplotlib, where it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained" if constrained else None)


def _png(figure: Any) -> memoryview:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getbuffer()


# --- images -------------------------------------------------------------------------------------------


def image_grid(images: Tensor, levels: int = 256, columns: int = 8, gap: int = 2) -> Tensor:
    """Lay ``uint8 [N, C, H, W]`` out as one ``uint8 [3, H', W']`` picture, ``levels`` spread over black to white.

    Example:
        >>> image_grid(torch.zeros(16, 1, 8, 8, dtype=torch.uint8), columns=4).shape
        torch.Size([3, 42, 42])
    """
    scaled = (images.float() * (255 / (levels - 1))).clamp(0, 255).round().to(torch.uint8)
    rows = -(-len(scaled) // columns)
    blank = scaled.new_zeros((rows * columns - len(scaled), *scaled.shape[1:]))
    cells = F.pad(torch.cat([scaled, blank]).expand(-1, 3, -1, -1), (0, gap, 0, gap), value=255)
    height, width = cells.shape[2:]
    grid = cells.view(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4)
    picture = grid.reshape(3, rows * height, columns * width)
    return F.pad(picture, (gap, 0, gap, 0), value=255)


def _enlarged(grid: Tensor, zoom: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(grid.permute(1, 2, 0).numpy()))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def save_grid(
    path: Path, images: Tensor, levels: int = 256, columns: int = 8, zoom: int = 2
) -> None:
    """Write a grid of images as PNG, each pixel ``zoom`` times enlarged."""
    buffer = io.BytesIO()
    _enlarged(image_grid(images, levels, columns), zoom).save(buffer, "PNG")
    write_atomic(path, buffer.getbuffer())


def save_beside(path: Path, sets: Mapping[str, Tensor], levels: int = 256) -> None:
    """Write grids of images side by side as PNG, each below its name."""
    grids = {name: image_grid(images, levels) for name, images in sets.items()}
    zoom = max(2, round(330 / next(iter(grids.values())).shape[2]))  # small images, more
    parts = {name: _enlarged(grid, zoom) for name, grid in grids.items()}
    head, gap = 18, 16
    size = (
        sum(part.width + gap for part in parts.values()) - gap,
        head + max(part.height for part in parts.values()),
    )
    picture, left = Image.new("RGB", size, "white"), 0
    for name, part in parts.items():
        picture.paste(part, (left, head))
        ImageDraw.Draw(picture).text((left + 4, 3), name, fill="black")
        left += part.width + gap
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, buffer.getbuffer())


# --- the curve ----------------------------------------------------------------------------------------


def curve_picture(history: Sequence[Mapping[str, float]], unit: str) -> memoryview:
    """Return a plot of training and held-out score by step, as PNG."""
    figure = blank_figure(7, 4)
    axes = figure.subplots()
    steps = [row["step"] for row in history]
    axes.plot(
        steps,
        [row["held_out"] for row in history],
        "o-",
        ms=3,
        label="held out (averaged weights)",
    )
    axes.plot(steps, [row["train"] for row in history], alpha=0.7, label="training batches")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


# --- rows ---------------------------------------------------------------------------------------------


def save_pairs(
    path: Path, sets: Mapping[str, Tensor], columns: Sequence[str] = (), title: str = ""
) -> str:
    """Write a pair plot of up to three sets of rows as PNG; return how many columns of how many it shows, if not all.

    Histograms stand on the diagonal, points below it, and above it contours that hold 50% and 90% of each set.  Of
    more than :data:`MOST_COLUMNS` columns the first are drawn, and the title says so; of more than :data:`MOST_POINTS`
    rows the first.  Axes reach a little further than the middle 99% of each set.  Rows with NaN or inf are left out,
    and the legend says so.

    Args:
        path: of the picture.
        sets: rows ``[N, D]`` by the name of their set, all with the same columns.
        columns: names of the columns; ``x1``, ``x2`` and so on without.
        title: of the picture.

    Raises:
        ModuleNotFoundError: without matplotlib.
        OSError: naming ``path`` if it cannot be written.
    """
    width = next(iter(sets.values())).shape[1]
    shown = min(width, MOST_COLUMNS)
    note = f"the first {shown} of {width} columns" if shown < width else ""
    drawn = [finite(name, rows) for name, rows in sets.items()]
    points = [rows[:, :shown] for _, rows in drawn]
    limits = [limits_of([rows[:, i] for rows in points]) for i in range(shown)]
    side = max(4.5, 1.45 * shown + 1)
    figure = blank_figure(side, side + 0.3, constrained=False)
    axes = figure.subplots(shown, shown, squeeze=False)
    figure.subplots_adjust(0.8 / side, 0.6 / side, 1 - 0.12 / side, 1 - 0.58 / side, 0.08, 0.08)
    order = np.random.default_rng(0).permutation(sum(map(len, points)))
    for i in range(shown):
        for j in range(shown):
            ax, pairs = axes[i, j], [rows[:, [j, i]] for rows in points]
            if i == j:
                _histograms(ax, [rows[:, i] for rows in points], limits[i])
            elif i > j:
                _points(ax, pairs, order)
            else:
                _contours(ax, pairs, (limits[j], limits[i]))
            _frame(ax, i, j, limits, [str(name) for name in columns[:shown]])
    handles = [_handle(k, name) for k, (name, _) in enumerate(drawn)]
    figure.legend(handles=handles, loc="upper center", ncols=3, fontsize=8, frameon=False)
    figure.text(0.5, 1 - 0.34 / side, f"{title}{'; ' * bool(title and note)}{note}", **_TITLE)
    write_atomic(path, _png(figure))
    return note


_TITLE: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8}


def finite(name: str, rows: Tensor) -> tuple[str, Any]:
    """Return the finite rows as an array, and a name that says how many there are and how many were left out."""
    kept = rows[rows.isfinite().all(1)].double()
    lost = len(rows) - len(kept)
    left_out = f", {lost} not finite" if lost else ""
    return f"{name} ({min(len(kept), MOST_POINTS)}{left_out})", kept[:MOST_POINTS].cpu().numpy()


def limits_of(columns: Sequence[Any]) -> tuple[float, float]:
    """Return where an axis begins and ends: a tenth beyond the middle 99% of each array.

    Example:
        >>> low, high = limits_of([np.linspace(0, 1, 1001)])
        >>> round(low, 3), round(high, 3)
        (-0.094, 1.094)
    """
    ends = [np.quantile(column, (0.005, 0.995)) for column in columns if len(column)]
    if not ends:
        return 0.0, 1.0
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    more = 0.1 * (high - low) or 0.5 * max(abs(low), 1.0)
    return float(low - more), float(high + more)


def _histograms(ax: Any, columns: Sequence[Any], limits: tuple[float, float]) -> None:
    """Draw densities over the axis: as much of each as lies within it."""
    bins = np.linspace(*limits, _BINS + 1)
    for column, colour in zip(columns, _COLOURS, strict=False):
        counts, _ = np.histogram(column, bins)
        heights = counts / (max(1, len(column)) * (bins[1] - bins[0]))
        ax.stairs(heights, bins, fill=True, color=colour, alpha=0.25)
        ax.stairs(heights, bins, color=colour, linewidth=1)


def _points(ax: Any, pairs: Sequence[Any], order: Any) -> None:
    """Draw points in a random order, so that no set hides another; those of small sets are larger."""
    counts = [len(rows) for rows in pairs]
    colours = np.repeat(_COLOURS[: len(pairs)], counts)
    sizes = np.repeat([np.clip(3000 / max(1, n), 2.5, 10) for n in counts], counts)
    x, y = np.concatenate(pairs)[order].T
    ax.scatter(x, y, c=colours[order], s=sizes[order], alpha=0.6, linewidths=0)


def _contours(ax: Any, pairs: Sequence[Any], limits: Sequence[tuple[float, float]]) -> None:
    """Draw lines that hold shares of each set; nothing where a set has few rows."""
    if min(map(len, pairs)) < _ENOUGH:
        ax.set_visible(False)
        return
    edges: Any = [np.linspace(low, high, _BINS + 1) for low, high in limits]
    x, y = (0.5 * (edge[1:] + edge[:-1]) for edge in edges)
    for rows, colour in zip(pairs, _COLOURS, strict=False):
        mass = _smooth(np.histogram2d(rows[:, 0], rows[:, 1], bins=edges)[0] / len(rows))
        levels = levels_of(mass)
        if len(levels):
            ax.contour(x, y, mass.T, levels=levels, colors=colour, linewidths=1)


def levels_of(mass: Any) -> Any:
    """Return the levels above which a histogram holds 90% and 50% of what it has; none of an empty one."""
    descending = np.sort(mass, axis=None)[::-1]
    reached = np.searchsorted(descending.cumsum(), np.array(_HELD) * mass.sum())
    levels = np.unique(descending[reached.clip(max=mass.size - 1)])
    return levels[levels > 0]


def _smooth(mass: Any, width: float = 1.2) -> Any:
    """Return a histogram after a convolution with a normal, ``width`` bins wide, along both axes."""
    at = np.arange(-4, 5)
    weights = np.exp(-0.5 * (at / width) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        mass = np.apply_along_axis(np.convolve, axis, mass, weights, mode="same")
    return mass


def _frame(ax: Any, i: int, j: int, limits: Sequence[Any], names: Sequence[str]) -> None:
    """Set the limits of a panel; names and numbers stand at the left and at the bottom alone."""
    ax.set_xlim(*limits[j])
    if i != j:
        ax.set_ylim(*limits[i])
    for axis, at in ((ax.xaxis, j), (ax.yaxis, i)):
        outer = i == len(limits) - 1 if axis is ax.xaxis else j == 0
        axis.set_major_locator(_ticks(3 if outer and (i != j or axis is ax.xaxis) else 0))
        axis.set_tick_params(labelsize=6)
        if outer:
            axis.set_label_text(_short(names[at] if names else f"x{at + 1}"), fontsize=8)


def _ticks(most: int) -> Any:
    """Return what places about so many ticks; those of inner panels would take most of the time."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    return MaxNLocator(most) if most else NullLocator()


def _handle(k: int, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=_COLOURS[k], marker="o", linestyle="", markersize=5, label=name)


def _short(name: str, longest: int = 20) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def save_density(
    path: Path,
    log_prob: Callable[[Tensor], Tensor],
    rows: Tensor,
    columns: Sequence[str] = (),
    title: str = "",
) -> None:
    """Write a picture of a log-density of two columns as PNG, with rows ``[N, 2]`` as points.

    Colours reach twelve nats below the largest value on the picture.

    Raises:
        ModuleNotFoundError: without matplotlib.
        OSError: naming ``path`` if it cannot be written.
    """
    figure = blank_figure(5.6, 4.6)
    points = finite("", rows)[1]
    x_ends, y_ends = (limits_of([points[:, i]]) for i in range(2))
    grid = torch.cartesian_prod(torch.linspace(*x_ends, _GRID), torch.linspace(*y_ends, _GRID))
    values = torch.cat([log_prob(part).float().cpu() for part in grid.split(4096)])
    values = values.nan_to_num(nan=-torch.inf)
    top = float(values[values < torch.inf].max())
    ax = figure.subplots()
    shown = ax.imshow(
        values.clamp(min=top - _DEPTH).view(_GRID, _GRID).T.numpy(),
        origin="lower",
        extent=(*x_ends, *y_ends),
        aspect="auto",
        vmin=top - _DEPTH,
        vmax=top,
    )
    size = 5 if len(points) < 300 else 2.5
    ax.plot(*points.T, ".", color="black", markersize=size, alpha=0.6, markeredgewidth=0)
    names = [_short(str(name), 40) for name in columns] or ["x1", "x2"]
    ax.set(xlim=x_ends, ylim=y_ends, xlabel=names[0], ylabel=names[1])
    ax.set_title(title, fontsize=8)
    figure.colorbar(shown, ax=ax, label="log-density, nats")
    write_atomic(path, _png(figure))
