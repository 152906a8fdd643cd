r"""Invertible linear maps over the channels.

A matrix ``W`` mixes the channels of every pixel, :math:`y = W x + b`; its log-determinant counts
once per pixel.  The Glow step (Kingma and Dhariwal 2018) normalizes the activations first,

.. math:: y = W \,\mathrm{diag}(e^{s}) (x + b), \qquad
          x = \mathrm{diag}(e^{-s}) W^{-1} y - b,

and is one pass over memory once ``W`` and the scale are folded into one matrix.  The bias is not
folded: for data with a large mean ``x + b`` must cancel before anything is rounded.

With :math:`A` the folded matrix and :math:`v = x + b`, the gradients are
:math:`\bar x = A^T \bar y` and :math:`\bar A = \sum \bar y v^T` over samples and pixels; those of
``W``, ``s`` and ``b`` follow from :math:`\bar A` and :math:`\sum \bar y` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import (
    check_batched,
    check_flag,
    check_floating,
    check_same_device,
    check_shape,
)
from pyflowkern.core.dtypes import accumulation_dtype, cast, empty_canonical, full_precision
from pyflowkern.core.register import register

__all__ = [
    "glow_step",
    "glow_step_reference",
    "invertible_linear",
    "invertible_linear_reference",
]

#: A larger matrix no longer fits the inner caches, and torch's own library is the better kernel.
_MAX_CHANNELS = 128


# --- public functions ----------------------------------------------------------------------------


def invertible_linear(
    x: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    bias: Tensor | None = None,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Mix the channels of every pixel: :math:`y = W x + b`, inverse :math:`y = W (x - b)`.

    The inverse takes the inverse matrix as ``weight``, and :math:`\log|\det|` of the forward one.

    Args:
        x: input ``[N, C, *space]``.
        weight: ``[C, C]``; for ``inverse=True`` the inverse of the forward matrix.
        log_abs_det: 0-dim, :math:`\log|\det W|` of the forward matrix.
        bias: ``[C]`` or None.
        inverse: run the inverse direction.

    Returns:
        ``(y, log_det)``: ``y`` shaped and typed like ``x``; ``log_det`` ``[N]``, plus (inverse:
        minus) ``log_abs_det`` times the number of pixels, float32 or float64.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit ``x``.

    Source: Kingma and Dhariwal 2018, *Glow*.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import invertible_linear, slogdet_inverse
        >>> x, weight = torch.randn(2, 3, 4, 4), torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 1]])
        >>> _, log_abs_det, weight_inverse = slogdet_inverse(weight)
        >>> y, log_det = invertible_linear(x, weight, log_abs_det)
        >>> back, _ = invertible_linear(y, weight_inverse, log_abs_det, inverse=True)
        >>> bool(torch.allclose(back, x, atol=1e-5)), tuple(log_det.shape)
        (True, (2,))
    """
    inverse = check_flag("inverse", inverse)
    _check_mix(x, weight, log_abs_det, bias=bias)
    if _use_reference(x, weight, log_abs_det, bias):
        return invertible_linear_reference(x, weight, log_abs_det, bias, inverse=inverse)
    return _mix_kernel(x, weight, log_abs_det, None, bias, inverse)


def glow_step(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Normalize, then mix the channels, in one pass: :math:`y = W (e^{s} \odot (x + b))`.

    The inverse, :math:`x = e^{-s} \odot (W^{-1} y) - b`, takes the inverse matrix as ``weight``,
    and :math:`\log|\det|` of the forward one.

    Args:
        x: input ``[N, C, *space]``.
        log_scale: ``[C]``, the log of the activation normalization's scale.
        bias: ``[C]``, added before the scale; it may cancel data of a large mean without loss.
        weight: ``[C, C]``; for ``inverse=True`` the inverse of the forward matrix.
        log_abs_det: 0-dim, :math:`\log|\det W|` of the forward matrix.
        inverse: run the inverse direction.

    Returns:
        ``(y, log_det)``: ``y`` shaped and typed like ``x``; ``log_det`` ``[N]``, plus (inverse:
        minus) the number of pixels times ``log_scale.sum() + log_abs_det``, float32 or float64.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit ``x``.

    Source: Kingma and Dhariwal 2018, *Glow: Generative Flow with Invertible 1x1 Convolutions*.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import glow_step
        >>> x = torch.randn(2, 3, 4, 4)
        >>> weight, log_abs_det = torch.eye(3), torch.tensor(0.0)
        >>> y, log_det = glow_step(x, torch.ones(3), torch.zeros(3), weight, log_abs_det)
        >>> bool(torch.allclose(y, x * torch.e)), log_det.tolist()
        (True, [48.0, 48.0])
    """
    inverse = check_flag("inverse", inverse)
    check_floating("log_scale", log_scale)
    check_floating("bias", bias)
    _check_mix(x, weight, log_abs_det, log_scale=log_scale, bias=bias)
    if _use_reference(x, weight, log_abs_det, log_scale, bias):
        return glow_step_reference(x, log_scale, bias, weight, log_abs_det, inverse=inverse)
    return _mix_kernel(x, weight, log_abs_det, log_scale, bias, inverse)


# --- references ----------------------------------------------------------------------------------


def invertible_linear_reference(
    x: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    bias: Tensor | None = None,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`invertible_linear` in plain PyTorch, differentiable to any order."""
    inverse = check_flag("inverse", inverse)
    work = accumulation_dtype(x.dtype)
    v, b = x.to(work), None if bias is None else bias.to(work)
    if inverse:
        y = _mix(weight.to(work), v if b is None else v - _per_channel(b, v), None)
    else:
        y = _mix(weight.to(work), v, b)
    return y.to(x.dtype), _log_det(x, log_abs_det.to(work), inverse)


def glow_step_reference(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`glow_step` in plain PyTorch, differentiable by autograd to any order."""
    inverse = check_flag("inverse", inverse)
    work = accumulation_dtype(x.dtype)
    s, b, w = log_scale.to(work), bias.to(work), weight.to(work)
    if inverse:
        y = _mix(torch.exp(-s).unsqueeze(1) * w, x.to(work), -b)
    else:
        y = _mix(w * torch.exp(s), x.to(work) + _per_channel(b, x), None)
    return y.to(x.dtype), _log_det(x, s.sum() + log_abs_det.to(work), inverse)


def _mix(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply the channel axis of ``x`` by ``matrix``, in the precision of ``x``."""
    with full_precision(x):
        if x.dim() == 2:
            return F.linear(x, matrix, bias)
        if x.is_contiguous():
            y = torch.matmul(matrix, x.flatten(2)).reshape(x.shape)
            return y if bias is None else y + _per_channel(bias, y)
        return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 2))


