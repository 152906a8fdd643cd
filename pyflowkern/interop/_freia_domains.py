"""Rational-quadratic splines of FrEIA, whose interval is learned, and may be clamped, by ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyflowkern import ops
from pyflowkern.ops import SplineMap

__all__ = ["BUFFERS", "FACTS", "Domain", "domain_of"]

#: What a spline follows from.
BUFFERS = ("bins", "min_bin_sizes", "default_domain", "identity_tails", "default_width")
FACTS = ("domain_clamping", "parameter_counts")


@dataclass(frozen=True)
class Domain:
    r"""A spline over an interval that the raw numbers say.

    An interval that is clamped is :math:`r` times one that is not, so that the spline is :math:`r_y S(x / r_x)`, with
    :math:`r = c \tanh(w / c) / w` of the width :math:`w` (for :math:`r_y` the height) and the clamp :math:`c`.

    Args:
        map: the op's, over a square interval that is not clamped.
        offsets: what is added to the raw numbers of an element for another interval; empty for nothing.
        clamp: None for none.
    """

    map: SplineMap
    offsets: Sequence[float] = ()
    clamp: float | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the op's map, and no more."""
        return not self.offsets and self.clamp is None

    def run(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Transform ``x [N, ...]`` with raw numbers ``[N, ..., P]``; return values and log-determinants ``[N]``."""
        if self.clamp is None:
            return ops.spline(x, self._moved(raw), self.map, inverse=inverse)
        raw, wide, high = self.unclamped(raw)
        before, after = (high, wide) if inverse else (wide, high)
        y, log_det = ops.spline(x / before, raw, self.map, inverse=inverse)
        if wide is not high:
            more = (high / wide).log().flatten(1).sum(1)
            log_det = log_det - more if inverse else log_det + more
        return y * after, log_det

    def unclamped(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return raw numbers of the op's map, and by which factors the interval is narrower and lower than there."""
        raw, m, k = self._moved(raw), self.map, self.map.bins
        if m.tails == "linear":
            ratio = self._ratio(2 * m.bound * softplus(raw[..., 2 * k] + _inverse(1.0)))
            return raw, ratio, ratio
        widths, heights, where, inner = raw.split([k, k, 2, k - 1], -1)
        wide, high = (
            self._ratio((least + softplus(u + _inverse(2 * m.bound / k - least))).sum(-1))
            for u, least in ((widths, m.min_bin_width), (heights, m.min_bin_height))
        )
        # derivatives at the knots are those within the clamped interval
        slopes = softplus(inner + _inverse(1.0)) * (wide / high)[..., None]
        slopes = slopes.clamp_min(torch.finfo(raw.dtype).tiny)
        inner = slopes + torch.log(-torch.expm1(-slopes)) - _inverse(1.0)
        return torch.cat([widths, heights, where, inner], -1), wide, high

    def _moved(self, raw: Tensor) -> Tensor:
        return raw + raw.new_tensor(self.offsets) if self.offsets else raw

    def _ratio(self, size: Tensor) -> Tensor:
        return (
            torch.ones_like(size)
            if self.clamp is None
            else self.clamp * torch.tanh(size / self.clamp) / size
        )


def _inverse(v: float) -> float:
    """Return the number whose softplus is ``v``."""
    return v + math.log(-math.expm1(-v))


def domain_of(base: Any) -> Domain | None:
    """Return what the spline of a BinnedSplineBase is; None for parameters of another kind."""
    if not all(isinstance(base._buffers.get(name), Tensor) for name in BUFFERS):
        return None
    identity, clamp = bool(base.identity_tails), base.domain_clamping
    names = ["widths", "heights", *(["total_width"] if identity else ["bottom", "left"]), "deltas"]
    if [*base.parameter_counts] != names:
        return None
    if clamp is not None and (isinstance(clamp, bool) or not isinstance(clamp, (int, float))):
        return None
    if clamp is not None and not 0 < clamp < math.inf:
        return None
    try:
        if identity:
            return Domain(_map(base, float(base.default_width) / 2), (), clamp)
        return _affine(base, clamp)
    except ValueError:  # a number of bins, for one, that no kernel has
        return None


def _affine(base: Any, clamp: float | None) -> Domain:
    left, right, bottom, top = base.default_domain.tolist()
    bins, least = int(base.bins), base.min_bin_sizes.tolist()
    bound = max(right - left, top - bottom) / 2
    spline_map = _map(base, bound)
    sizes = [
        [_inverse(size / bins - small) - _inverse(2 * bound / bins - small)] * bins
        for size, small in zip((right - left, top - bottom), least, strict=True)
    ]
    offsets = [*sizes[0], *sizes[1], bottom + bound, left + bound, *[0.0] * (bins - 1)]
    return Domain(spline_map, tuple(offsets) if any(offsets) else (), clamp)


def _map(base: Any, bound: float) -> SplineMap:
    identity = bool(base.identity_tails)
    width, height = base.min_bin_sizes.tolist()
    return SplineMap(
        bins=int(base.bins),
        bound=bound,
        tails="linear" if identity else "affine",
        min_bin_width=0.0 if identity else width,
        min_bin_height=0.0 if identity else height,
        min_derivative=0.0,
        parameterization="domain",
    )
