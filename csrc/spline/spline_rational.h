// SPDX-License-Identifier: Apache-2.0
// Rational-quadratic splines (Gregory and Delbourgo 1982; Durkan et al. 2019) and their VJP.
//
// In a bin with slope s = h / w, end derivatives d0 and d1, xi = (x - x0) / w, zeta = 1 - xi, t =
// xi zeta, q = xi^2 + zeta^2,
//   D = s q + (d0 + d1) t,   y = y0 + h xi (s xi + d0 zeta) / D,
//   N = d1 xi^2 + 2 s t + d0 zeta^2,   f' = (s / D)^2 N:
// sums of positive terms alone.  The root for y, with eta = (y - y0) / h, m = d0 (1 - eta) - d1 eta
// and r^2 = m^2 + 4 s^2 eta (1 - eta), is  xi = 2 s eta / (m + r + 2 s eta)  where m >= 0, else the
// same from the other end; nothing cancels, and the discriminant is never negative.
#pragma once

#include "spline/spline_bins.h"

PFK_BEGIN

// An element and its bin.
template <class C, class V>
struct RationalBin {
  Axis<C, V> in, out;
  Place<V> place;
  Ends<V> ends;
  V size_in, size_out;  // of the bin
  V start_in, start_out, end_in, end_out;
  V d0, d1;  // derivatives at its ends; below, their derivatives by the raw ones
  V slope0, slope1;
  V v;  // the input, wrapped
};

template <class V>
struct Derivative {
  V value, slope;
};

template <class C, class V>
PFK_HD Derivative<V> derivative_of(V raw, const SplineMap<Lane<V>>& m) {
  if (C::parameters(m, kSoftclip)) {
    const Clipped<V> u = softclip(raw, m.derivative_clip);
    const V d = exp_(u.value);
    return {d, d * u.factor * u.factor};
  }
  if (C::parameters(m, kDomain)) raw = raw + V(m.derivative_shift);
  const Softplus<V> s = softplus_with_slope(raw);
  return {s.value + V(m.min_derivative), s.slope};
}

template <class C, class V, class Tile>
PFK_HD RationalBin<C, V> rational_bin(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  using T = Lane<V>;
  const int bins = C::bins(m);
  RationalBin<C, V> b;
  {
    const Axis<C, V> x = normalized_sizes<C, V>(m, t, 0, 0),
                     y = normalized_sizes<C, V>(m, t, 1, bins);
    b.in = choose(m.inverse, y, x), b.out = choose(m.inverse, x, y);
  }
  if (C::tails(m, kCircular)) v = wrap(v, b.in.low, b.in.high);
  b.v = v;
  const bool ended = !(C::tails(m, kIdentityTails) || C::parameters(m, kDomain));
  V raw0 = V(T(0)), raw1 = t.get(m.knot + 1);
  if (ended) raw0 = t.get(m.knot);
  const V raw_end = !ended ? V(T(0)) : t.get(m.knot + (C::tails(m, kCircular) ? 0 : bins));
  b.place = find<C, V>(m, t, v, b.in, b.out, [&](auto reached, int j) {
    raw0 = select(reached, t.get(m.knot + j), raw0);
    raw1 = select(reached, j + 1 < bins ? t.get(m.knot + j + 1) : raw_end, raw1);
  });
  const Derivative<V> d0 = derivative_of<C>(raw0, m), d1 = derivative_of<C>(raw1, m);
  b.d0 = d0.value, b.d1 = d1.value, b.slope0 = d0.slope, b.slope1 = d1.slope;
  if (!ended) {  // the ends have no parameter: there the derivative is that of the tails
    V end = T(1);
    if (C::free_sizes(m)) {
      const V in = b.in.span(bins), out = b.out.span(bins);
      end = m.inverse ? in / out : out / in;
    }
    const auto first = b.place.bin == T(0), last = b.place.bin == T(bins - 1);
    b.d0 = select(first, end, b.d0), b.d1 = select(last, end, b.d1);
    b.slope0 = select(first, V(T(0)), b.slope0), b.slope1 = select(last, V(T(0)), b.slope1);
  }
  b.size_in = size_of_bin(m, b.place.size[0] * b.in.rate + V(b.in.least));
  b.size_out = size_of_bin(m, b.place.size[1] * b.out.rate + V(b.out.least));
  b.start_in = b.place.start[0], b.start_out = b.place.start[1];
  b.end_in = b.place.end[0], b.end_out = b.place.end[1];
  b.ends = ends_of(v, b.in.low, b.in.high);
  return b;
}

