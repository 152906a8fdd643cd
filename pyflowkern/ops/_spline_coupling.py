"""What spline ops accept, and spline coupling in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.core.checks import check_batched, check_floating, check_same_device, check_shape
from pyflowkern.core.dtypes import sum_per_sample
from pyflowkern.ops._coupling import channel_split_sizes, mask_of
from pyflowkern.ops._spline import elements
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["check_coupling", "check_packed", "check_parts", "coupling_reference"]


def coupling_reference(
    x: Tensor, params: Tensor, mask: Tensor | None, smap: SplineMap, swap: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute a spline coupling in plain PyTorch, from arguments that have been checked."""
    c = x.shape[1]
    rows = params.unflatten(1, (params.shape[1] // smap.params, smap.params))
    rows = rows.movedim(2, -1)  # [N, Ct, *space, P]
    if mask is None:
        first = channel_split_sizes(c)[0]
        parts = [x[:, :first], x[:, first:]]
        which = 0 if swap else 1
        parts[which], log_slope = elements(parts[which], smap.split(rows), smap, inverse)
        return torch.cat(parts, 1), sum_per_sample(log_slope)
    if rows.shape[1] != c:  # parameters of the transformed channels only: give every channel some
        by_channel = mask if mask.dim() == 1 else mask.flatten(1).any(1)  # there may be no space
        rows = rows.index_select(1, (by_channel.cumsum(0) - 1).clamp(0, rows.shape[1] - 1))
    # elements that pass get zeros for parameters: whatever they hold must reach neither y nor a gradient
    rows = torch.where(mask.unsqueeze(-1), rows, 0.0)
    y, log_slope = elements(torch.where(mask, x, 0.0), smap.split(rows), smap, inverse)
    return torch.where(mask, y, x), sum_per_sample(torch.where(mask, log_slope, 0.0))


def check_parts(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> None:
    """Raise unless widths, heights and derivatives fit ``x``; the number of derivatives is not checked."""
    check_batched("x", x, min_dim=1)
    for name, t in (("widths", widths), ("heights", heights), ("derivatives", derivatives)):
        check_floating(name, t)
    check_same_device(x=x, widths=widths, heights=heights, derivatives=derivatives)
    if widths.shape[:-1] != x.shape or widths.dim() == 0:
        raise ValueError(
            f"widths must have the shape of x and a last axis, {(*x.shape, 'K')}, got {tuple(widths.shape)}"
        )
    check_shape("heights", heights, widths.shape)


def check_map(spline_map: SplineMap) -> None:
    if not isinstance(spline_map, SplineMap):
        raise TypeError(f"spline_map must be a SplineMap, got {type(spline_map).__name__}")


def check_packed(x: Tensor, params: Tensor, spline_map: SplineMap) -> None:
    """Raise unless the packed parameters of a map fit ``x``."""
    check_map(spline_map)
    check_batched("x", x, min_dim=1)
    check_floating("params", params)
    check_same_device(x=x, params=params)
    check_shape("params", params, (*x.shape, spline_map.params))


def check_coupling(
    x: Tensor, params: Tensor, spline_map: SplineMap, split: str | Tensor, swap: bool
) -> Tensor | None:
    """Check everything; return the mask ``[C, *space]`` of what is transformed, None for the channel split."""
    check_map(spline_map)
    check_batched("x", x)
    check_floating("params", params)
    mask = mask_of(split, x)
    check_same_device(x=x, params=params, mask=mask)
    n, c, *space = x.shape
    channels = isinstance(split, str) and split == "channel"
    full = channel_split_sizes(c, swap)[1] if channels else c
    p = spline_map.params
    if mask is not None and swap:
        mask = ~mask
    if tuple(params.shape) == (n, full * p, *space):
        return mask
    if isinstance(split, Tensor) and split.dim() == 1 and params.dim() == x.dim():
        size = params.shape[1] // p
        # counting True on a GPU would wait for it: there the caller's word is taken
        known = split.device.type == "cpu" and not torch.compiler.is_compiling()
        if (
            0 < size < c
            and tuple(params.shape) == (n, size * p, *space)
            and (not known or size == int((split ^ swap).sum()))
        ):
            return mask
    raise ValueError(
        f"params must have shape {(n, full * p, *space)} for x of shape {tuple(x.shape)} and {p} numbers an "
        f"element, got {tuple(params.shape)}"
    )
