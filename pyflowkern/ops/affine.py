r"""Affine transforms and affine coupling, fused with their log-determinant.

Forward and inverse of one element with raw scale ``u`` and shift ``t``, where :math:`s = s(u)` is a
:class:`~pyflowkern.ops.ScaleMap`:

.. math:: y = s x + t, \qquad x = (y - t) / s, \qquad \log\det = \pm\sum \log s .

With :math:`\ell' = d \log s / du` and upstream gradients :math:`\bar y, \bar\ell`, the forward direction has

.. math:: \bar x = s \bar y, \quad \bar t = \bar y, \quad \bar u = (\bar y\, s x + \bar\ell)\, \ell',

where :math:`s x = y - t` can be had from the output alone, so that a layer may keep either ``x`` or ``y``.

A coupling (Dinh, Sohl-Dickstein and Bengio 2017) leaves one part of ``x`` as it is and transforms the other with
parameters that a network computed from the first part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import check_batched, check_flag, check_floating, check_same_device
from pyflowkern.core.codes import AffineFlag, ParamsLayout, numbered
from pyflowkern.core.dtypes import accumulation_dtype, cast, empty_canonical, sum_per_sample
from pyflowkern.core.register import register
from pyflowkern.ops._coupling import (
    affine_elements,
    channel_split_sizes,
    check_params,
    checkerboard_mask,
    coupling_reference,
    mask_of,
    parse_layout,
)
from pyflowkern.ops.scale_map import ScaleMap, scale_map_of
from pyflowkern.ops.scale_map import scale_map as _scale_map

__all__ = [
    "affine",
    "affine_coupling",
    "affine_coupling_reference",
    "affine_reference",
    "channel_split_sizes",
    "checkerboard_mask",
]

Save = Literal["input", "output"]
_INVERSE, _SWAP = AffineFlag.INVERSE.value, AffineFlag.SWAP.value
_FROM_OUTPUT = AffineFlag.FROM_OUTPUT.value
_LAYOUT_CODES = numbered(ParamsLayout)


# --- public functions ---------------------------------------------------------------------------------------


def affine(
    x: Tensor,
    raw_scale: Tensor | None,
    shift: Tensor,
    *,
    scale_map: str | ScaleMap = "exp",
    inverse: bool = False,
    save: Save = "input",
) -> tuple[Tensor, Tensor]:
    r"""Transform every element: :math:`y = s(u) x + t`, with the log-determinant of each sample.

    Args:
        x: input ``[N, ...]``.
        raw_scale: raw scale ``u``, broadcastable to ``x``; None for the additive map.
        shift: shift ``t``, broadcastable to ``x``.
        scale_map: the name of a scale map or a ScaleMap, which has a list of them.
        inverse: return ``x`` from ``y``, and the log-determinant of that direction.
        save: which side of the transform the backward pass keeps. ``"input"`` is exact. ``"output"`` spares memory
            where the output is kept anyway, and recomputes the input from the rounded output: with an error of up to
            :math:`\epsilon |y| / s`, where :math:`\epsilon` is half a unit of the last place (6e-8 in float32), which
            goes into the gradients of ``raw_scale``. A shift of 100 with a log-scale of -6 costs 2e-3 of ``x``; use
            it where ``|t| / s`` stays small.

    Returns:
        ``(y, log_det)``, ``y`` shaped and typed like ``x``, ``log_det`` ``[N]`` in nats, float32 or float64.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not broadcast to ``x``, an unknown map or ``save``.

    Source: Dinh, Krueger and Bengio (2015), *NICE*; Papamakarios, Pavlakou and Murray (2017), *Masked Autoregressive
    Flow*; the scale maps name theirs in :class:`~pyflowkern.ops.ScaleMap`.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import affine
        >>> x = torch.randn(4, 3)
        >>> y, log_det = affine(x, torch.zeros(4, 3), torch.ones(4, 3))
        >>> bool(torch.allclose(y, x + 1)), tuple(log_det.shape)
        (True, (4,))
    """
    smap = _scale_map(scale_map)
    inverse = check_flag("inverse", inverse)
    _check_save(save)
    check_batched("x", x, min_dim=1)
    if raw_scale is None and smap.kind != "additive":
        raise ValueError(f"raw_scale may be None for the additive map only, not for {smap.kind!r}")
    raw = None if smap.kind == "additive" else raw_scale
    dtype = x.dtype
    check_floating("shift", shift)
    if raw is not None:
        check_floating("raw_scale", raw)
    for t in (shift, raw):
        if t is not None:
            dtype = dtype if t.dtype == dtype else torch.promote_types(dtype, t.dtype)
    check_same_device(x=x, raw_scale=raw, shift=shift)
    shift = _broadcast("shift", shift, x, dtype)
    raw = None if raw is None else _broadcast("raw_scale", raw, x, dtype)
    if not kernel_serves("affine", x, shift, raw):
        return affine_reference(x, raw, shift, scale_map=smap, inverse=inverse, save=save)
    flags = _flags(smap, inverse=inverse, save=save)
    out: tuple[Tensor, Tensor] = _affine(
        cast(x, dtype), raw, shift, smap.code, smap.numbers, flags
    )
    return out if dtype == x.dtype else (out[0].to(x.dtype), out[1])


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    split: str | Tensor = "channel",
    swap: bool = False,
    scale_map: str | ScaleMap = "tanh",
    params_layout: str = "blocked",
    inverse: bool = False,
    save: Save = "input",
) -> tuple[Tensor, Tensor]:
    r"""Transform one part of ``x`` and pass the other, reading and writing each element once.

    With the parts :math:`x_1` and :math:`x_2`, and parameters that a network made of :math:`x_1`,
    :math:`y_1 = x_1` and :math:`y_2 = s(u) \odot x_2 + t`; the inverse is :math:`x_2 = (y_2 - t) / s(u)`.

    Args:
        x: input ``[N, C, *space]``, contiguous or channels_last.
        params: shift ``t`` and raw scale ``u`` of the transformed part (the shift alone for the additive map), in
            ``params_layout``. ``channel`` split: ``[N, 2 Ct, *space]`` for ``Ct`` transformed channels. Masks: ``[N,
            2 C, *space]``, of which only transformed positions are read, or, for a mask over channels, ``[N, 2 Ct,
            *space]``.
        split: ``"channel"``: the first ``C - C // 2`` channels pass, the last ``C // 2`` are transformed.
            ``"checkerboard"``: positions whose coordinates sum to an odd number are transformed, in all channels.
            A boolean mask ``[C]`` or ``[C, *space]``: True is transformed.
        swap: exchange the roles of the two parts.
        scale_map: a name or a :class:`ScaleMap`.
        params_layout: ``"blocked"`` (all shifts, then all raw scales on the channel axis), ``"interleaved"`` (channel
            ``2 c`` the shift, ``2 c + 1`` the raw scale) or ``"feature_major"`` (a last axis of size 2); append
            ``"_raw_first"`` where the raw scale comes before the shift.
        inverse: invert the transform.
        save: which side of the transform the backward pass keeps; see :func:`affine` for the error of ``"output"``,
            up to :math:`\epsilon |y| / s` of a transformed value.

    Returns:
        ``(y, log_det)``: ``y`` like ``x``; ``log_det`` ``[N]`` in nats, float32 or float64.

    Raises:
        TypeError: for tensors that are not floating-point (or a mask that is not boolean).
        ValueError: for shapes that do not fit, and unknown names.

    Source: Dinh, Sohl-Dickstein and Bengio (2017), *Density estimation using Real NVP*, sections 3.2 to 3.4.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import affine_coupling
        >>> x = torch.randn(2, 4, 8, 8)
        >>> params = torch.randn(2, 4, 8, 8)  # 2 transformed channels: 2 shifts, 2 raw scales
        >>> y, log_det = affine_coupling(x, params)
        >>> back, _ = affine_coupling(y, params, inverse=True)
        >>> bool(torch.allclose(back, x, atol=1e-5))
        True
    """
    smap = _scale_map(scale_map)
    inverse, swap = check_flag("inverse", inverse), check_flag("swap", swap)
    _check_save(save)
    check_batched("x", x)
    check_floating("params", params)
    layout, raw_first = parse_layout(params_layout)
    mask = mask_of(split, x)
    check_same_device(x=x, params=params, mask=mask)
    params = check_params(x, params, split, swap, smap, layout)
    mask = ~mask if mask is not None and swap else mask
    swap = swap and mask is None
    if not kernel_serves("affine_coupling", x, params):
        return coupling_reference(x, params, mask, layout, raw_first, smap, swap, inverse)
    flags = _flags(smap, inverse=inverse, swap=swap, save=save)
    dtype = x.dtype if x.dtype == params.dtype else torch.promote_types(x.dtype, params.dtype)
    out: tuple[Tensor, Tensor] = _affine_coupling(
        cast(x, dtype),
        cast(params, dtype),
        mask,
        _LAYOUT_CODES[params_layout],
        smap.code,
        smap.numbers,
        flags,
    )
    return out if dtype == x.dtype else (out[0].to(x.dtype), out[1])


# --- references ---------------------------------------------------------------------------------------------


def affine_reference(
    x: Tensor,
    raw_scale: Tensor | None,
    shift: Tensor,
    *,
    scale_map: str | ScaleMap = "exp",
    inverse: bool = False,
    save: Save = "input",
) -> tuple[Tensor, Tensor]:
    """Compute :func:`affine` in plain PyTorch, differentiable by autograd to any order."""
    smap = _scale_map(scale_map)
    inverse = check_flag("inverse", inverse)
    y, log_scale = affine_elements(x, raw_scale, shift, smap, inverse)
    return y, sum_per_sample(log_scale.expand(x.shape))


def affine_coupling_reference(
    x: Tensor,
    params: Tensor,
    *,
    split: str | Tensor = "channel",
    swap: bool = False,
    scale_map: str | ScaleMap = "tanh",
    params_layout: str = "blocked",
    inverse: bool = False,
    save: Save = "input",
) -> tuple[Tensor, Tensor]:
    """Compute :func:`affine_coupling` in plain PyTorch, differentiable by autograd to any order."""
    smap = _scale_map(scale_map)
    inverse, swap = check_flag("inverse", inverse), check_flag("swap", swap)
    layout, raw_first = parse_layout(params_layout)
    mask = mask_of(split, x)
    params = check_params(x, params, split, swap, smap, layout)
    mask = ~mask if mask is not None and swap else mask
    return coupling_reference(
        x, params, mask, layout, raw_first, smap, swap and mask is None, inverse
    )


# --- argument checks ----------------------------------------------------------------------------------------


def _check_save(save: str) -> None:
    if save not in ("input", "output"):
        raise ValueError(f"save must be 'input' or 'output', got {save!r}")


def _broadcast(name: str, t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return cast(t, dtype) if t.shape == x.shape else cast(t, dtype).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must be broadcastable to x of shape {tuple(x.shape)}, got {tuple(t.shape)}"
        ) from None


def _flags(smap: ScaleMap, *, inverse: bool, save: Save, swap: bool = False) -> int:
    return smap.flags + _INVERSE * inverse + _SWAP * swap + _FROM_OUTPUT * (save == "output")


# --- schema, fake, autograd ---------------------------------------------------------------------------------


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_canonical(x), x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _fake_affine_backward(
    grad_y: Tensor, grad_log_det: Tensor, kept: Tensor, raw: Tensor | None, shift: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    like = empty_canonical(kept)
    return like, torch.empty_like(like), torch.empty_like(like)


def _fake_coupling_backward(
    grad_y: Tensor, grad_log_det: Tensor, kept: Tensor, params: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    grad_x = empty_canonical(kept)
    if grad_x.is_contiguous() or params.dim() != kept.dim():
        return grad_x, torch.empty_like(params, memory_format=torch.contiguous_format)
    fmt = torch.channels_last if kept.dim() == 4 else torch.channels_last_3d
    return grad_x, torch.empty_like(params, memory_format=fmt)


def _affine_by_code(
    x: Tensor, raw: Tensor | None, shift: Tensor, kind: int, numbers: list[float], flags: int
) -> tuple[Tensor, Tensor]:
    """Compute the op ``affine`` in plain PyTorch, from what the op is given."""
    smap = scale_map_of(kind, numbers, flags)
    return affine_reference(x, raw, shift, scale_map=smap, inverse=bool(flags & _INVERSE))


def _coupling_by_code(
    x: Tensor,
    params: Tensor,
    mask: Tensor | None,
    layout_code: int,
    kind: int,
    numbers: list[float],
    flags: int,
) -> tuple[Tensor, Tensor]:
    """Compute the op ``affine_coupling`` in plain PyTorch, from what the op is given."""
    layout, raw_first = parse_layout(ParamsLayout(layout_code).name.lower())
    smap, swap = scale_map_of(kind, numbers, flags), bool(flags & _SWAP)
    inverse = bool(flags & _INVERSE)
    return coupling_reference(x, params, mask, layout, raw_first, smap, swap, inverse)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the input or the output, and the parameters: never an intermediate."""
    x, *params = inputs[:3]
    ctx.codes = inputs[3:]
    ctx.save_for_backward(output[0] if inputs[-1] & _FROM_OUTPUT else x, *params)


