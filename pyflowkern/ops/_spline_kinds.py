r"""Splines in plain PyTorch, element by element, differentiable to any order.

In a bin of width :math:`w` and height :math:`h` with end derivatives :math:`d_0, d_1`, slope :math:`s = h / w` and
position :math:`\xi = (x - x_k) / w`, :math:`\zeta = 1 - \xi`, :math:`t = \xi \zeta`, all terms positive,

.. math::
    y = y_k + h \frac{s \xi^2 + d_0 t}{D}, \quad
    f' = s^2 \frac{d_1 \xi^2 + 2 s t + d_0 \zeta^2}{D^2}, \quad D = s (\xi^2 + \zeta^2) + (d_0 + d_1) t .

The inverse with :math:`\eta = (y - y_k) / h` solves a quadratic whose discriminant is a sum of squares: with
:math:`m = d_0 (1 - \eta) - d_1 \eta` and :math:`r^2 = m^2 + 4 s^2 \eta (1 - \eta)`,

.. math::
    \xi = \frac{2 s \eta}{m + r + 2 s \eta} \;(m \ge 0), \qquad
    \zeta = \frac{2 s (1 - \eta)}{-m + r + 2 s (1 - \eta)} \;(m < 0),

so that nothing cancels and nothing needs a clamp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.activations import softplus
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["SPLINES", "Pair", "Spline", "rounded_into"]

Pair = tuple[Tensor, Tensor]
Parts = tuple[Tensor, Tensor, Tensor]  # raw widths, heights and derivatives


class Spline(NamedTuple):
    """A spline of each element, its parameters known."""

    left: Tensor
    right: Tensor  # the ends of the interval of x
    bottom: Tensor
    top: Tensor  # and of y
    end_slopes: Pair | None  # at the ends, for affine tails
    within: Callable[
        [Tensor, bool], Pair
    ]  # of x, or of y for the inverse: the other one, and log f'(x)


# --- what all kinds share -----------------------------------------------------------------------------------


def rounded_into(v: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Bring values that rounding took out of ``[low, high]`` back; their derivatives stay what they are.

    ``clamp`` would halve or cut the derivative at the ends, where nothing but a rounding error is beyond them.
    """
    bounded = torch.where(v < low, low, torch.where(v > high, high, v)).detach()
    finite = torch.where(v.isinf(), 0.0, v)
    return bounded + (
        finite - finite.detach()
    )  # detach() also stops forward-mode derivatives; no_grad does not


def _shares(raw: Tensor, m: SplineMap, least: float) -> Tensor:
    share = torch.softmax(m.scale * raw, -1)
    return least + (1 - least * raw.shape[-1]) * share


def _knots(sizes: Tensor, low: Tensor, high: Tensor | None = None) -> Tensor:
    """Return the ends of bins that lie side by side from ``low`` to, if it is known better, ``high``."""
    knots = low + sizes.cumsum(-1)
    if high is not None:
        knots = torch.cat([knots[..., :-1], high], -1)
    return torch.cat([low, knots], -1)


def _bin(v: Tensor, knots: Tensor) -> Tensor:
    """Return the index of the bin of each element (of NaN, the first), with a last axis of size 1."""
    return (v.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)


def _place(v: Tensor, start: Tensor, end: Tensor, size: Tensor) -> Pair:
    """Return where in its bin an element lies, as a share of the bin from its start and from its end.

    It is measured from the nearer end, in units of the size itself: the difference of two knots may be 0 by rounding.
    """
    from_start = rounded_into((v - start) / size, 0.0, 1.0)
    from_end = rounded_into((end - v) / size, 0.0, 1.0)
    near = from_start < from_end
    return torch.where(near, from_start, 1 - from_end), torch.where(near, 1 - from_start, from_end)


def _size(size: Tensor) -> Tensor:
    """Return sizes that underflow made 0 as the least number."""
    return size.clamp_min(torch.finfo(size.dtype).tiny)


def _slope(slope: Tensor) -> Tensor:
    """Keep slopes where twice their reciprocal, and sums of a few, are finite."""
    most = 1e37 if slope.dtype == torch.float32 else 1e307
    return slope.clamp(1 / most, most)


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index).squeeze(-1)


def _ends(m: SplineMap, like: Tensor) -> Pair:
    low, high = m.interval
    one = torch.ones_like(like[..., :1])
    return low * one, high * one


