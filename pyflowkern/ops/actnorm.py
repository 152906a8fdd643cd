r"""ActNorm: one scale and one bias a channel, with data-dependent initialisation.

.. math:: y = e^{\ell} (x + b), \qquad x = e^{-\ell} y - b, \qquad \log\det = \pm S \sum_c \ell_c

for ``S`` pixels.  With upstream gradients :math:`\bar y, \bar d` of the forward direction,

.. math:: \bar x = e^\ell \bar y, \quad \bar b = \sum e^\ell \bar y, \quad
          \bar\ell = \sum \bar y\, y + S \sum_n \bar d_n .

The moments that initialise it are found in one pass by pairwise merging (Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import (
    check_batched,
    check_flag,
    check_floating,
    check_same_device,
    check_shape,
)
from pyflowkern.core.dtypes import accumulation_dtype, cast, empty_canonical
from pyflowkern.core.register import register

__all__ = ["actnorm", "actnorm_reference", "channel_moments", "channel_moments_reference"]


def actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift each channel.

    .. math:: y = e^{\ell}(x + b), \qquad \log|\det| = |\text{space}| \sum_c \ell_c ,

    with the opposite sign for the inverse.

    Args:
        x: input ``[N, C, *space]``, contiguous or channels_last.
        log_scale: ``[C]``.
        bias: ``[C]``, added before the scale.
        inverse: return ``x`` from ``y``.

    Returns:
        ``(y, log_det)``: ``y`` like ``x``, ``log_det`` ``[N]`` in nats, float32 or float64.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for parameters that are not ``[C]``.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018).

    Example:
        >>> import torch
        >>> from pyflowkern.ops import actnorm
        >>> y, log_det = actnorm(torch.ones(2, 3, 4, 4), torch.zeros(3), torch.ones(3))
        >>> float(y.mean()), log_det.tolist()
        (2.0, [0.0, 0.0])
    """
    inverse = check_flag("inverse", inverse)
    check_batched("x", x)
    for name, t in (("log_scale", log_scale), ("bias", bias)):
        check_floating(name, t)
        check_shape(name, t, (x.shape[1],))
    check_same_device(x=x, log_scale=log_scale, bias=bias)
    if not kernel_serves("actnorm", x, log_scale, bias):
        return actnorm_reference(x, log_scale, bias, inverse=inverse)
    work = accumulation_dtype(x.dtype)
    out: tuple[Tensor, Tensor] = _actnorm(x, cast(log_scale, work), cast(bias, work), inverse)
    return out


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return mean and (biased) variance of each channel over batch and space, in one pass.

    .. math:: m_c = \frac{1}{n} \sum_{i=1}^{n} x_{ci}, \qquad v_c = \frac{1}{n} \sum_{i=1}^{n} (x_{ci} - m_c)^2

    Args:
        x: ``[N, C, *space]``.

    Returns:
        ``(mean, variance)``, each ``[C]``, float32 or float64; NaN for an empty batch.

    Raises:
        TypeError: for a tensor that is not floating-point.
        ValueError: for fewer than two axes.

    Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), for how parts are merged.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import channel_moments
        >>> mean, variance = channel_moments(torch.tensor([[1.0], [3.0]]))
        >>> mean.item(), variance.item()
        (2.0, 1.0)
    """
    check_batched("x", x)
    if not kernel_serves("channel_moments", x) or (x.requires_grad and torch.is_grad_enabled()):
        return channel_moments_reference(x)
    out: tuple[Tensor, Tensor] = _channel_moments(x)
    return out


def actnorm_reference(
    x: Tensor, log_scale: Tensor, bias: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute :func:`actnorm` in plain PyTorch, differentiable by autograd to any order."""
    inverse = check_flag("inverse", inverse)
    work = accumulation_dtype(x.dtype)
    shape = (1, -1, *[1] * (x.dim() - 2))
    ell, b, v = log_scale.to(work).view(shape), bias.to(work).view(shape), x.to(work)
    y = v * torch.exp(-ell) - b if inverse else (v + b) * torch.exp(ell)
    space = x.shape[2:].numel()
    log_det = (-space if inverse else space) * log_scale.to(work).sum()
    return y.to(x.dtype), log_det.expand(x.shape[0]).contiguous()


def channel_moments_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`channel_moments` in plain PyTorch."""
    work = x.to(accumulation_dtype(x.dtype))
    axes = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(work, axes, correction=0)
    return mean, variance


# --- schema, fake, autograd ---------------------------------------------------------------------------------


def _fake(x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return empty_canonical(x), x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _fake_backward(
    grad_y: Tensor, grad_log_det: Tensor, x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_canonical(x), torch.empty_like(log_scale), torch.empty_like(bias)


def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    moments = x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))
    return moments, torch.empty_like(moments)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.inverse = inputs[3]


def _backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
    op = torch.ops.pyflowkern.actnorm_backward.default
    return (*op(grad_y, grad_log_det, *ctx.saved_tensors, ctx.inverse), None)


_actnorm = register(
    "actnorm(Tensor x, Tensor log_scale, Tensor bias, bool inverse) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_keep,
    backward=_backward,
    reference=lambda x, s, b, inverse: actnorm_reference(x, s, b, inverse=inverse),
    inputs=lambda ctx: (*ctx.saved_tensors, ctx.inverse),
)
register(
    "actnorm_backward(Tensor grad_y, Tensor grad_log_det, Tensor x, Tensor log_scale, Tensor bias,"
    " bool inverse) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
_channel_moments = register("channel_moments(Tensor x) -> (Tensor, Tensor)", fake=_fake_moments)