// Where an element is in its bin, as a share of the bin from its start (xi) and from its end
// (zeta); and the slope and the result.
template <class V>
struct RationalPoint {
  V xi, zeta, s, out;
};

template <class V>
PFK_HD V clamp_unit(V v) {
  using T = Lane<V>;
  return max_(min_(v, V(T(1))), V(T(0)));
}

// The shares on the axis of the input, measured from the nearer end.
template <class C, class V>
PFK_HD RationalPoint<V> rational_point(const RationalBin<C, V>& b) {
  using T = Lane<V>;
  const V inverse = V(T(1)) / b.size_in;
  const V from_start = clamp_unit((b.v - b.start_in) * inverse);
  const V from_end = clamp_unit((b.end_in - b.v) * inverse);
  const auto near = from_start < from_end;
  return {select(near, from_start, V(T(1)) - from_end),
          select(near, V(T(1)) - from_start, from_end), inverse, V(T(0))};
}

template <class C, class V>
PFK_HD V from_nearer_end(const RationalBin<C, V>& b, V up, V down) {
  return select(up < down, b.start_out + b.size_out * up, b.end_out - b.size_out * down);
}

template <class C, class V>
PFK_HD RationalPoint<V> rational_forward(const SplineMap<Lane<V>>& map,
                                         const RationalBin<C, V>& b) {
  using T = Lane<V>;
  RationalPoint<V> p = rational_point(b);
  const V xi = p.xi, zeta = p.zeta;
  p.s = slope_of_bin(map, b.size_out * p.s);
  const V up = xi * (p.s * xi + b.d0 * zeta), down = zeta * (p.s * zeta + b.d1 * xi);
  const V below = V(T(1)) / (p.s * (xi * xi + zeta * zeta) + (b.d0 + b.d1) * (xi * zeta));
  p.out = from_nearer_end(b, up * below, down * below);
  return p;
}

template <class C, class V>
PFK_HD RationalPoint<V> rational_inverse(const SplineMap<Lane<V>>& map,
                                         const RationalBin<C, V>& b) {
  using T = Lane<V>;
  const RationalPoint<V> at = rational_point(b);  // on the axis of y
  const V s = slope_of_bin(map, b.size_in / b.size_out), eta = at.xi, rest = at.zeta;
  V m = b.d0 * rest - b.d1 * eta, twice = s + s;
  if (map.any_slope) {  // the root depends on their ratio; their squares may leave the range
    const V larger = V(T(1)) / max_(abs_(m), twice);
    m = m * larger, twice = twice * larger;
  }
  const V r = sqrt_(m * m + twice * twice * (eta * rest));
  const auto right = m < T(0);
  const V near = twice * select(right, rest, eta);
  // all terms are 0 where a derivative of 0 ends the bin
  const V root = clamp_unit(near / (abs_(m) + r + near + V(least_number<T>()))),
          other = V(T(1)) - root;
  const V xi = select(right, other, root), zeta = select(right, root, other);
  return {xi, zeta, s, from_nearer_end(b, xi, zeta)};
}

// ---- forward and inverse of an element -------------------------------------------------------
template <class C, class V, class Tile>
PFK_HD SplineValue<V> rational_apply(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  using T = Lane<V>;
  const RationalBin<C, V> b = rational_bin<C, V>(m, t, v);
  const RationalPoint<V> p = m.inverse ? rational_inverse(m, b) : rational_forward(m, b);
  const V prod = p.xi * p.zeta;
  const V ratio = p.s / (p.s * (p.xi * p.xi + p.zeta * p.zeta) + (b.d0 + b.d1) * prod);
  const V above = b.d1 * p.xi * p.xi + (p.s + p.s) * prod + b.d0 * p.zeta * p.zeta;
  const V log_slope =
      m.any_slope ? V(T(2)) * log_(ratio) + log_(above) : log_(ratio * ratio * above);
  const V low = b.out.low, high = b.out.high;
  return with_tails<C>(m, b.ends, b.v, max_(min_(p.out, high), low), log_slope, b.d0, b.d1, low,
                       high);
}

