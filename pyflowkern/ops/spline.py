r"""Monotonic splines, fused with the map from raw parameters and with their log-determinant.

Rational-quadratic splines (Gregory and Delbourgo 1982; Durkan, Bekasov, Murray and Papamakarios 2019), and the linear,
quadratic (Müller, McWilliams, Rousselle, Gross and Novák 2019) and cubic ones; formulas in :mod:`._spline`. One pass
reads the raw parameters, normalises them, finds the bin, transforms and sums the log-derivatives; the backward pass
does it again from the inputs, which are all that is kept.

The backward of an inverse differentiates implicitly: with :math:`x = f^{-1}(y)`, upstream gradients :math:`\bar x` and
:math:`\bar\ell` of :math:`-\log f'(x)`, and :math:`a = \bar x - \bar\ell f'' / f'`,

.. math::
    \bar y = a / f', \qquad \bar\theta = -\frac{a}{f'} \frac{\partial f}{\partial \theta}
    - \bar\ell\, \frac{\partial \log f'}{\partial \theta} .
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.ops._coupling import channel_split_sizes, mask_of
from pyflowkern.ops._registry import (
    accumulation_dtype,
    check_batched,
    check_floating,
    check_same_device,
    check_shape,
    sum_per_sample,
)
from pyflowkern.ops._spline import spline_elements
from pyflowkern.ops.spline_map import Parameterization, SplineMap, Tails

__all__ = [
    "rational_quadratic_spline",
    "rational_quadratic_spline_reference",
    "spline",
    "spline_coupling",
    "spline_coupling_reference",
    "spline_reference",
]

Parts = tuple[Tensor, Tensor, Tensor]


# --- public functions ---------------------------------------------------------------------------------------


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float = 3.0,
    tails: Tails = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameterization: Parameterization = "softmax",
    inverse: bool = False,
    elementwise: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Transform every element by a rational-quadratic spline of its own.

    Args:
        x: input ``[N, ...]``.
        widths: raw widths of the ``K`` bins, ``x.shape + (K,)``, K from 2 to 64.
        heights: raw heights, shaped like ``widths``.
        derivatives: raw derivatives, ``x.shape + (K - 1,)`` for linear tails, K for circular ones, else K + 1.
        bound: the spline spans ``[-bound, bound]``.
        tails: ``linear``, ``circular``, ``none`` or ``affine``: see :class:`SplineMap`, also for what follows.
        min_bin_width: least share of the interval that a bin is wide.
        min_bin_height: least share of the interval that a bin is high.
        min_derivative: least derivative at a knot.
        parameterization: ``softmax``, ``softclip`` or ``domain``.
        inverse: return ``x`` from ``y``, and the log-determinant of that direction.
        elementwise: return the log-derivative of each element instead of its sum over each sample.

    Returns:
        ``(y, log_det)``, ``y`` shaped and typed like ``x``, ``log_det`` ``[N]`` (or like ``x``) in nats, float32 or
        float64.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit, and what :class:`SplineMap` refuses.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import rational_quadratic_spline
        >>> x, widths, heights = torch.randn(4, 3), torch.randn(4, 3, 8), torch.randn(4, 3, 8)
        >>> derivatives = torch.randn(4, 3, 7)
        >>> y, log_det = rational_quadratic_spline(x, widths, heights, derivatives)
        >>> back, minus = rational_quadratic_spline(y, widths, heights, derivatives, inverse=True)
        >>> bool(torch.allclose(back, x, atol=1e-4)), tuple(log_det.shape)
        (True, (4,))
    """
    return rational_quadratic_spline_reference(
        x,
        widths,
        heights,
        derivatives,
        bound=bound,
        tails=tails,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
        parameterization=parameterization,
        inverse=inverse,
        elementwise=elementwise,
    )


