r"""The diagonal normal density, summed over the event in one pass.

With :math:`d = (z - \mu) e^{-\lambda}` for a mean :math:`\mu` and a log standard deviation
:math:`\lambda`,

.. math:: \log p(z) = \sum -\tfrac12 d^2 - \lambda - \tfrac12 \log 2\pi \;[+ \log\det],

and with an upstream gradient :math:`g` of the sample

.. math:: \bar z = -g\, d\, e^{-\lambda}, \quad \bar\mu = -\bar z, \quad \bar\lambda = g (d^2 - 1).

A learned base has one mean per event element, whose gradient is a sum over the batch; a
conditional one has a mean for every element.  The two are told apart by their batch axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import (
    check_batched,
    check_count,
    check_floating,
    check_same_device,
    check_shape,
)
from pyflowkern.core.codes import WantedGradient
from pyflowkern.core.dtypes import accumulation_dtype, cast, empty_canonical, sum_per_sample
from pyflowkern.core.register import register

__all__ = [
    "bits_per_dim",
    "bits_per_dim_reference",
    "normal_log_prob",
    "normal_log_prob_reference",
]

_GRAD_Z, _GRAD_MEAN = WantedGradient.Z.value, WantedGradient.MEAN.value
_GRAD_LOG_STD = WantedGradient.LOG_STD.value


# --- public functions ----------------------------------------------------------------------------


def normal_log_prob(
    z: Tensor,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    *,
    log_det: Tensor | None = None,
) -> Tensor:
    r"""Return :math:`\sum \log N(z; \mu, e^\lambda) + \log\det` of every sample.

    Args:
        z: input ``[N, ...]``.
        mean: mean :math:`\mu`: None for 0; broadcastable to the event ``z.shape[1:]``, alike for
            every sample; or, with a batch axis, broadcastable to ``z``.
        log_std: log standard deviation :math:`\lambda` in nats, likewise; None for 0.
        log_det: ``[N]``, added to the result: what the flow before the base gave.

    Returns:
        ``[N]`` in nats, float32 or, if any of ``z``, ``mean`` and ``log_std`` is, float64.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not broadcast to ``z``, or tensors on different devices.

    Source: the change of variables as in Dinh, Sohl-Dickstein and Bengio (2017), section 3.1.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import normal_log_prob
        >>> normal_log_prob(torch.zeros(2, 10))
        tensor([-9.1894, -9.1894])
    """
    check_batched("z", z, min_dim=1)
    mean, log_std = _parameter("mean", mean, z), _parameter("log_std", log_std, z)
    if log_det is not None:
        check_floating("log_det", log_det)
        check_shape("log_det", log_det, z.shape[:1])
    check_same_device(z=z, mean=mean, log_std=log_std, log_det=log_det)
    if not kernel_serves("normal_log_prob", z, mean, log_std):
        return normal_log_prob_reference(z, mean, log_std, log_det=log_det)
    # a parameter of every element is read in the dtype of z, one of the event in the accumulation
    # dtype
    dtype = z.dtype
    for p in (mean, log_std):
        if p is not None and (p.dim() == z.dim() or p.dtype == torch.float64):
            dtype = torch.promote_types(dtype, p.dtype)
    work = accumulation_dtype(dtype)
    mean, log_std = (
        None if p is None else cast(p, dtype if p.dim() == z.dim() else work)
        for p in (mean, log_std)
    )
    out: Tensor = _normal_log_prob(
        cast(z, dtype), mean, log_std, None if log_det is None else cast(log_det, work)
    )
    return out


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    r"""Return :math:`-\log p / (D \log 2)`, a log-likelihood in nats as bits for each dimension.

    Args:
        log_prob: log-likelihoods in nats, of any shape.
        dims: number of dimensions ``D`` of an event.

    Returns:
        Bits per dimension, shaped and typed like ``log_prob``.

    Raises:
        TypeError: for a tensor that is not floating-point, or dims that is not an int.
        ValueError: for dims below 1.

    Source: Theis, van den Oord and Bethge (2016).

    Example:
        >>> import math, torch
        >>> from pyflowkern.ops import bits_per_dim
        >>> bits_per_dim(torch.tensor([-3072 * 8 * math.log(2)]), 3072)
        tensor([8.])
    """
    check_floating("log_prob", log_prob)
    check_count("dims", dims)
    return bits_per_dim_reference(log_prob, dims)


# --- references ----------------------------------------------------------------------------------


def normal_log_prob_reference(
    z: Tensor,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    *,
    log_det: Tensor | None = None,
) -> Tensor:
    """Compute :func:`normal_log_prob` in plain PyTorch, differentiable to any order."""
    dtype = z.dtype
    for p in (mean, log_std):
        dtype = dtype if p is None else torch.promote_types(dtype, p.dtype)
    work = accumulation_dtype(dtype)
    d = z.to(work)
    if mean is not None:
        d = d - mean.to(work)
    if log_std is None:
        total = sum_per_sample(-0.5 * d * d)
    else:
        d = d * torch.exp(-log_std.to(work))
        total = sum_per_sample(-0.5 * d * d - log_std.to(work))
    total = total - 0.5 * math.log(2 * math.pi) * math.prod(z.shape[1:])
    return total if log_det is None else total + log_det.to(work)


def bits_per_dim_reference(log_prob: Tensor, dims: int) -> Tensor:
    """Compute :func:`bits_per_dim`: there is no kernel for one multiplication."""
    return log_prob * (-1.0 / (dims * math.log(2)))


# --- argument checks -----------------------------------------------------------------------------


def _parameter(name: str, p: Tensor | None, z: Tensor) -> Tensor | None:
    """Expand a parameter to the event, or to ``z`` if it has a batch axis of its own."""
    if p is None:
        return None
    check_floating(name, p)
    if p.shape == z.shape or p.shape == z.shape[1:]:
        return p
    try:
        if p.dim() == z.dim() and (p.shape[0] != 1 or z.shape[0] == 1):
            return p.expand(z.shape)
        return (p[0] if p.dim() == z.dim() else p).expand(z.shape[1:])
    except RuntimeError:
        raise ValueError(
            f"{name} must be broadcastable to the event {tuple(z.shape[1:])} or to z of shape "
            f"{tuple(z.shape)}, got {tuple(p.shape)}"
        ) from None


# --- ops -----------------------------------------------------------------------------------------


def _log_prob_fake(
    z: Tensor, mean: Tensor | None, log_std: Tensor | None, log_det: Tensor | None
) -> Tensor:
    return z.new_empty(z.shape[:1], dtype=accumulation_dtype(z.dtype))


def _backward_fake(
    grad: Tensor, z: Tensor, mean: Tensor | None, log_std: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the op does: an empty tensor stands for a gradient that is not wanted."""

    def like(p: Tensor | None, flag: int) -> Tensor:
        if p is None or not wanted & flag:
            return z.new_empty((0,))
        return empty_canonical(z) if p.dim() == z.dim() else p.new_empty(p.shape)

    return like(z, _GRAD_Z), like(mean, _GRAD_MEAN), like(log_std, _GRAD_LOG_STD)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, mean, log_std, log_det = ctx.saved_tensors
    grad_log_det = None if log_det is None else grad
    flags = (_GRAD_Z, _GRAD_MEAN, _GRAD_LOG_STD)
    need = [flag for flag, needed in zip(flags, ctx.needs_input_grad, strict=False) if needed]
    if not need:
        return None, None, None, grad_log_det
    op = torch.ops.pyflowkern.normal_log_prob_backward.default
    grads = op(grad, z, mean, log_std, sum(need))
    return (*(g if f in need else None for g, f in zip(grads, flags, strict=True)), grad_log_det)


_normal_log_prob = register(
    "normal_log_prob(Tensor z, Tensor? mean, Tensor? log_std, Tensor? log_det) -> Tensor",
    fake=_log_prob_fake,
    setup_context=_setup,
    backward=_backward,
    reference=lambda z, mean, log_std, log_det: normal_log_prob_reference(
        z, mean, log_std, log_det=log_det
    ),
    inputs=lambda ctx: ctx.saved_tensors,
)
register(
    "normal_log_prob_backward(Tensor grad, Tensor z, Tensor? mean, Tensor? log_std, int wanted)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