// ---- VJP -------------------------------------------------------------------------------------
// The terms of y, of log f' and of their derivatives.
template <class V>
struct RationalTerms {
  V t, below, above, over;  // xi zeta, 1 / D, N, 1 / N
  V left, right;            // they sum to D: left / D is the share of h below y
  V by_xi, log_by_xi;       // of (y - y0) / h and of log f'
};

template <class V>
PFK_HD RationalTerms<V> rational_terms(const RationalPoint<V>& p, V d0, V d1) {
  using T = Lane<V>;
  const V xi2 = p.xi * p.xi, zeta2 = p.zeta * p.zeta, turn = p.zeta - p.xi, s = p.s;
  RationalTerms<V> r;
  r.t = p.xi * p.zeta;
  r.left = s * xi2 + d0 * r.t, r.right = s * zeta2 + d1 * r.t;
  r.below = V(T(1)) / (s * (xi2 + zeta2) + (d0 + d1) * r.t);
  r.above = d1 * xi2 + (s + s) * r.t + d0 * zeta2;
  r.over = V(T(1)) / r.above;
  r.by_xi = s * r.above * r.below * r.below;
  r.log_by_xi = V(T(2)) * ((d1 * p.xi - d0 * p.zeta + s * turn) * r.over -
                           (d0 + d1 - s - s) * turn * r.below);
  return r;
}

// From upstream gradients of y and log f', and from the gradient of x.
template <class V>
PFK_HD SplineGrad<V> rational_grad(const RationalPoint<V>& p, const RationalTerms<V>& r, V d0, V d1,
                                   V w, V h, V grad_y, V grad_log, V grad_x) {
  using T = Lane<V>;
  const V xi2 = p.xi * p.xi, zeta2 = p.zeta * p.zeta, two = T(2);
  const V gy = grad_y * h * r.below * r.below * r.t, twice = two * r.t * r.below;
  // by s, times s
  const V by_s = gy * p.s * (d1 * xi2 - d0 * zeta2) +
                 grad_log * (two + two * p.s * (r.t * r.over - (xi2 + zeta2) * r.below));
  SplineGrad<V> g;
  g.d0 = gy * r.right + grad_log * (zeta2 * r.over - twice);
  g.d1 = grad_log * (xi2 * r.over - twice) - gy * r.left;
  g.start_x = -grad_x;
  g.size_x = -(p.xi * grad_x + by_s / w);
  g.start_y = grad_y;
  g.size_y = grad_y * r.left * r.below + by_s / h;
  return g;
}

// The gradients of an element's input and of its bin.  Those of the inverse follow implicitly: they
// are those of the forward direction at the root, with other upstream gradients.
template <class C, class V>
PFK_HD SplineGrad<V> bin_grad(const SplineMap<Lane<V>>& m, const RationalBin<C, V>& b, V grad_out,
                              V grad_log) {
  const RationalPoint<V> p = m.inverse ? rational_inverse(m, b) : rational_forward(m, b);
  const V w = m.inverse ? b.size_out : b.size_in, h = m.inverse ? b.size_in : b.size_out;
  const RationalTerms<V> r = rational_terms(p, b.d0, b.d1);
  const V slope = r.by_xi * h / w, log_by_x = r.log_by_xi / w;
  SplineGrad<V> g;
  if (m.inverse) {
    const V grad_y = (grad_out - grad_log * log_by_x) / slope;
    g = rational_grad(p, r, b.d0, b.d1, w, h, -grad_y, -grad_log, -grad_out);
    g.in = grad_y;
  } else {
    const V grad_x = grad_out * slope + grad_log * log_by_x;
    g = rational_grad(p, r, b.d0, b.d1, w, h, grad_out, grad_log, grad_x);
    g.in = grad_x;
  }
  tail_grad<C>(m, b.ends, b.v, b.d0, b.d1, grad_out, grad_log, g);
  return g;
}

