r"""The sums over the stages of a Runge-Kutta step: the next argument, and the norm of the error.

With slopes :math:`k_i`, weights :math:`w_i` and :math:`e_i` of a tableau and a step :math:`h`,

.. math::
    y + h \sum_i w_i k_i, \qquad
    \Big(\frac1n \sum_j r_j^2\Big)^{1/2}, \quad
    r = \frac{h \sum_i e_i k_i}{\text{atol} + \text{rtol} \max(|y|, |y_1|)},

each in one pass that reads every slope once.  Inside a solver the slope that came last is put into its row of the
buffer by the pass that needs it first (the ops ``rk_stage`` and ``rk_last``).

The combination is linear, :math:`\bar y = g`, :math:`\bar k_i = h w_i g`, :math:`\bar h = \sum g \cdot \sum_i w_i k_i`;
the norm decides about step sizes and has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import check_floating, check_list, check_number, check_same_device
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.core.register import register
from pyflowkern.core.second_derivatives import gradient_of_reference

__all__ = [
    "MAX_SEGMENTS",
    "MAX_SLOPES",
    "rk_combine",
    "rk_combine_reference",
    "rk_error",
    "rk_error_reference",
]

STATES = (torch.float32, torch.float64)
#: What the kernels take: weights that are not zero, and sizes.
MAX_SLOPES, MAX_SEGMENTS = 32, 15


# --- public functions ----------------------------------------------------------------------------


def rk_combine(
    y: Tensor, slopes: Tensor, weights: Sequence[float], step: float | Tensor
) -> Tensor:
    r"""Return :math:`y + h \sum_i w_i k_i`.

    Args:
        y: state, of any shape.
        slopes: ``[stages, *y.shape]``; the first ``len(weights)`` count, and a weight of zero leaves its slope unread.
        weights: of the slopes, at most ``stages``.
        step: signed length :math:`h`: a number, a 0-d tensor, or ``[N]`` with one for each row of ``y``.

    Returns:
        Shaped and typed like ``y``.

    Raises:
        TypeError: for tensors that are not floating-point, slopes of another dtype.
        ValueError: for slopes or steps that do not fit ``y``, more weights than slopes, and different devices.

    Source: Hairer, Norsett and Wanner (1993), II.1.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import rk_combine
        >>> rk_combine(torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (0.5, 0.5), 0.1)
        tensor([1.2000, 1.3000])
    """
    step = _check(y, slopes, weights, step)
    if not _serves("rk_combine", y, weights):
        return rk_combine_reference(y, slopes, weights, step)
    number, steps = _step(step)
    out: Tensor = _rk_combine(y, slopes, _host(weights), number, steps)
    return out


@torch.no_grad()
def rk_error(
    y: Tensor,
    y1: Tensor,
    slopes: Tensor,
    weights: Sequence[float],
    step: float | Tensor,
    *,
    rtol: float,
    atol: float,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    r"""Return the root of the mean square of an estimated error over what is allowed.

    .. math::
        \Big(\frac1n \sum_j r_j^2\Big)^{1/2}, \qquad
        r = \frac{h \sum_i e_i k_i}{\text{atol} + \text{rtol} \max(|y|, |y_1|)} .

    Args:
        y: state at the start of the step.
        y1: state at its end; where one of the two is not finite the norm is NaN.
        slopes: ``[stages, *y.shape]``, as in :func:`rk_combine`.
        weights: of the error: those of the step less those of the embedded method.
        step: signed length; with ``[N]`` every row of ``y`` has a norm of its own.
        rtol: allowed error relative to the state.
        atol: allowed absolute error.
        sizes: of segments of the state (of each row) laid end to end, whose largest norm is taken; elements beyond
            their sum have no part.  Default: one segment.

    Returns:
        0-d or ``[N]``, float64, without gradient.  The order of summation does not depend on the number of threads.

    Raises:
        TypeError: for tensors that are not floating-point, or of different dtypes.
        ValueError: as :func:`rk_combine`, for negative tolerances and sizes that do not fit.

    Source: Hairer, Norsett and Wanner (1993), II.4.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import rk_error
        >>> y, slopes = torch.zeros(2), torch.tensor([[1.0, 1.0], [0.9, 1.1]])
        >>> rk_error(y, y, slopes, (-1.0, 1.0), 0.1, rtol=0.0, atol=1e-3)
        tensor(10.0000, dtype=torch.float64)
    """
    step = _check(y, slopes, weights, step)
    check_floating("y1", y1)
    if y1.dtype != y.dtype:
        raise TypeError(f"y1 must have the dtype of y, {y.dtype}, got {y1.dtype}")
    if y1.shape != y.shape:
        raise ValueError(f"y1 must have the shape of y, {tuple(y.shape)}, got {tuple(y1.shape)}")
    check_same_device(y=y, y1=y1)
    rtol, atol = check_number("rtol", rtol), check_number("atol", atol)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    segments = _check_sizes(sizes, math.prod(y.shape[1:] if _rows(step) else y.shape))
    if not _serves("rk_error", y, weights) or len(segments) > MAX_SEGMENTS:
        return rk_error_reference(
            y, y1, slopes, weights, step, rtol=rtol, atol=atol, sizes=segments
        )
    number, steps = _step(step)
    out: Tensor = _rk_error(y, y1, slopes, _host(weights), number, steps, rtol, atol, segments)
    return out


# --- references ----------------------------------------------------------------------------------


def rk_combine_reference(
    y: Tensor, slopes: Tensor, weights: Sequence[float], step: float | Tensor
) -> Tensor:
    """Compute :func:`rk_combine` in plain PyTorch, differentiable to any order."""
    return (y + _change(y, slopes, weights, step)).to(y.dtype)


def rk_error_reference(
    y: Tensor,
    y1: Tensor,
    slopes: Tensor,
    weights: Sequence[float],
    step: float | Tensor,
    *,
    rtol: float,
    atol: float,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Compute :func:`rk_error` in plain PyTorch."""
    y, y1 = (t.to(accumulation_dtype(t.dtype)) for t in (y, y1))
    scale = atol + rtol * torch.maximum(y.abs(), y1.abs())
    r = (_change(y, slopes, weights, step) / scale + (y1 - y1) + (y - y)).double()
    rows = _rows(step)
    lead = len(r) if rows else 1
    r = r.reshape(lead, r.numel() // max(lead, 1))
    parts = r.split([*sizes, r.shape[1] - sum(sizes)], 1)[:-1] if sizes else (r,)
    norms = [p.square().sum(1).div(max(p.shape[1], 1)).sqrt() for p in parts]
    largest = torch.stack(norms).amax(0)
    return largest if rows else largest[0]


def _change(
    like: Tensor, slopes: Tensor, weights: Tensor | Sequence[float], step: float | Tensor
) -> Tensor:
    """Return ``h sum_i w_i k_i``, of halves in float32; a slope of weight zero is not read."""
    work = accumulation_dtype(like.dtype)
    like, slopes = like.to(work), slopes.to(work)
    w = weights if isinstance(weights, Tensor) else _host(weights)
    w = w.to(like).view(-1, *[1] * like.dim())
    total = torch.where(w == 0, 0.0, w * slopes[: len(w)]).sum(0)
    return total * (_column(step, like) if isinstance(step, Tensor) else step)


def _column(step: Tensor, y: Tensor) -> Tensor:
    """Return a step in the dtype of the state, one for each row as a column."""
    return step.to(y.dtype).view([*step.shape, *[1] * (y.dim() - 1)] if step.dim() else [])


# --- argument checks -----------------------------------------------------------------------------


def _check(
    y: Tensor, slopes: Tensor, weights: Sequence[float], step: float | Tensor
) -> float | Tensor:
    """Raise unless the arguments fit; return the step, a float unless it is a tensor."""
    check_floating("y", y)
    check_floating("slopes", slopes)
    check_same_device(y=y, slopes=slopes, step=step if isinstance(step, Tensor) else None)
    if slopes.dtype != y.dtype:
        raise TypeError(f"slopes must have the dtype of y, {y.dtype}, got {slopes.dtype}")
    if slopes.shape[1:] != y.shape or slopes.dim() == 0:
        raise ValueError(
            f"slopes must have shape [stages, *{tuple(y.shape)}], got {tuple(slopes.shape)}"
        )
    check_list("weights", weights)
    for i, weight in enumerate(weights):
        check_number(f"weights[{i}]", weight)
    if len(weights) > slopes.shape[0]:
        raise ValueError(f"weights must be at most {slopes.shape[0]}, got {len(weights)}")
    if isinstance(step, Tensor):
        check_floating("step", step)
        if step.dim() > 0 and step.shape != y.shape[:1]:
            raise ValueError(
                "step must be a number, a 0-d tensor, or one for each row of y, "
                f"{tuple(y.shape[:1])}, got shape {tuple(step.shape)}"
            )
        return step
    return check_number("step", step)


def _check_sizes(sizes: Sequence[int] | None, most: int) -> list[int]:
    counts = [] if sizes is None else [int(n) for n in sizes]
    if any(n < 0 for n in counts) or sum(counts) > most:
        raise ValueError(f"sizes must be at least 0, at most {most} together, got {counts}")
    return counts


def _rows(step: float | Tensor) -> bool:
    return isinstance(step, Tensor) and step.dim() == 1


def _step(step: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, step.double()) if isinstance(step, Tensor) else (float(step), None)


def _host(weights: Sequence[float]) -> Tensor:
    return torch.tensor([float(w) for w in weights], dtype=torch.float64, device="cpu")


def _serves(op: str, y: Tensor, weights: Sequence[float]) -> bool:
    most = sum(w != 0 for w in weights)
    return most <= MAX_SLOPES and kernel_serves(op, y, dtypes=STATES)


# --- ops -----------------------------------------------------------------------------------------


def _combine_fake(
    y: Tensor, slopes: Tensor, weights: Tensor, step: float, steps: Tensor | None
) -> Tensor:
    return y.new_empty(y.shape)


def _stage_fake(
    slopes: Tensor,
    slope: Tensor,
    row: int,
    y: Tensor,
    weights: Tensor,
    step: float,
    steps: Tensor | None,
) -> Tensor:
    return y.new_empty(y.shape)


def _error_fake(
    y: Tensor,
    y1: Tensor,
    slopes: Tensor,
    weights: Tensor,
    step: float,
    steps: Tensor | None,
    rtol: float,
    atol: float,
    sizes: Sequence[int],
) -> Tensor:
    return y.new_empty(() if steps is None else steps.shape, dtype=torch.float64)


def _last_fake(slopes: Tensor, slope: Tensor, row: int, *args: Any) -> Tensor:
    y, y1, *rest = args
    return _error_fake(y, y1, slopes, *rest)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, slopes, weights, ctx.step, steps = inputs
    ctx.save_for_backward(slopes, weights, steps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slopes, weights, steps = ctx.saved_tensors

    def change(slopes: Tensor, steps: Tensor | None) -> Tensor:
        return _change(grad, slopes, weights, ctx.step if steps is None else steps)

    grad_slopes, grad_steps = gradient_of_reference(change, (slopes, steps), (grad,))
    return grad, grad_slopes, None, None, grad_steps


_rk_combine = register(
    "rk_combine(Tensor y, Tensor slopes, Tensor weights, float step, Tensor? steps) -> Tensor",
    fake=_combine_fake,
    backward=_backward,
    setup_context=_setup,
)


def below_autograd(*inputs: Any) -> Tensor:
    """Call ``rk_combine`` where no gradient is wanted, unchecked."""
    with torch._C._AutoDispatchBelowAutograd():
        out: Tensor = torch.ops.pyflowkern.rk_combine.default(*inputs)
    return out


_rk_error = register(
    "rk_error(Tensor y, Tensor y1, Tensor slopes, Tensor weights, float step, Tensor? steps,"
    " float rtol, float atol, int[] sizes) -> Tensor",
    fake=_error_fake,
)
# the same, and the slope is put into its row: (slopes, slope, row, the others ...)
register(
    "rk_stage(Tensor(a!) slopes, Tensor slope, int row, Tensor y, Tensor weights, float step,"
    " Tensor? steps) -> Tensor",
    fake=_stage_fake,
)
register(
    "rk_last(Tensor(a!) slopes, Tensor slope, int row, Tensor y, Tensor y1, Tensor weights,"
    " float step, Tensor? steps, float rtol, float atol, int[] sizes) -> Tensor",
    fake=_last_fake,
)
