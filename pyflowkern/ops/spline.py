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

from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import check_flag, check_shape
from pyflowkern.core.codes import SplineFlag
from pyflowkern.core.dtypes import accumulation_dtype, cast, empty_canonical
from pyflowkern.core.register import register
from pyflowkern.ops._spline import reference
from pyflowkern.ops._spline_coupling import (
    check_coupling,
    check_packed,
    check_parts,
    coupling_reference,
)
from pyflowkern.ops.spline_map import Parameterization, SplineMap, Tails, spline_map_of

__all__ = [
    "rational_quadratic_spline",
    "rational_quadratic_spline_reference",
    "spline",
    "spline_coupling",
    "spline_coupling_reference",
    "spline_reference",
]

_INVERSE, _ELEMENTWISE = SplineFlag.INVERSE.value, SplineFlag.ELEMENTWISE.value
_SWAP, _COUPLING = SplineFlag.SWAP.value, SplineFlag.COUPLING.value


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

    In a bin from :math:`(x_0, y_0)`, of width :math:`w`, height :math:`h` and slope :math:`s = h / w`, with derivatives
    :math:`d_0, d_1` at its ends and :math:`\xi = (x - x_0) / w`,

    .. math:: y = y_0 + h \frac{s \xi^2 + d_0 \xi (1 - \xi)}{s + (d_0 + d_1 - 2 s)\, \xi (1 - \xi)} .

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

    Source: Gregory and Delbourgo (1982), *Piecewise rational quadratic interpolation to monotonic data*; Durkan,
    Bekasov, Murray and Papamakarios (2019), *Neural Spline Flows*.

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
    inverse, elementwise = check_flag("inverse", inverse), check_flag("elementwise", elementwise)
    check_parts(x, widths, heights, derivatives)
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
    if not kernel_serves("spline", x, widths, heights, derivatives):
        return reference(x, (widths, heights, derivatives), smap, inverse, elementwise)
    return _run(x, None, (None, widths, heights, derivatives), smap, _flags(inverse, elementwise))