// Stores the gradients of the parameters of a learned interval in their place.  Where sizes have
// parameters of their own, the slope of the tails depends on all of them: returns the gradient that
// each size of x, and of y, has from it.
template <class V>
struct AllSizes {
  V x, y;
};
template <class C, class V, class Tile>
PFK_HD AllSizes<V> interval_gradients(const SplineMap<Lane<V>>& m, Tile& t,
                                      const RationalBin<C, V>& b, const Axis<C, V>& x,
                                      const Axis<C, V>& y, const SplineGrad<V>& g) {
  using T = Lane<V>;
  const V zero = T(0);
  const int bins = C::bins(m);
  AllSizes<V> all{zero, zero};
  if (C::free_sizes(m)) {
    const auto first = b.place.bin == T(0), last = b.place.bin >= T(bins - 1);
    const V whole =
        select(first, g.d0, zero) + select(last, g.d1, zero);  // of the slope of the tails
    all.y = whole / x.span(bins);
    all.x = -all.y * (y.span(bins) / x.span(bins));
    t.put(m.domain, g.start_y), t.put(m.domain + 1, g.start_x);
  } else if (C::parameters(
                 m, kDomain)) {  // half the interval, which moves its start and scales all sizes
    V by_half = -g.start_x - g.start_y;
    by_half = by_half + V(T(2)) *
                            (g.start_x * b.place.before_of(m.inverse) +
                             g.size_x * b.place.size_of(m.inverse)) /
                            x.sum;
    by_half = by_half + V(T(2)) *
                            (g.start_y * b.place.before_of(!m.inverse) +
                             g.size_y * b.place.size_of(!m.inverse)) /
                            y.sum;
    const Softplus<V> half = softplus_with_slope(t.get(m.domain) + V(m.domain_shift));
    t.put(m.domain, by_half * half.slope * V(m.bound));
  }
  return all;
}

// The gradients of raw derivatives: knot j ends bin j - 1 and begins bin j.
template <class C, class V, class Tile>
PFK_HD void derivative_gradients(const SplineMap<Lane<V>>& m, Tile& t, V bin, V raw0, V raw1) {
  using T = Lane<V>;
  const V zero = T(0);
  const int bins = C::bins(m);
  PFK_UNROLL_ON_CPU(8)
  for (int j = 1; j < bins; ++j) {
    t.put(m.knot + j, select(bin == T(j), raw0, select(bin == T(j - 1), raw1, zero)));
  }
  if (C::tails(m, kIdentityTails) || C::parameters(m, kDomain)) return;
  const V begin = select(bin == T(0), raw0, zero);
  const V end = select(bin == T(bins - 1), raw1, zero);
  if (C::tails(m, kCircular)) {
    t.put(m.knot, begin + end);
  } else {
    t.put(m.knot, begin);
    t.put(m.knot + bins, end);
  }
}

// Replaces the parameters in the tile by their gradients; returns the gradient of the input.
template <class C, class V, class Tile>
PFK_HD V rational_vjp(const SplineMap<Lane<V>>& m, Tile& t, V v, V grad_out, V grad_log) {
  using T = Lane<V>;
  RationalBin<C, V> b = rational_bin<C, V>(m, t, v);
  const SplineGrad<V> g = bin_grad(m, b, grad_out, grad_log);
  if (C::free_sizes(m)) {  // above the interval, all bins lie before the element
    const auto above = b.v > b.ends.end;
    b.place.bin = select(above, V(T(C::bins(m))), b.place.bin);
  }
  const Axis<C, V> x = choose(m.inverse, b.out, b.in), y = choose(m.inverse, b.in, b.out);
  const AllSizes<V> all = interval_gradients(m, t, b, x, y, g);
  size_gradients<C, V>(m, t, x, b.place.bin, b.place.before_of(m.inverse),
                       b.place.size_of(m.inverse), g.start_x, g.size_x, all.x);
  size_gradients<C, V>(m, t, y, b.place.bin, b.place.before_of(!m.inverse),
                       b.place.size_of(!m.inverse), g.start_y, g.size_y, all.y);
  derivative_gradients<C, V>(m, t, b.place.bin, g.d0 * b.slope0, g.d1 * b.slope1);
  return g.in;
}

PFK_END
