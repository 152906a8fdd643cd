"""Splines of FrEIA, whose interval is learned, and may be clamped, by ops: rational-quadratic and linear ones."""

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

__all__ = ["BUFFERS", "FACTS", "Domain", "Segments", "domain_of", "segments_of"]

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

    @property
    def numbers(self) -> int:
        """How many raw numbers an element has."""
        return self.map.params

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
            ratio = _ratio(_whole(raw[..., 2 * k], 2 * m.bound), self.clamp)
            return raw, ratio, ratio
        widths, heights, where, inner = raw.split([k, k, 2, k - 1], -1)
        wide, high = (
            _ratio(_sizes(u, 2 * m.bound / k, least).sum(-1), self.clamp)
            for u, least in ((widths, m.min_bin_width), (heights, m.min_bin_height))
        )
        # derivatives at the knots are those within the clamped interval
        slopes = softplus(inner + _inverse(1.0)) * (wide / high)[..., None]
        slopes = slopes.clamp_min(torch.finfo(raw.dtype).tiny)
        inner = slopes + torch.log(-torch.expm1(-slopes)) - _inverse(1.0)
        return torch.cat([widths, heights, where, inner], -1), wide, high

    def _moved(self, raw: Tensor) -> Tensor:
        return raw + raw.new_tensor(self.offsets) if self.offsets else raw


@dataclass(frozen=True)
class Segments:
    r"""A spline that is straight in each bin, over an interval that the raw numbers say.

    The op's linear splines have bins of one width.  With :math:`F_p` the one whose bins take, of the height, the shares
    :math:`p` of [0, 1], one of widths :math:`w` and heights :math:`h` is :math:`F_h \circ F_w^{-1}`, within an affine
    map of each axis to [0, 1].

    Args:
        map: the op's, of widths and of heights: the identity beyond [-1/2, 1/2].
        domain: left, right, bottom and top for raw numbers of 0.
        least: least width and height of a bin, of intervals without identity tails.
        identity: whether both axes have one size, around 0.
        clamp: None for none.
    """

    map: SplineMap
    domain: Sequence[float]
    least: Sequence[float]
    identity: bool
    clamp: float | None = None
    plain = False

    @property
    def numbers(self) -> int:
        """How many raw numbers an element has."""
        return 2 * self.map.bins + (1 if self.identity else 2)

    def run(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Transform ``x [N, ...]`` with raw numbers ``[N, ..., P]``; return values and log-determinants ``[N]``."""
        axes = self._axes(raw)
        (start, size, shares), (low, height, rises) = reversed(axes) if inverse else axes
        at, first = ops.spline((x - start) / size - 0.5, shares, self.map, inverse=True)
        out, second = ops.spline(at, rises, self.map)
        log_det = first + second + (height / size).log().flatten(1).sum(1)
        return low + height * (out + 0.5), log_det

    def _axes(self, raw: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the start and the size of each axis, and raw shares of its bins."""
        k = self.map.bins
        widths, heights, where = raw.split([k, k, self.numbers - 2 * k], -1)
        if self.identity:
            size = _whole(where[..., 0], self.domain[1] - self.domain[0])
            size = size * _ratio(size, self.clamp)
            return [(-size / 2, size, widths), (-size / 2, size, heights)]
        axes = []
        for u, i, start in ((widths, 0, where[..., 1]), (heights, 1, where[..., 0])):
            low, high = self.domain[2 * i : 2 * i + 2]
            sizes = _sizes(u, (high - low) / k, self.least[i])
            whole = sizes.sum(-1)
            ratio = _ratio(whole, self.clamp)
            tiny = torch.finfo(sizes.dtype).tiny  # least sizes may be 0, and softplus underflow
            axes.append((ratio * (start + low), ratio * whole, sizes.clamp_min(tiny).log()))
        return axes


def _inverse(v: float) -> float:
    """Return the number whose softplus is ``v``."""
    return v + math.log(-math.expm1(-v))


def _sizes(raw: Tensor, usual: float, least: float) -> Tensor:
    """Return sizes of bins, which are the usual one for raw numbers of 0."""
    return least + softplus(raw + _inverse(usual - least))


def _whole(raw: Tensor, usual: float) -> Tensor:
    """Return the size of an interval with identity tails."""
    return usual * softplus(raw + _inverse(1.0))


def _ratio(size: Tensor, clamp: float | None) -> Tensor:
    """Return by which factor a clamp makes an interval smaller."""
    return torch.ones_like(size) if clamp is None else clamp * torch.tanh(size / clamp) / size


def _is_known(base: Any, inner: Sequence[str]) -> bool:
    """Whether a BinnedSplineBase has the parameters of a spline, these in each bin, and a clamp that is a number."""
    if not all(isinstance(base._buffers.get(name), Tensor) for name in BUFFERS):
        return False
    where = ["total_width"] if bool(base.identity_tails) else ["bottom", "left"]
    if [*base.parameter_counts] != ["widths", "heights", *where, *inner]:
        return False
    clamp = base.domain_clamping
    if clamp is None:
        return True
    number = isinstance(clamp, (int, float)) and not isinstance(clamp, bool)
    return number and 0 < clamp < math.inf


def segments_of(base: Any) -> Segments | None:
    """Return what the linear spline of a BinnedSplineBase is; None for parameters of another kind."""
    if not _is_known(base, []):
        return None
    try:
        spline_map = SplineMap("linear", bins=int(base.bins), bound=0.5, min_bin_height=0.0)
    except ValueError:  # a number of bins that no kernel has
        return None
    return Segments(
        spline_map,
        tuple(base.default_domain.tolist()),
        tuple(base.min_bin_sizes.tolist()),
        bool(base.identity_tails),
        base.domain_clamping,
    )


def domain_of(base: Any) -> Domain | None:
    """Return what the rational-quadratic spline of a BinnedSplineBase is; None for parameters of another kind."""
    if not _is_known(base, ["deltas"]):
        return None
    identity, clamp = bool(base.identity_tails), base.domain_clamping
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
