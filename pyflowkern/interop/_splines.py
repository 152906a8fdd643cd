"""Splines in any box, element by element: what the spline functions of nflows and normflows have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.activations import softplus
from pyflowkern.ops import SplineMap, rational_quadratic_spline, spline
from pyflowkern.ops.spline_map import Kind, Tails

__all__ = [
    "Box",
    "OutsideDomain",
    "Pair",
    "Run",
    "check_domain",
    "check_sizes",
    "check_square",
    "in_box",
    "packed",
    "rational_quadratic",
    "within_bounds",
]

Pair = tuple[Tensor, Tensor]
#: ``(x, tails, bound) -> (y, log-derivatives)``: a spline on [0, 1] (tails "none") or [-bound, bound].
Run = Callable[[Tensor, Tails, float], Pair]


class OutsideDomain(ValueError):
    """Inputs outside of the box of a spline that has no tails."""


class Box(NamedTuple):
    """Where a spline lies: it maps ``[left, right]`` onto ``[bottom, top]``.

    Args:
        left: a number, or one for each element, as with all of them.
        right: likewise.
        bottom: likewise.
        top: likewise.
    """

    left: float | Tensor
    right: float | Tensor
    bottom: float | Tensor
    top: float | Tensor

    @property
    def square(self) -> bool:
        """Whether both sides are known to be equally long; of tensors that are not the same ones it is unknown."""
        left, right, bottom, top = self
        if left is bottom and right is top:
            return True
        if any(isinstance(side, Tensor) for side in self):
            return False
        return bool(right - left == top - bottom)


def check_domain(inputs: Tensor, box: Box, inverse: bool) -> None:
    """Raise unless all inputs lie in the box; this waits for the device, once.

    Raises:
        OutsideDomain: for inputs outside.
    """
    low, high = (box.bottom, box.top) if inverse else (box.left, box.right)
    if bool(((inputs < low) | (inputs > high)).any()):
        raise OutsideDomain(f"inputs must lie in [{low}, {high}], which is all that is mapped")


def check_square(box: Box) -> None:
    """Raise for a box with sides of two lengths.

    Raises:
        ValueError: there the library's log-determinant lacks the logarithm of their ratio.
    """
    if not box.square:
        raise ValueError(
            f"right - left must be top - bottom for this kind of spline, got {tuple(box)}: the library leaves the "
            "logarithm of their ratio out of its log-determinant"
        )


def check_sizes(bins: int, min_bin_width: float, min_bin_height: float) -> None:
    """Raise where the least sizes of all bins together are larger than the box."""
    for name, least in (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)):
        if least * bins > 1.0:
            raise ValueError(f"{name} must be at most 1 / {bins} for {bins} bins, got {least}")


def in_box(inputs: Tensor, box: Box, inverse: bool, run: Run) -> Pair:
    """Run a spline in a box: as it is where an op knows the box, else on [-1, 1] and stretched.

    Args:
        inputs: any shape with a batch axis, inside of the box.
        box: where the spline lies.
        inverse: from outputs to inputs.
        run: the spline.
    """
    left, right, bottom, top = box
    if not any(isinstance(side, Tensor) for side in box):
        if tuple(box) == (0.0, 1.0, 0.0, 1.0):
            return _like(inputs, run(inputs, "none", 1.0))
        if left == bottom == -right and right == top:
            return _like(inputs, run(inputs, "affine", float(right)))
    wide, high = (right - left) / 2, (top - bottom) / 2
    across, up = (left + right) / 2, (bottom + top) / 2
    start, size, end, length = (up, high, across, wide) if inverse else (across, wide, up, high)
    unit, log_det = run((inputs - start) / size, "affine", 1.0)
    if not box.square:
        log_det = log_det + _log(length / size)
    return _like(inputs, (end + length * unit, log_det))


def _log(ratio: float | Tensor) -> float | Tensor:
    return torch.log(ratio) if isinstance(ratio, Tensor) else math.log(ratio)


def _like(inputs: Tensor, pair: Pair) -> Pair:
    """Return log-derivatives in the dtype of the outputs, as the libraries do."""
    y, log_det = pair
    return y.to(inputs.dtype), log_det.to(inputs.dtype)


def rational_quadratic(
    inputs: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    inverse: bool,
    box: Box,
    least: tuple[float, float, float],
    beta: float = 1.0,
) -> Pair:
    """Run rational-quadratic splines whose derivatives at all knots are given.

    Args:
        inputs: inside of the box.
        parts: raw widths and heights, ``inputs.shape + (K,)``, and derivatives, ``inputs.shape + (K + 1,)``.
        inverse: from outputs to inputs.
        box: where the spline lies.
        least: least width, height (as shares of the box) and derivative.
        beta: of the softplus that makes derivatives positive.
    """
    widths, heights, derivatives = parts
    check_sizes(widths.shape[-1], *least[:2])
    slope = least[2]
    if not box.square or beta != 1.0:
        made = slope + softplus(beta * derivatives) / beta
        if not box.square:  # an op knows slopes in units of its own square
            ratio = (box.right - box.left) / (box.top - box.bottom)
            made = made * (ratio[..., None] if isinstance(ratio, Tensor) else ratio)
        derivatives, slope = _softplus_inverse(made), 0.0

    def run(x: Tensor, tails: Tails, bound: float) -> Pair:
        return rational_quadratic_spline(
            x, widths, heights, derivatives, bound=bound, tails=tails, min_bin_width=least[0],
            min_bin_height=least[1], min_derivative=slope, inverse=inverse, elementwise=True,
        )  # fmt: skip

    return in_box(inputs, box, inverse, run)


def _softplus_inverse(v: Tensor) -> Tensor:
    v = v.clamp_min(torch.finfo(v.dtype).tiny)
    return v + torch.log(-torch.expm1(-v))


def within_bounds(inputs: Tensor, bound: float | Tensor, other: float | None, run: Run) -> Pair:
    """Run a spline between bounds; outside, the inputs themselves or another value come out, with log-derivative 0.

    Args:
        inputs: any shape with a batch axis.
        bound: the spline lies in ``[-bound, bound]``; a number, or one for each element.
        other: what comes out for inputs outside; None for the inputs.
        run: the spline on ``[-bound, bound]``, which is given bound 1 where there is one for each element.
    """
    outside = (inputs < -bound) | (inputs > bound)
    x = torch.where(outside, 0.0, inputs)  # what lies outside must not reach the gradients
    if isinstance(bound, Tensor):
        unit, log_det = run(x / bound, "affine", 1.0)
        y = bound * unit
    else:
        y, log_det = run(x, "affine", float(bound))
    y = torch.where(outside, inputs if other is None else other, y.to(inputs.dtype))
    return _like(inputs, (y, torch.where(outside, 0.0, log_det)))


@lru_cache(256)
def _map(
    kind: Kind, bins: int, bound: float, tails: Tails, width: float, height: float, edge: float
) -> SplineMap:
    return SplineMap(kind, bins, bound, tails, width, height, edge=edge)


def packed(
    kind: Kind,
    params: Tensor,
    bins: int,
    inverse: bool,
    min_bin_width: float = 0.0,
    min_bin_height: float = 0.0,
    *,
    tails: Tails | None = None,
) -> Run:
    """Return how splines of one kind run whose raw parameters lie side by side.

    Quadratic splines that find the density of their ends count half of the outer bins, as nflows does.

    Args:
        kind: of the splines.
        params: raw parameters, see :class:`pyflowkern.ops.SplineMap`.
        bins: number of bins.
        inverse: from outputs to inputs.
        min_bin_width: least share of a width.
        min_bin_height: least share of a height.
        tails: in place of those that the box asks for.
    """

    def run(x: Tensor, wanted: Tails, bound: float) -> Pair:
        chosen = wanted if tails is None else tails
        if chosen == "linear" and wanted == "none":  # such tails come with an interval around zero
            y, log_det = run(2 * x - 1, "affine", 1.0)
            return (y + 1) / 2, log_det
        smap = _map(kind, bins, bound, chosen, min_bin_width, min_bin_height, 0.25)
        return spline(x, params, smap, inverse=inverse, elementwise=True)

    return run