def _inputs(ctx: Any, by_code: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
    """Return the op's inputs, computed from the output, differentiably, where that was kept."""
    x, *params = ctx.saved_tensors
    *codes, flags = ctx.codes
    if flags & _FROM_OUTPUT:
        x = by_code(x, *params, *codes, flags ^ _INVERSE)[0]
    return x, *params, *codes, flags


def _affine_backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
    kept, raw, shift = ctx.saved_tensors
    op = torch.ops.pyflowkern.affine_backward.default
    grad_x, grad_raw, grad_shift = op(grad_y, grad_log_det, kept, raw, shift, *ctx.codes)
    return grad_x, None if raw is None else grad_raw, grad_shift, None, None, None


def _coupling_backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
    op = torch.ops.pyflowkern.affine_coupling_backward.default
    grads = op(grad_y, grad_log_det, *ctx.saved_tensors, *ctx.codes)
    return (*grads, None, None, None, None, None)


_affine = register(
    "affine(Tensor x, Tensor? raw_scale, Tensor shift, int scale_kind, float[] scale_numbers, int flags)"
    " -> (Tensor, Tensor)",
    fake=_fake_forward,
    setup_context=_keep,
    backward=_affine_backward,
    reference=_affine_by_code,
    inputs=lambda ctx: _inputs(ctx, _affine_by_code),
)
register(
    "affine_backward(Tensor grad_y, Tensor grad_log_det, Tensor kept, Tensor? raw_scale, Tensor shift,"
    " int scale_kind, float[] scale_numbers, int flags) -> (Tensor, Tensor, Tensor)",
    fake=_fake_affine_backward,
)
_affine_coupling = register(
    "affine_coupling(Tensor x, Tensor params, Tensor? mask, int params_layout, int scale_kind,"
    " float[] scale_numbers, int flags) -> (Tensor, Tensor)",
    fake=_fake_forward,
    setup_context=_keep,
    backward=_coupling_backward,
    reference=_coupling_by_code,
    inputs=lambda ctx: _inputs(ctx, _coupling_by_code),
)
register(
    "affine_coupling_backward(Tensor grad_y, Tensor grad_log_det, Tensor kept, Tensor params,"
    " Tensor? mask, int params_layout, int scale_kind, float[] scale_numbers, int flags) -> (Tensor, Tensor)",
    fake=_fake_coupling_backward,
)
