"""Splines in plain PyTorch, element by element, differentiable to any order; :mod:`._spline_kinds` has the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflowkern.core.dtypes import accumulation_dtype, sum_per_sample
from pyflowkern.ops._spline_kinds import SPLINES, Pair, rounded_into
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["elements", "reference"]


def elements(
    x: Tensor, parts: tuple[Tensor, Tensor, Tensor], smap: SplineMap, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the transformed elements (dtype of x) and the log-derivative of each (accumulation dtype)."""
    work = x.dtype
    for part in parts:
        work = torch.promote_types(work, part.dtype)
    work = accumulation_dtype(work)
    widths, heights, derivatives = (part.to(work) for part in parts)
    y, log_slope = spline_elements(x.to(work), (widths, heights, derivatives), smap, inverse)
    return y.to(x.dtype), log_slope


def reference(
    x: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    smap: SplineMap,
    inverse: bool,
    elementwise: bool,
) -> tuple[Tensor, Tensor]:
    """Return the transformed elements, and the log-derivative of each or its sum over each sample."""
    y, log_slope = elements(x, parts, smap, inverse)
    return y, log_slope if elementwise else sum_per_sample(log_slope)


def spline_elements(
    x: Tensor, parts: tuple[Tensor, Tensor, Tensor], m: SplineMap, inverse: bool
) -> Pair:
    """Return the transformed elements and the log-derivative of each, in the dtype of the arguments."""
    left, right, bottom, top, end_slopes, within = SPLINES[m.kind](parts, m)
    start, end = (bottom, top) if inverse else (left, right)
    if m.tails == "circular":
        span = end - start
        turns = torch.floor((x - start) / span)
        x = torch.where((x >= start) & (x < end), x, x - span * turns)
        x = rounded_into(x, start, end)
    below, above = x < start, x > end
    outside = below | above
    inside = torch.where(outside, start, x)  # what lies outside must not reach the gradients
    y, log_slope = within(inside, inverse)
    y = rounded_into(y, *((left, right) if inverse else (bottom, top)))
    if m.tails == "none":
        y = torch.where(outside, math.nan, y)
        log_slope = torch.where(outside, math.nan, log_slope)
    elif end_slopes is None:
        y = torch.where(outside, x, y)
        log_slope = torch.where(outside, 0.0, log_slope)
    else:  # on in a straight line from the end of the interval
        slope = torch.where(below, *end_slopes)
        from_x, from_y = torch.where(below, left, right), torch.where(below, bottom, top)
        at, to = (from_y, from_x) if inverse else (from_x, from_y)
        distance = torch.where(outside, x - at, 0.0)
        y = torch.where(outside, to + (distance / slope if inverse else distance * slope), y)
        log_slope = torch.where(outside, torch.log(slope), log_slope)
    return y, -log_slope if inverse else log_slope