def spline(
    x: Tensor,
    params: Tensor,
    spline_map: SplineMap,
    *,
    inverse: bool = False,
    elementwise: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Transform every element by a spline of its own, of any kind, whose raw parameters lie side by side.

    With the increasing function :math:`f(\cdot; \theta)` of an element's parameters :math:`\theta`,

    .. math:: y_i = f(x_i; \theta_i), \qquad \log\det = \sum_i \log f'(x_i; \theta_i) .

    In each bin :math:`f` is a polynomial of degree 1, 2 or 3, or a quotient of two of degree 2.  :class:`SplineMap`
    says what the kinds are and how raw parameters become bins and derivatives.

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

    Source: Durkan, Bekasov, Murray and Papamakarios (2019); Müller, McWilliams, Rousselle, Gross and Novák (2019),
    *Neural Importance Sampling*.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import SplineMap, spline
        >>> smap = SplineMap("cubic", bins=5)
        >>> x = torch.randn(4, 3)
        >>> y, _ = spline(x, smap.identity_raw().expand(4, 3, -1), smap)
        >>> bool(torch.allclose(y, x, atol=1e-5))
        True
    """
    inverse, elementwise = check_flag("inverse", inverse), check_flag("elementwise", elementwise)
    check_packed(x, params, spline_map)
    if not kernel_serves("spline", x, params):
        return reference(x, spline_map.split(params), spline_map, inverse, elementwise)
    return _run(x, None, (params, None, None, None), spline_map, _flags(inverse, elementwise))


def spline_coupling(
    x: Tensor,
    params: Tensor,
    spline_map: SplineMap,
    *,
    split: str | Tensor = "channel",
    swap: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Transform one part of ``x`` by splines and pass the other, reading and writing each element once.

    With the parts :math:`x_1` and :math:`x_2`, and parameters :math:`\theta` that a network made of :math:`x_1`,
    :math:`y_1 = x_1` and :math:`y_2 = f(x_2; \theta)`, the spline :math:`f` of each element by itself.

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

    Source: Durkan, Bekasov, Murray and Papamakarios (2019), *Neural Spline Flows*, section 3.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import SplineMap, spline_coupling
        >>> smap = SplineMap(bins=8)
        >>> x, params = torch.randn(5, 6), torch.randn(5, 3 * smap.params)
        >>> y, log_det = spline_coupling(x, params, smap)
        >>> bool((y[:, :3] == x[:, :3]).all()), tuple(log_det.shape)
        (True, (5,))
    """
    inverse, swap = check_flag("inverse", inverse), check_flag("swap", swap)
    mask = check_coupling(x, params, spline_map, split, swap)
    if not kernel_serves("spline", x, params):
        return coupling_reference(x, params, mask, spline_map, swap, inverse)
    flags = _flags(inverse, False) + _COUPLING + _SWAP * (swap and mask is None)
    return _run(x, mask, (params, None, None, None), spline_map, flags)


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
    inverse, elementwise = check_flag("inverse", inverse), check_flag("elementwise", elementwise)
    check_parts(x, widths, heights, derivatives)
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
    return reference(x, (widths, heights, derivatives), smap, inverse, elementwise)


def spline_reference(
    x: Tensor,
    params: Tensor,
    spline_map: SplineMap,
    *,
    inverse: bool = False,
    elementwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`spline` in plain PyTorch, differentiable by autograd to any order."""
    inverse, elementwise = check_flag("inverse", inverse), check_flag("elementwise", elementwise)
    check_packed(x, params, spline_map)
    return reference(x, spline_map.split(params), spline_map, inverse, elementwise)


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
    inverse, swap = check_flag("inverse", inverse), check_flag("swap", swap)
    mask = check_coupling(x, params, spline_map, split, swap)
    return coupling_reference(x, params, mask, spline_map, swap, inverse)


# --- schema, fake, autograd ---------------------------------------------------------------------------------


def _flags(inverse: bool, elementwise: bool) -> int:
    return _INVERSE * inverse + _ELEMENTWISE * elementwise


#: Raw parameters as the op takes them: packed ones, or widths, heights and derivatives.
_Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _run(
    x: Tensor, mask: Tensor | None, parts: _Parts, smap: SplineMap, flags: int
) -> tuple[Tensor, Tensor]:
    """Call the op in the widest dtype; y gets that of x."""
    dtype = x.dtype
    for part in parts:
        if part is not None and part.dtype != dtype:
            dtype = torch.promote_types(dtype, part.dtype)
    same = [None if part is None else cast(part, dtype) for part in parts]
    y, log_det = _spline(cast(x, dtype), mask, *same, *smap.form, smap.numbers, flags)
    return cast(y, x.dtype), log_det


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    flags, dtype = rest[-1], accumulation_dtype(x.dtype)
    if flags & _COUPLING:
        return empty_canonical(x), x.new_empty(x.shape[0], dtype=dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = x.shape if flags & _ELEMENTWISE else x.shape[:1]
    return y, x.new_empty(shape, dtype=dtype)


def _fake_backward(
    grad_y: Tensor, grad_log_det: Tensor, x: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    parts, flags = rest[:4], rest[-1]
    if flags & _COUPLING:
        grad_x = empty_canonical(x)
        fmt = torch.contiguous_format
        if not grad_x.is_contiguous():
            fmt = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        grad_packed = torch.empty_like(parts[0], memory_format=fmt)
        return grad_x, grad_packed, *[x.new_empty(0) for _ in parts[1:]]
    grads = [x.new_empty(0 if part is None else part.shape) for part in parts]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *grads


def _by_form(
    x: Tensor,
    mask: Tensor | None,
    packed: Tensor | None,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *form_numbers_flags: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain PyTorch, from what the op is given."""
    *form, numbers, flags = form_numbers_flags
    smap, inverse = spline_map_of(form, numbers), bool(flags & _INVERSE)
    if packed is not None and flags & _COUPLING:
        return coupling_reference(x, packed, mask, smap, bool(flags & _SWAP), inverse)
    parts = (widths, heights, derivatives) if packed is None else smap.split(packed)
    return reference(x, parts, smap, inverse, bool(flags & _ELEMENTWISE))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs alone."""
    ctx.save_for_backward(*inputs[:6])
    ctx.form_numbers_flags = inputs[6:]


def _backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
    x, mask, *parts = ctx.saved_tensors
    op = torch.ops.pyflowkern.spline_backward.default
    grad_x, *grads = op(grad_y, grad_log_det, x, mask, *parts, *ctx.form_numbers_flags)
    given = [None if part is None else g for part, g in zip(parts, grads, strict=True)]
    return (grad_x, None, *given, *[None] * 6)


#: What both ops take: raw parameters packed or in three tensors, and the spline map (see ``core.codes``).
_PARAMETERS = (
    "Tensor? packed, Tensor? widths, Tensor? heights, Tensor? derivatives,"
    " int kind, int tails, int parameterization, int bins, float[] numbers, int flags"
)
_spline = register(
    f"spline(Tensor x, Tensor? mask, {_PARAMETERS}) -> (Tensor, Tensor)",
    fake=_fake_forward,
    setup_context=_keep,
    backward=_backward,
    reference=_by_form,
    inputs=lambda ctx: (*ctx.saved_tensors, *ctx.form_numbers_flags),
)
register(
    f"spline_backward(Tensor grad_y, Tensor grad_log_det, Tensor x, Tensor? mask, {_PARAMETERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
