"""Where the data of a flow lie: intervals, circles and pixels; what lies elsewhere has no density."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.core.checks import check_number

__all__ = ["Domain", "PixelDomain", "rounded_ends", "without_density"]


def rounded_ends(low: float, high: float) -> tuple[float, float]:
    """Return the ends, moved outwards to float32 where that rounds them outwards.

    Data that went through float32 may lie a rounding beyond an end: float32's pi is above pi.
    """
    return min(low, _float32(low)), max(high, _float32(high))


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@dataclass(frozen=True)
class Domain:
    """The interval that each element of ``x`` lies in; the ends of a periodic one are the same point."""

    low: float
    high: float
    periodic: bool = False

    def __post_init__(self) -> None:
        for end in self.ends:
            check_number("domain", end)
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"domain must be (low, high) with low < high, got {self.ends}")

    @classmethod
    def between(cls, ends: tuple[float, float], periodic: bool) -> Domain:
        """Return the domain with these ends; raise TypeError unless they are two."""
        if not isinstance(ends, (tuple, list)) or len(ends) != 2:
            raise TypeError(f"domain must be a pair of numbers, got {ends!r}")
        return cls(*ends, periodic)

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def outside(self, x: Tensor) -> Tensor:
        """Return which elements have no density; NaN is neither inside nor outside."""
        low, high = rounded_ends(*self.ends)
        return (x < low) | (x > high)

    def keep_inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` with the middle in place of elements outside, and which samples ``[N]`` have such.

        With the middle, values outside make no NaN or inf in a network.
        """
        outside = self.outside(x)
        x = x.masked_fill(outside, (self.low + self.high) / 2)
        if x.dtype == torch.float64 and rounded_ends(*self.ends) != self.ends:
            length = (self.high - self.low) if self.periodic else 0.0
            x = torch.where(x > self.high, (x - length).clamp(self.low, self.high), x)
            x = torch.where(x < self.low, (x + length).clamp(self.low, self.high), x)
        return x, outside.flatten(1).any(1)

    def hint(self, x: Tensor) -> str:
        """Return what may help where data lie outside."""
        if self.periodic:
            low, length = self.low, self.high - self.low
            return (
                f"angles may be wrapped: low + torch.remainder(x - low, length) with low = {low:.6g} and "
                f"length = {length:.6g}"
            )
        return "rescale the data, or choose a flow on the real line"


@dataclass(frozen=True)
class PixelDomain(Domain):
    r"""Where pixels may lie that a logit with margin ``alpha`` takes: :math:`0 < \alpha + (1 - 2\alpha) x < 1`.

    At the ends of it the density falls to 0.
    """

    alpha: float = 0.0

    @classmethod
    def of(cls, alpha: float) -> PixelDomain:
        """Return the domain of a margin: ``[0, 1]`` and what the margin adds on both sides."""
        margin = alpha / (1 - 2 * alpha)
        return cls(-margin, 1 + margin, alpha=alpha)

    def outside(self, x: Tensor) -> Tensor:
        """Return which elements have no density, the ends among them."""
        # the logit's argument must stay positive, also after rounding
        slack = 4 * self.alpha * torch.finfo(x.dtype).eps
        return (x <= self.low + slack) | (1 - x <= self.low + slack)

    def hint(self, x: Tensor) -> str:
        """Return what may help where data lie outside."""
        return "give integer pixels as uint8, or divide them by 2^bits"


def without_density(outside: Tensor | None, log_prob: Tensor) -> Tensor:
    """Return the log-densities with -inf for the samples outside; NaN stays, which is unknown and not impossible."""
    if outside is None:
        return log_prob
    return log_prob.masked_fill(outside & ~log_prob.isnan(), -math.inf)
