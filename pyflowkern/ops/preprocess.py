r"""From bytes to reals and back: uniform dequantization and the logit transform.

Dequantization (Theis, van den Oord and Bethge 2016) spreads each of :math:`2^b` levels over its
own interval,

.. math:: v = (x + u) / 2^b, \quad u \sim U[0, 1), \qquad y = v \ \text{ or }\ y =
\operatorname{logit}(p),

with :math:`p = \alpha + (1 - 2\alpha) v` (Dinh, Sohl-Dickstein and Bengio 2017).  With :math:`q =
1 - p`, computed as :math:`\alpha + (1 - 2\alpha)(1 - v)` so that nothing cancels near :math:`v =
1`,

.. math:: y = \log p - \log q, \quad \log\left|\frac{dy}{dv}\right| = \log(1 - 2\alpha) - \log p -
\log q,
   \quad \bar v = \frac{1 - 2\alpha}{p q} \left(\bar y + (p - q)\,\bar\ell\right).

The noise is Philox4x32-7 (Salmon et al. 2011), keyed by a seed and counted by the element's
index, 16 bits an element: a float32 in [0.5, 1) has no more below the 8 bits of a level.  Hence
``x + u`` is exact, and ``v < 1``. Before a logit the noise stays ``8 * 2^(b-8) / (1 - 2 alpha)``
steps of ``2^-16`` clear of its level's edges, further than the round trip through float32 can move
it: :func:`quantize` returns exactly the bytes that went in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves, transformed
from pyflowkern.core.checks import check_batched, check_dense, check_flag, check_floating
from pyflowkern.core.dtypes import accumulation_dtype, empty_canonical, sum_per_sample
from pyflowkern.core.register import register
from pyflowkern.ops.philox import draw_seed, philox_uint16

__all__ = [
    "dequantize",
    "dequantize_reference",
    "logit",
    "logit_reference",
    "quantize",
    "quantize_reference",
]

_NOISE_BITS = 16
_EDGE_STEPS = 8.0


# --- public functions ----------------------------------------------------------------------------


def dequantize(
    x: Tensor,
    *,
    bits: int = 8,
    alpha: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Turn bytes into reals: :math:`v = (x + u) / 2^b`, then the logit if ``alpha`` is given.

    The result depends on the values, the shape and the seed alone: not on the device, the memory
    format or the number of threads.

    Args:
        x: uint8 ``[N, ...]``, values below ``2**bits`` (on a GPU nobody looks: larger ones give numbers
            without meaning).
        bits: bits of a value, 1 to 8.
        alpha: margin of the logit, in [0, 0.5); None for no logit, ``y = v`` in [0, 1).
        seed: seed of the noise; None draws one from ``generator``.
        generator: where the seed comes from; None is torch's default generator for the device of
            ``x``.

    Returns:
        ``(y, log_det)``: ``y`` float32, shaped like ``x``; ``log_det`` float32 ``[N]`` in nats,
        :math:`\sum -b \log 2`, with the logit's :math:`\log(1-2\alpha) - \log p - \log(1-p)`
        added.

    Raises:
        TypeError: for anything but a uint8 tensor, and for a seed or generator of the wrong type.
        ValueError: for no batch axis, bits or alpha out of range, values of ``2**bits`` and more on the CPU, or
            both a seed and a generator.

    Source: Theis, van den Oord and Bethge (2016); Dinh, Sohl-Dickstein and Bengio (2017).

    Example:
        >>> import torch
        >>> from pyflowkern.ops import dequantize, quantize
        >>> x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
        >>> y, log_det = dequantize(x, alpha=0.05, seed=1)
        >>> y.dtype, bool((quantize(y, alpha=0.05) == x).all())
        (torch.float32, True)
    """
    _check_bytes(x, bits, alpha)
    key = draw_seed(seed, generator, x.device)
    if not kernel_serves("dequantize", x, dtypes=(torch.uint8,)):
        return _dequantize(x, key, bits, alpha)
    out: tuple[Tensor, Tensor] = _dequantize_op(x, key, bits, alpha)
    return out