# --- rational-quadratic -------------------------------------------------------------------------------------


def _rational_quadratic(parts: Parts, m: SplineMap) -> Spline:
    learned = m.parameterization == "domain"
    (xs, ws), (ys, hs), d = _domain(*parts, m) if learned else _fixed(*parts, m)

    def within(v: Tensor, inverse: bool) -> Pair:
        k = _bin(v, ys if inverse else xs)
        x0, x1, y0, y1, d0, d1 = (_take(t, k + i) for t in (xs, ys, d) for i in (0, 1))
        w, h = _size(_take(ws, k)), _size(_take(hs, k))
        s = _slope(h / w)
        if inverse:
            return _rational_inverse(*_place(v, y0, y1, h), x0, x1, w, s, d0, d1)
        return _rational_forward(*_place(v, x0, x1, w), y0, y1, h, s, d0, d1)

    end_slopes = (d[..., 0], d[..., -1]) if m.tails == "affine" else None
    return Spline(xs[..., 0], xs[..., -1], ys[..., 0], ys[..., -1], end_slopes, within)


def _fixed(
    widths: Tensor, heights: Tensor, raw: Tensor, m: SplineMap
) -> tuple[Pair, Pair, Tensor]:
    """Return knots and sizes of widths and of heights, and derivatives, over an interval that is not learned."""
    low, high = _ends(m, widths)
    if m.parameterization == "softclip":
        clip = -math.log(m.min_derivative)
        widths, heights = (u / (1 + (2 / clip * u).abs()) for u in (widths, heights))
        d = torch.exp(raw / (1 + (raw / clip).abs()))
        least = 0.0, 0.0
    else:
        d = m.min_derivative + softplus(raw)
        least = m.min_bin_width, m.min_bin_height
    if m.tails == "linear":
        one = torch.ones_like(low)
        d = torch.cat([one, d, one], -1)
    elif m.tails == "circular":
        d = torch.cat([d, d[..., :1]], -1)
    ws, hs = (
        (high - low) * _shares(u, m, least_size)
        for u, least_size in zip((widths, heights), least, strict=True)
    )
    return (_knots(ws, low, high), ws), (_knots(hs, low, high), hs), d


def _domain(
    widths: Tensor, heights: Tensor, rest: Tensor, m: SplineMap
) -> tuple[Pair, Pair, Tensor]:
    """Return knots and sizes of widths and of heights, and derivatives, over an interval that is learned."""
    where, raw = rest[..., : m.domain_numbers], rest[..., m.domain_numbers :]
    d = m.min_derivative + softplus(raw + _softplus_inverse(1 - m.min_derivative))
    if m.tails == "linear":
        half = m.bound * softplus(where + _softplus_inverse(1.0))
        ws, hs = (2 * half * _shares(u, m, 0.0) for u in (widths, heights))
        xs, ys = _knots(ws, -half, half), _knots(hs, -half, half)
        end = torch.ones_like(half)
    else:
        ws, hs = (
            least + softplus(m.scale * u + _softplus_inverse(2 * m.bound / m.bins - least))
            for u, least in ((widths, m.min_bin_width), (heights, m.min_bin_height))
        )
        low = where - m.bound  # lowest output, leftmost input
        xs, ys = _knots(ws, low[..., 1:]), _knots(hs, low[..., :1])
        end = hs.sum(-1, keepdim=True) / ws.sum(-1, keepdim=True)
    return (xs, ws), (ys, hs), torch.cat([end, d, end], -1)


def _softplus_inverse(v: float) -> float:
    return v + math.log(-math.expm1(-v))


def _rational_forward(
    xi: Tensor, zeta: Tensor, y0: Tensor, y1: Tensor, h: Tensor, s: Tensor, d0: Tensor, d1: Tensor
) -> Pair:
    below = s * (xi * xi + zeta * zeta) + (d0 + d1) * xi * zeta
    up, down = xi * (s * xi + d0 * zeta) / below, zeta * (s * zeta + d1 * xi) / below
    return _from_nearer_end(y0, y1, h, up, down), _log_slope(xi, zeta, s, d0, d1)


