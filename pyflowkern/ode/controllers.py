"""Step sizes: the scaled error, the first step size and the next one (Hairer, Norsett and Wanner, 1993, II.4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "SAFETY",
    "Scaling",
    "first_step",
    "first_steps",
    "next_factor",
    "next_factors",
]

Tolerance = float | Tensor
SAFETY, LARGEST, SMALLEST = 0.9, 10.0, 0.2  # Hairer, Norsett and Wanner (1993), II.4


class Scaling:
    """``error / (atol + rtol max(|y|, |y1|))``, and NaN where ``y1`` is not finite.

    Its memory is reused from step to step: for large states, allocating would cost more than the arithmetic.

    Args:
        like: a state.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """

    def __init__(self, like: Tensor, rtol: Tolerance, atol: Tolerance) -> None:
        self.rtol, self.atol = rtol, atol
        self.a, self.b = torch.empty_like(like), torch.empty_like(like)

    def __call__(self, error: Tensor, y: Tensor, y1: Tensor) -> Tensor:
        """Return the scaled error in memory that the next call overwrites."""
        torch.abs(y, out=self.a)
        torch.abs(y1, out=self.b)
        scale = torch.maximum(self.a, self.b, out=self.a).mul_(self.rtol).add_(self.atol)
        torch.sub(y1, y1, out=self.b)
        return torch.addcdiv(self.b, error, scale, out=self.b)


# --- one step size for the whole state: Python numbers -------------------------------------------


def first_step(
    norms: tuple[Tensor, Tensor], change: Callable[[float], Tensor], order: int
) -> float:
    """Return a first step by the algorithm of Hairer, Norsett and Wanner (1993), II.4.

    Args:
        norms: scaled norms of the first state and of its slope.
        change: from the length of an Euler step, the scaled norm of the change of the slope over that step.
        order: of the method.
    """
    d0, d1 = (float(norm) for norm in norms)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    if not (math.isfinite(h0) and h0 > 0):
        return 1e-6
    d2 = float(change(h0)) / h0
    if not math.isfinite(d2):
        return h0
    largest = max(d1, d2)
    h1: float = max(1e-6, 1e-3 * h0) if largest <= 1e-15 else (0.01 / largest) ** (1 / order)
    return min(100 * h0, h1)


def next_factor(ratio: float, order: int) -> float:
    """Return the factor from a step's size to the next one's, given the norm of the step's scaled error."""
    if ratio == 0:
        return LARGEST
    if not math.isfinite(ratio):
        return SMALLEST
    factor: float = SAFETY / ratio ** (1 / order)
    return min(LARGEST, max(factor, 1.0 if ratio < 1 else SMALLEST))


# --- a step size for each sample: tensors --------------------------------------------------------


def first_steps(
    norms: tuple[Tensor, Tensor], change: Callable[[Tensor], Tensor], order: int
) -> Tensor:
    """Return :func:`first_step` for each sample, without waiting for the device."""
    d0, d1 = norms
    small = torch.full_like(d0, 1e-6)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), small, 0.01 * d0 / d1)
    h0 = torch.where(torch.isfinite(h0) & (h0 > 0), h0, small)
    d2 = change(h0) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(
        largest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / largest) ** (1 / order)
    )
    return torch.where(torch.isfinite(d2 + h1), torch.minimum(100 * h0, h1), h0)


def next_factors(ratio: Tensor, order: int) -> Tensor:
    """Return :func:`next_factor` for each sample."""
    least = torch.where(ratio < 1, torch.ones_like(ratio), torch.full_like(ratio, SMALLEST))
    factor = torch.maximum(SAFETY * ratio ** (-1 / order), least).clamp(max=LARGEST)
    return torch.where(torch.isfinite(ratio), factor, torch.full_like(ratio, SMALLEST))