def quantize(y: Tensor, *, bits: int = 8, alpha: float | None = None) -> Tensor:
    r"""Undo :func:`dequantize`: :math:`\lfloor 2^b v \rfloor` within the levels; nan gives 0.

    Without a logit :math:`v` is ``y``, with one it is :math:`(\sigma(y) - \alpha) / (1 - 2\alpha)`.

    Args:
        y: floating-point tensor of any shape.
        bits: bits of a value, 1 to 8.
        alpha: margin of the logit, as it was given to :func:`dequantize`.

    Returns:
        uint8 tensor shaped like ``y``; equal to the input of :func:`dequantize` for its float32
        output.

    Raises:
        TypeError: for a tensor that is not floating-point.
        ValueError: for bits or alpha out of range.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import quantize
        >>> quantize(torch.tensor([-1.0, 0.5, 2.0, float("nan")]))
        tensor([  0, 128, 255,   0], dtype=torch.uint8)
    """
    check_floating("y", y)
    _check_levels(bits, alpha)
    if not kernel_serves("quantize", y):
        return quantize_reference(y, bits=bits, alpha=alpha)
    out: Tensor = _quantize_op(y.detach(), bits, alpha)
    return out


def logit(x: Tensor, *, alpha: float = 0.0, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Map [0, 1] to the line: :math:`y = \log p - \log(1-p)`, :math:`p = \alpha + (1-2\alpha) x`.

    Args:
        x: input ``[N, ...]``, in [0, 1] for the forward direction; elsewhere the formula says nan
            or inf.
        alpha: margin that keeps ``p`` off 0 and 1, in [0, 0.5).
        inverse: return :math:`x = (\operatorname{sigmoid}(y) - \alpha) / (1 - 2\alpha)` instead.

    Returns:
        ``(y, log_det)``: ``y`` shaped and typed like ``x``; ``log_det`` ``[N]`` in nats, float32
        or float64,
        :math:`\pm\sum \log(1-2\alpha) - \log p - \log(1-p)`.

    Raises:
        TypeError: for a tensor that is not floating-point.
        ValueError: for no batch axis or alpha out of range.

    Source: Dinh, Sohl-Dickstein and Bengio (2017).

    Example:
        >>> import torch
        >>> from pyflowkern.ops import logit
        >>> y, log_det = logit(torch.tensor([[0.5, 0.5]]))
        >>> y, log_det
        (tensor([[0., 0.]]), tensor([2.7726]))
    """
    inverse = check_flag("inverse", inverse)
    check_batched("x", x, min_dim=1)
    _check_alpha(alpha)
    if not kernel_serves("logit", x):
        return logit_reference(x, alpha=alpha, inverse=inverse)
    out: tuple[Tensor, Tensor] = _logit_op(x, alpha, inverse)
    return out


# --- references ----------------------------------------------------------------------------------


def dequantize_reference(
    x: Tensor,
    *,
    bits: int = 8,
    alpha: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`dequantize` in plain PyTorch, with the same noise bit for bit."""
    _check_bytes(x, bits, alpha)
    return _dequantize(x, draw_seed(seed, generator, x.device), bits, alpha)


def quantize_reference(y: Tensor, *, bits: int = 8, alpha: float | None = None) -> Tensor:
    """Compute :func:`quantize` in plain PyTorch."""
    v = y.detach().to(accumulation_dtype(y.dtype))
    if alpha is not None:
        v = (torch.sigmoid(v) - alpha) / (1 - 2 * alpha)
    level = torch.floor(v * 2**bits).clamp(0, 2**bits - 1)
    return torch.nan_to_num(level, nan=0.0).to(torch.uint8)


def logit_reference(
    x: Tensor, *, alpha: float = 0.0, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute :func:`logit` in plain PyTorch, differentiable by autograd to any order."""
    inverse = check_flag("inverse", inverse)
    v = x.to(accumulation_dtype(x.dtype))
    width = 1 - 2 * alpha
    if inverse:
        log_p, log_q = torch.nn.functional.logsigmoid(v), torch.nn.functional.logsigmoid(-v)
        y, slope = (torch.sigmoid(v) - alpha) / width, log_p + log_q - math.log(width)
    else:
        log_p, log_q = torch.log(alpha + width * v), torch.log(alpha + width * (1 - v))
        y, slope = log_p - log_q, math.log(width) - log_p - log_q
    return y.to(x.dtype), sum_per_sample(slope)


def _dequantize(x: Tensor, seed: Tensor, bits: int, alpha: float | None) -> tuple[Tensor, Tensor]:
    noise = philox_uint16(seed, x.numel()).view(x.shape)
    if alpha is not None:
        edge = _edge_steps(bits, alpha)
        noise = noise.clamp(edge, 2**_NOISE_BITS - 1 - edge)
    # at most 24 bits: the conversion and the power of two are exact
    v = (x.to(torch.int64) * 2**_NOISE_BITS + noise).to(torch.float32) * 2.0 ** -(
        _NOISE_BITS + bits
    )
    size = x.numel() // x.shape[0] if x.shape[0] else 0
    log_det = torch.full(
        (x.shape[0],), -size * bits * math.log(2), dtype=torch.float32, device=x.device
    )
    if alpha is None:
        return v, log_det
    y, slope = logit_reference(v, alpha=alpha)
    return y, slope + log_det


def _edge_steps(bits: int, alpha: float) -> int:
    """Return how many noise steps of ``2^-16`` to stay away from a level's edges, if a logit follows."""
    steps = math.ldexp(_EDGE_STEPS, bits - 8) / (1 - 2 * alpha)
    return min(math.ceil(steps), (1 << (_NOISE_BITS - 1)) - 1)


# --- argument checks -----------------------------------------------------------------------------


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha must be a float, got {type(alpha).__name__}")
    if not 0 <= alpha < 0.5:
        raise ValueError(f"alpha must be in [0, 0.5), got {alpha}")


def _check_levels(bits: int, alpha: float | None) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int, got {type(bits).__name__}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if alpha is not None:
        _check_alpha(alpha)


def _check_bytes(x: Tensor, bits: int, alpha: float | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != torch.uint8:
        raise TypeError(f"x must be a torch.uint8 tensor, got {x.dtype}")
    check_dense("x", x)
    if x.dim() < 1:
        raise ValueError("x must have a batch axis, got a scalar")
    _check_levels(bits, alpha)
    # a byte beyond its bits would give a finite number that means nothing; on a GPU looking would wait for it
    look = bits < 8 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and x.numel() and type(x) is Tensor and not transformed():
        largest = int(x.max())
        if largest >= 2**bits:
            raise ValueError(f"x must hold values below 2^bits = {2**bits}, got {largest}")


# --- ops -----------------------------------------------------------------------------------------


def _dequantize_fake(
    x: Tensor, seed: Tensor, bits: int, alpha: float | None
) -> tuple[Tensor, Tensor]:
    return empty_canonical(x, torch.float32), x.new_empty(x.shape[:1], dtype=torch.float32)


def _quantize_fake(y: Tensor, bits: int, alpha: float | None) -> Tensor:
    return empty_canonical(y, torch.uint8)


def _logit_fake(x: Tensor, alpha: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return empty_canonical(x), x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _logit_backward_fake(
    grad_y: Tensor, grad_log_det: Tensor, x: Tensor, alpha: float, inverse: bool
) -> Tensor:
    return empty_canonical(x)


def _logit_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.alpha, ctx.inverse = inputs
    ctx.save_for_backward(x)


def _logit_backward(
    ctx: Any, grad_y: Tensor, grad_log_det: Tensor
) -> tuple[Tensor | None, None, None]:
    (x,) = ctx.saved_tensors
    grad: Tensor = torch.ops.pyflowkern.logit_backward.default(
        grad_y, grad_log_det, x, ctx.alpha, ctx.inverse
    )
    return grad, None, None


_dequantize_op = register(
    "dequantize(Tensor x, Tensor seed, int bits, float? alpha) -> (Tensor, Tensor)",
    fake=_dequantize_fake,
)
_quantize_op = register(
    "quantize(Tensor y, int bits, float? alpha) -> Tensor", fake=_quantize_fake
)
_logit_op = register(
    "logit(Tensor x, float alpha, bool inverse) -> (Tensor, Tensor)",
    fake=_logit_fake,
    setup_context=_logit_setup,
    backward=_logit_backward,
    reference=lambda x, alpha, inverse: logit_reference(x, alpha=alpha, inverse=inverse),
    inputs=lambda ctx: (*ctx.saved_tensors, ctx.alpha, ctx.inverse),
)
register(
    "logit_backward(Tensor grad_y, Tensor grad_log_det, Tensor x, float alpha, bool inverse)"
    " -> Tensor",
    fake=_logit_backward_fake,
)