def _rational_inverse(
    eta: Tensor, rest: Tensor, x0: Tensor, x1: Tensor, w: Tensor, s: Tensor, d0: Tensor, d1: Tensor
) -> Pair:
    m = d0 * rest - d1 * eta
    left = m >= 0  # the end that the root is computed from
    # the root depends on the ratio of m and s alone, and their squares may leave the range of the dtype
    larger = torch.maximum(m.abs(), 2 * s).detach()
    m, twice = m / larger, 2 * s / larger
    r = torch.sqrt(m * m + twice * twice * eta * rest)
    near = twice * torch.where(left, eta, rest)
    # abs() has no derivative at 0, this one has; all terms are 0 where a derivative of 0 ends the bin
    root = near / (torch.where(left, m, -m) + r + near + torch.finfo(m.dtype).tiny)
    xi, zeta = torch.where(left, root, 1 - root), torch.where(left, 1 - root, root)
    return _from_nearer_end(x0, x1, w, xi, zeta), _log_slope(xi, zeta, s, d0, d1)


def _from_nearer_end(start: Tensor, end: Tensor, size: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.where(up < down, start + size * up, end - size * down)


def _log_slope(xi: Tensor, zeta: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    t = xi * zeta
    below = s * (xi * xi + zeta * zeta) + (d0 + d1) * t
    above = d1 * xi * xi + 2 * s * t + d0 * zeta * zeta
    return 2 * torch.log(s / below) + torch.log(above)


# --- linear -------------------------------------------------------------------------------------------------


def _linear(parts: Parts, m: SplineMap) -> Spline:
    heights = parts[1]
    low, high = _ends(m, heights)
    share = _shares(heights, m, m.min_bin_height)
    ys = _knots((high - low) * share, low, high)
    xs = low + (high - low) * torch.arange(m.bins + 1, device=low.device, dtype=low.dtype) / m.bins
    slope = _slope(m.bins * share)

    def within(v: Tensor, inverse: bool) -> Pair:
        k = _bin(v, ys if inverse else xs)
        x0, x1, y0, s = _take(xs, k), _take(xs, k + 1), _take(ys, k), _take(slope, k)
        if inverse:  # a flat bin must not leave its own width
            return rounded_into(x0 + (v - y0) / s, x0, x1), torch.log(s)
        return y0 + (v - x0) * s, torch.log(s)

    end_slopes = (slope[..., 0], slope[..., -1]) if m.tails == "affine" else None
    return Spline(low[..., 0], high[..., 0], low[..., 0], high[..., 0], end_slopes, within)


# --- quadratic ----------------------------------------------------------------------------------------------


def _quadratic(parts: Parts, m: SplineMap) -> Spline:
    """The integral of a density that is linear in each bin; in units of the interval, whose ends both axes share."""
    low, high = _ends(m, parts[0])
    w = _shares(parts[0], m, m.min_bin_width)
    u = softplus(parts[1]) + 1e-3
    if m.tails == "linear":  # the density of the ends that is 1 once the whole has area 1
        outer, inner = m.edge * (w[..., :1] * u[..., :1] + w[..., -1:] * u[..., -1:]), w[..., 1:-1]
        area = ((u[..., :-1] + u[..., 1:]) / 2 * inner).sum(-1, keepdim=True)
        end = (outer + area) / (1 - m.edge * (w[..., :1] + w[..., -1:]))
        u = torch.cat([end, u, end], -1)
    elif m.tails == "circular":
        u = torch.cat([u, u[..., :1]], -1)
    area = (w * (u[..., :-1] + u[..., 1:]) / 2).sum(-1, keepdim=True)
    g = m.min_bin_height + (1 - m.min_bin_height) * u / area
    zero, one = torch.zeros_like(low), torch.ones_like(low)
    xs, ys = _knots(w, zero, one), _knots(w * (g[..., :-1] + g[..., 1:]) / 2, zero, one)

    def within(v: Tensor, inverse: bool) -> Pair:
        span = (high - low)[..., 0]
        v = (v - low[..., 0]) / span
        k = _bin(v, ys if inverse else xs)
        x0, y0, w0, g0, g1 = _take(xs, k), _take(ys, k), _take(w, k), _take(g, k), _take(g, k + 1)
        if inverse:
            rise = (v - y0) / w0
            root = torch.sqrt(
                (g0 * g0 + 2 * (g1 - g0) * rise).clamp_min(torch.finfo(v.dtype).tiny)
            )
            part = rounded_into(2 * rise / (g0 + root), 0.0, 1.0)
            out = x0 + w0 * part
        else:
            part = rounded_into((v - x0) / w0, 0.0, 1.0)
            out = y0 + w0 * (g0 * part + (g1 - g0) / 2 * part * part)
        log_slope = torch.log(g0 * (1 - part) + g1 * part)
        return low[..., 0] + span * out, log_slope

    end_slopes = (g[..., 0], g[..., -1]) if m.tails == "affine" else None
    return Spline(low[..., 0], high[..., 0], low[..., 0], high[..., 0], end_slopes, within)


# --- cubic --------------------------------------------------------------------------------------------------


def _cubic(parts: Parts, m: SplineMap) -> Spline:
    widths, heights, ends = parts
    low, high = _ends(m, widths)
    w, h = (
        _size((high - low) * _shares(u, m, least))
        for u, least in ((widths, m.min_bin_width), (heights, m.min_bin_height))
    )
    xs, ys = _knots(w, low, high), _knots(h, low, high)
    s = _slope(h / w)
    before, after = s[..., :-1], s[..., 1:]
    mean = (w[..., 1:] * before + w[..., :-1] * after) / (w[..., 1:] + w[..., :-1])
    twice = 2 * torch.where(before < after, before, after)
    inner = torch.where(twice < mean, twice, mean)
    outer = 3 * torch.sigmoid(ends)
    d = torch.cat([outer[..., :1] * s[..., :1], inner, outer[..., 1:] * s[..., -1:]], -1)

    def within(v: Tensor, inverse: bool) -> Pair:
        k = _bin(v, ys if inverse else xs)
        x0, y0, w0, h0, s0, d0, d1 = (_take(t, k) for t in (xs, ys, w, h, s, d, d[..., 1:]))
        if not inverse:
            part = rounded_into((v - x0) / w0, 0.0, 1.0)
            value, slope = _cubic_value(part, s0, d0, d1)
            return y0 + w0 * value, _log_positive(slope)
        rise = s0 * rounded_into((v - y0) / h0, 0.0, 1.0)
        with torch.no_grad():
            part = _cubic_root(*(t.detach() for t in (rise, s0, d0, d1)))
        # the root has its value; its first and second derivatives are those of two of Newton's steps, which would
        # only move it, and far where the slope is next to nothing
        for _ in range(2):
            value, slope = _cubic_value(part, s0, d0, d1)
            step = (value - rise) / slope.clamp_min(torch.finfo(slope.dtype).tiny)
            part = part - (step - step.detach())
        return x0 + w0 * part, _log_positive(_cubic_value(part, s0, d0, d1)[1])

    end_slopes = (d[..., 0], d[..., -1]) if m.tails == "affine" else None
    return Spline(low[..., 0], high[..., 0], low[..., 0], high[..., 0], end_slopes, within)


def _cubic_value(part: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Pair:
    """Return the rise over the width, and the derivative, in the form of Bernstein: every term is positive."""
    rest = 1 - part
    value = part * (d0 * rest * rest + part * ((3 * s - d1) * rest + s * part))
    return value, d0 * rest * rest + 2 * (3 * s - d0 - d1) * part * rest + d1 * part * part


def _log_positive(slope: Tensor) -> Tensor:
    """Return the logarithm of a slope that rounding may have made 0."""
    return torch.log(slope.clamp_min(torch.finfo(slope.dtype).tiny))


def _cubic_root(rise: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """Solve for the position in the bin: Newton's steps, halving the bracket where they leave it."""
    low, high = torch.zeros_like(rise), torch.ones_like(rise)
    part = (rise / s).clamp(0.0, 1.0)
    for i in range(60):
        value, slope = _cubic_value(part, s, d0, d1)
        low, high = torch.where(value < rise, part, low), torch.where(value < rise, high, part)
        step = part - (value - rise) / slope
        good = (step >= low) & (step <= high)
        if i % 3 == 2 and i < 48:
            good = torch.zeros_like(good)
        part = torch.where(good, step, (low + high) / 2)
    return part


#: What turns raw parameters into a spline, by its kind.
SPLINES: dict[str, Callable[[Parts, SplineMap], Spline]] = {
    "rational_quadratic": _rational_quadratic,
    "linear": _linear,
    "quadratic": _quadratic,
    "cubic": _cubic,
}