def spline(
    x: Tensor,
    params: Tensor,
    spline_map: SplineMap,
    *,
    inverse: bool = False,
    elementwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform every element by a spline of its own, of any kind, whose raw parameters lie side by side.

    Args:
        x: input ``[N, ...]``.
        params: raw parameters ``x.shape + (spline_map.params,)``.
        spline_map: which spline, and how its raw parameters lie.
        inverse: return ``x`` from ``y``, and the log-determinant of that direction.
        elementwise: return the log-derivative of each element instead of its sum over each sample.

    Returns:
        ``(y, log_det)``: see :func:`rational_quadratic_spline`.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import SplineMap, spline
        >>> smap = SplineMap("cubic", bins=5)
        >>> x = torch.randn(4, 3)
        >>> y, _ = spline(x, smap.identity_raw().expand(4, 3, -1), smap)
        >>> bool(torch.allclose(y, x, atol=1e-5))
        True
    """
    return spline_reference(x, params, spline_map, inverse=inverse, elementwise=elementwise)


def spline_coupling(
    x: Tensor,
    params: Tensor,
    spline_map: SplineMap,
    *,
    split: str | Tensor = "channel",
    swap: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform one part of ``x`` by splines and pass the other, reading and writing each element once.

    Args:
        x: input ``[N, C, *space]``.
        params: raw parameters ``[N, Ct P, *space]`` of the ``Ct`` transformed channels, the ``P`` numbers of a channel
            side by side on the channel axis. Checkerboards and masks over space have ``Ct = C``, of which only
            transformed positions are read; a mask over channels may have that too.
        spline_map: which spline; ``P`` is its ``params``.
        split: ``"channel"``: the first ``C - C // 2`` channels pass, the last ``C // 2`` are transformed.
            ``"checkerboard"``: positions whose coordinates sum to an odd number are transformed, in all channels.
            A boolean mask ``[C]`` or ``[C, *space]``: True is transformed.
        swap: exchange the roles of the two parts.
        inverse: invert the transform.

    Returns:
        ``(y, log_det)``: ``y`` like ``x``; ``log_det`` ``[N]`` in nats, float32 or float64.

    Raises:
        TypeError: for tensors that are not floating-point (or a mask that is not boolean).
        ValueError: for shapes that do not fit, and unknown names.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import SplineMap, spline_coupling
        >>> smap = SplineMap(bins=8)
        >>> x, params = torch.randn(5, 6), torch.randn(5, 3 * smap.params)
        >>> y, log_det = spline_coupling(x, params, smap)
        >>> bool((y[:, :3] == x[:, :3]).all()), tuple(log_det.shape)
        (True, (5,))
    """
    return spline_coupling_reference(
        x, params, spline_map, split=split, swap=swap, inverse=inverse
    )


# --- references ---------------------------------------------------------------------------------------------


def rational_quadratic_spline_reference(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float = 3.0,
    tails: Tails = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    parameterization: Parameterization = "softmax",
    inverse: bool = False,
    elementwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`rational_quadratic_spline` in plain PyTorch, differentiable to any order."""
    _check_parts(x, widths, heights, derivatives)
    smap = SplineMap(
        "rational_quadratic",
        widths.shape[-1],
        bound,
        tails,
        min_bin_width,
        min_bin_height,
        min_derivative,
        parameterization,
    )
    check_shape("derivatives", derivatives, (*x.shape, smap.derivatives))
    return _reference(x, (widths, heights, derivatives), smap, inverse, elementwise)


def spline_reference(
    x: Tensor,
    params: Tensor,
    spline_map: SplineMap,
    *,
    inverse: bool = False,
    elementwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`spline` in plain PyTorch, differentiable by autograd to any order."""
    _check_packed(x, params, spline_map)
    return _reference(x, spline_map.split(params), spline_map, inverse, elementwise)


def spline_coupling_reference(
    x: Tensor,
    params: Tensor,
    spline_map: SplineMap,
    *,
    split: str | Tensor = "channel",
    swap: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`spline_coupling` in plain PyTorch, differentiable by autograd to any order."""
    mask = _check_coupling(x, params, spline_map, split, swap)
    c = x.shape[1]
    rows = params.unflatten(1, (params.shape[1] // spline_map.params, spline_map.params))
    rows = rows.movedim(2, -1)  # [N, Ct, *space, P]
    if mask is None:
        first = channel_split_sizes(c)[0]
        parts = [x[:, :first], x[:, first:]]
        which = 0 if swap else 1
        parts[which], log_slope = _elements(
            parts[which], spline_map.split(rows), spline_map, inverse
        )
        return torch.cat(parts, 1), sum_per_sample(log_slope)
    if rows.shape[1] != c:  # spread parameters of transformed channels alone over all channels
        by_channel = mask.reshape(c, -1)[:, 0]
        rows = rows.index_select(1, (by_channel.cumsum(0) - 1).clamp(0, rows.shape[1] - 1))
    # what passes gets harmless numbers, so that garbage there reaches neither y nor a gradient
    rows = torch.where(mask.unsqueeze(-1), rows, 0.0)
    y, log_slope = _elements(
        torch.where(mask, x, 0.0), spline_map.split(rows), spline_map, inverse
    )
    return torch.where(mask, y, x), sum_per_sample(torch.where(mask, log_slope, 0.0))


def _elements(x: Tensor, parts: Parts, smap: SplineMap, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return the transformed elements (dtype of x) and the log-derivative of each (accumulation dtype)."""
    work = x.dtype
    for part in parts:
        work = torch.promote_types(work, part.dtype)
    work = accumulation_dtype(work)
    widths, heights, derivatives = (part.to(work) for part in parts)
    y, log_slope = spline_elements(x.to(work), (widths, heights, derivatives), smap, inverse)
    return y.to(x.dtype), log_slope


def _reference(
    x: Tensor, parts: Parts, smap: SplineMap, inverse: bool, elementwise: bool
) -> tuple[Tensor, Tensor]:
    y, log_slope = _elements(x, parts, smap, inverse)
    return y, log_slope if elementwise else sum_per_sample(log_slope)


# --- argument checks ----------------------------------------------------------------------------------------


def _check_parts(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> None:
    check_batched("x", x, min_dim=1)
    for name, t in (("widths", widths), ("heights", heights), ("derivatives", derivatives)):
        check_floating(name, t)
    check_same_device(x=x, widths=widths, heights=heights, derivatives=derivatives)
    if widths.shape[:-1] != x.shape or widths.dim() == 0:
        raise ValueError(
            f"widths must have the shape of x and a last axis, {(*x.shape, 'K')}, got {tuple(widths.shape)}"
        )
    check_shape("heights", heights, widths.shape)


def _check_map(spline_map: SplineMap) -> None:
    if not isinstance(spline_map, SplineMap):
        raise TypeError(f"spline_map must be a SplineMap, got {type(spline_map).__name__}")


def _check_packed(x: Tensor, params: Tensor, spline_map: SplineMap) -> None:
    _check_map(spline_map)
    check_batched("x", x, min_dim=1)
    check_floating("params", params)
    check_same_device(x=x, params=params)
    check_shape("params", params, (*x.shape, spline_map.params))


def _check_coupling(
    x: Tensor, params: Tensor, spline_map: SplineMap, split: str | Tensor, swap: bool
) -> Tensor | None:
    """Check everything; return the mask ``[C, *space]`` of what is transformed, None for the channel split."""
    _check_map(spline_map)
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