def _log_det(x: Tensor, per_pixel: Tensor, inverse: bool) -> Tensor:
    pixels = x.shape[2:].numel()
    return (per_pixel * (-pixels if inverse else pixels)).expand(x.shape[0]).contiguous()


# --- argument checks -----------------------------------------------------------------------------


def _check_mix(
    x: Tensor, weight: Tensor, log_abs_det: Tensor, **per_channel: Tensor | None
) -> None:
    check_batched("x", x)
    channels = x.shape[1]
    check_floating("weight", weight)
    check_shape("weight", weight, (channels, channels))
    check_floating("log_abs_det", log_abs_det)
    check_shape("log_abs_det", log_abs_det, ())
    for name, t in per_channel.items():
        if t is not None:
            check_floating(name, t)
            check_shape(name, t, (channels,))
    check_same_device(x=x, weight=weight, log_abs_det=log_abs_det, **per_channel)


def _use_reference(x: Tensor, *others: Tensor | None) -> bool:
    return not 0 < x.shape[1] <= _MAX_CHANNELS or not kernel_serves("linear_mix", x, *others)


# --- ops -----------------------------------------------------------------------------------------


def _mix_kernel(
    x: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Call the kernel behind both maps; ``log_scale`` makes it a Glow step."""
    work = accumulation_dtype(x.dtype)
    out: tuple[Tensor, Tensor] = _mix_op(
        x,
        cast(weight, work),
        cast(log_abs_det, work),
        None if log_scale is None else cast(log_scale, work),
        None if bias is None else cast(bias, work),
        inverse,
    )
    return out


def _mix_reference(
    x: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    if log_scale is None or bias is None:
        return invertible_linear_reference(x, weight, log_abs_det, bias, inverse=inverse)
    return glow_step_reference(x, log_scale, bias, weight, log_abs_det, inverse=inverse)


def _mix_fake(
    x: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return empty_canonical(x), x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _mix_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.inverse = inputs
    ctx.save_for_backward(*tensors)


def _mix_backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, log_abs_det, log_scale, bias = ctx.saved_tensors
    need_x, need_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
    grads = torch.ops.pyflowkern.linear_mix_backward.default(
        grad_y, grad_log_det, x, weight, log_scale, bias, ctx.inverse, need_x, need_parameters
    )
    given = (x, weight, log_abs_det, log_scale, bias)
    kept = [
        g if needed and t is not None else None
        for g, t, needed in zip(grads, given, ctx.needs_input_grad, strict=False)
    ]
    return *kept, None


def _mix_backward_fake(
    grad_y: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor | None,
    bias: Tensor | None,
    inverse: bool,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = x.shape[1] if need_parameters else 0
    return (
        empty_canonical(x) if need_x else x.new_empty(0),
        weight.new_empty(size, size),
        weight.new_empty(()),
        weight.new_empty(size),
        weight.new_empty(size),
    )


def _mix_flops(x: torch.Size, *_: Any) -> int:
    return 2 * x.numel() * x[1]


def _mix_backward_flops(grad_y: torch.Size, *others: Any) -> int:
    products: int = others[-2] + others[-1]  # for x, for the parameters
    return products * _mix_flops(grad_y)


_mix_op = register(
    "linear_mix(Tensor x, Tensor weight, Tensor log_abs_det, Tensor? log_scale, Tensor? bias, "
    "bool inverse) -> (Tensor, Tensor)",
    fake=_mix_fake,
    setup_context=_mix_setup,
    backward=_mix_backward,
    reference=_mix_reference,
    inputs=lambda ctx: (*ctx.saved_tensors, ctx.inverse),
    flops=_mix_flops,
)
# the gradients of x, weight, log_abs_det, log_scale and bias; empty where not needed
register(
    "linear_mix_backward(Tensor grad_y, Tensor grad_log_det, Tensor x, Tensor weight, "
    "Tensor? log_scale, Tensor? bias, bool inverse, bool need_x, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_mix_backward_fake,
    flops=_mix_backward_flops,
)
