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

#include "spline/spline.h"

PFK_BEGIN

// An element in its bin.
template <class V>
struct RationalBin {
  Axis<V> in, out;
  Place<V> place;
  Ends<V> ends;
  V size_in, size_out;  // of the bin
  V start_in, start_out;
  V d0, d1;  // derivatives at its ends, and of those by the raw numbers
  V slope0, slope1;
  V v;  // the input, wrapped
};

template <class V>
struct Derivative {
  V value, slope;
};

template <class C, class V>
PFK_HD Derivative<V> derivative_of(V raw, const SplineMap<Lane<V>>& m) {
  using T = Lane<V>;
  if (C::parameters(m, kSoftclip)) {
    const V factor = V(T(1)) / (V(T(1)) + abs_(raw * V(m.derivative_clip)));
    const V d = exp_(raw * factor);
    return {d, d * factor * factor};
  }
  if (C::parameters(m, kDomain)) raw = raw + V(m.derivative_shift);
  const Softplus<V> s = softplus_with_slope(raw);
  return {s.value + V(m.min_derivative), s.slope};
}

template <class C, class V, class Tile>
PFK_HD RationalBin<V> rational_bin(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  using T = Lane<V>;
  const int bins = C::bins(m);
  RationalBin<V> b;
  {
    const Axis<V> x = spread<C, V>(m, t, 0), y = spread<C, V>(m, t, 1);
    b.in = m.inverse ? y : x, b.out = m.inverse ? x : y;
  }
  if (C::tails(m, kCircular)) v = wrap(v, b.in.low, V(m.high));
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
  if (!ended) {  // the ends have the derivative of the tails
    V end = T(1);
    if (C::free_sizes(m)) {
      const V in = span_of(b.in, bins), out = span_of(b.out, bins);
      end = m.inverse ? in / out : out / in;
    }
    const auto first = b.place.bin == T(0), last = b.place.bin == T(bins - 1);
    b.d0 = select(first, end, b.d0), b.d1 = select(last, end, b.d1);
    b.slope0 = select(first, V(T(0)), b.slope0), b.slope1 = select(last, V(T(0)), b.slope1);
  }
  b.size_in = b.place.size[0] * b.in.rate + V(b.in.least);
  b.size_out = b.place.size[1] * b.out.rate + V(b.out.least);
  b.start_in = b.place.before[0] * b.in.rate + (b.in.low + b.place.bin * V(b.in.least));
  b.start_out = b.place.before[1] * b.out.rate + (b.out.low + b.place.bin * V(b.out.least));
  b.ends = C::parameters(m, kDomain) ? ends_of(v, b.in.low, end_of(b.in, bins))
                                     : ends_of(v, V(m.low), V(m.high));
  return b;
}

// The place in the bin on both axes: near as a share of the bin from its start and from its end.
template <class V>
struct RationalPoint {
  V xi, zeta, s, out;
};

template <class V>
PFK_HD V clamp_unit(V v) {
  using T = Lane<V>;
  return max_(min_(v, V(T(1))), V(T(0)));
}

template <class V>
PFK_HD RationalPoint<V> rational_forward(const RationalBin<V>& b) {
  using T = Lane<V>;
  const V inverse_width = V(T(1)) / b.size_in, s = b.size_out * inverse_width;
  const V xi = clamp_unit((b.v - b.start_in) * inverse_width), zeta = V(T(1)) - xi;
  const V below = s * (xi * xi + zeta * zeta) + (b.d0 + b.d1) * (xi * zeta);
  return {xi, zeta, s, b.start_out + b.size_out * (xi * (s * xi + b.d0 * zeta)) / below};
}

template <class V>
PFK_HD RationalPoint<V> rational_inverse(const RationalBin<V>& b) {
  using T = Lane<V>;
  const V inverse_height = V(T(1)) / b.size_in, s = b.size_in / b.size_out;
  const V eta = clamp_unit((b.v - b.start_in) * inverse_height), rest = V(T(1)) - eta;
  const V m = b.d0 * rest - b.d1 * eta, twice = s + s;
  const V r = sqrt_(m * m + twice * twice * (eta * rest));
  const auto right = m < T(0);
  const V near = twice * select(right, rest, eta);
  const V root = clamp_unit(near / (abs_(m) + r + near)), other = V(T(1)) - root;
  const V xi = select(right, other, root);
  return {xi, select(right, root, other), s, b.start_out + b.size_out * xi};
}

template <class V>
struct SplineValue {
  V out, log_slope;  // of the direction that ran
};

// ---- forward and inverse of an element -------------------------------------------------------
template <class C, class V, class Tile>
PFK_HD SplineValue<V> rational_apply(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  using T = Lane<V>;
  const RationalBin<V> b = rational_bin<C, V>(m, t, v);
  const RationalPoint<V> p = m.inverse ? rational_inverse(b) : rational_forward(b);
  const V prod = p.xi * p.zeta;
  const V ratio = p.s / (p.s * (p.xi * p.xi + p.zeta * p.zeta) + (b.d0 + b.d1) * prod);
  const V above = b.d1 * p.xi * p.xi + (p.s + p.s) * prod + b.d0 * p.zeta * p.zeta;
  V log_slope = log_(ratio * ratio * above);
  const bool learned = C::parameters(m, kDomain);
  const V low = b.out.low, high = learned ? end_of(b.out, C::bins(m)) : V(m.high);
  V out = max_(min_(p.out, high), low);
  if (C::tails(m, kIdentityTails)) {
    out = select(b.ends.outside, v, out);
    log_slope = select(b.ends.outside, V(T(0)), log_slope);
  } else if (C::tails(m, kNoTails)) {
    out = select(b.ends.outside, V(T(NAN)), out);
    log_slope = select(b.ends.outside, V(T(NAN)), log_slope);
  } else if (C::tails(m, kAffineTails)) {
    const V d = select(b.ends.below, b.d0, b.d1);
    const V distance = v - select(b.ends.below, b.ends.start, b.ends.end);
    const V edge = select(b.ends.below, low, high);
    out = select(b.ends.outside, edge + (m.inverse ? distance / d : distance * d), out);
    log_slope = select(b.ends.outside, log_(d), log_slope);
  }
  return {out, m.inverse ? -log_slope : log_slope};
}

// ---- VJP -------------------------------------------------------------------------------------
// What y and log f' and all their derivatives are made of.
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

// Gradients by the bin's start and size on both axes and by its end derivatives.
template <class V>
struct RationalGrad {
  V start_x, size_x, start_y, size_y, d0, d1;
};

// For upstream gradients of y and log f', and the gradient of x that follows from them.
template <class V>
PFK_HD RationalGrad<V> rational_grad(const RationalPoint<V>& p, const RationalTerms<V>& r, V d0,
                                     V d1, V w, V h, V grad_y, V grad_log, V grad_x) {
  using T = Lane<V>;
  const V xi2 = p.xi * p.xi, zeta2 = p.zeta * p.zeta, two = T(2);
  const V gy = grad_y * h * r.below * r.below * r.t, twice = two * r.t * r.below;
  // by s, times s
  const V by_s = gy * p.s * (d1 * xi2 - d0 * zeta2) +
                 grad_log * (two + two * p.s * (r.t * r.over - (xi2 + zeta2) * r.below));
  RationalGrad<V> g;
  g.d0 = gy * r.right + grad_log * (zeta2 * r.over - twice);
  g.d1 = grad_log * (xi2 * r.over - twice) - gy * r.left;
  g.start_x = -grad_x;
  g.size_x = -(p.xi * grad_x + by_s / w);
  g.start_y = grad_y;
  g.size_y = grad_y * r.left * r.below + by_s / h;
  return g;
}

// The tile's parameters become their gradients; returns that of the input.
template <class C, class V, class Tile>
PFK_HD V rational_vjp(const SplineMap<Lane<V>>& m, Tile& t, V v, V grad_out, V grad_log) {
  using T = Lane<V>;
  const int bins = C::bins(m);
  const V zero = T(0);
  RationalBin<V> b = rational_bin<C, V>(m, t, v);
  const RationalPoint<V> p = m.inverse ? rational_inverse(b) : rational_forward(b);
  const V w = m.inverse ? b.size_out : b.size_in, h = m.inverse ? b.size_in : b.size_out;
  const RationalTerms<V> r = rational_terms(p, b.d0, b.d1);
  const V slope = r.by_xi * h / w, log_by_x = r.log_by_xi / w;
  V grad_in;
  RationalGrad<V> g;
  if (m.inverse) {  // implicitly: forward's VJP at the root, with other upstream gradients
    grad_in = (grad_out - grad_log * log_by_x) / slope;
    g = rational_grad(p, r, b.d0, b.d1, w, h, -grad_in, -grad_log, -grad_out);
  } else {
    grad_in = grad_out * slope + grad_log * log_by_x;
    g = rational_grad(p, r, b.d0, b.d1, w, h, grad_out, grad_log, grad_in);
  }
  if (!C::tails(m, kCircular)) {
    const auto outside = b.ends.outside;
    if (C::tails(m, kIdentityTails) || C::tails(m, kNoTails)) {
      grad_in = select(outside, C::tails(m, kNoTails) ? zero : grad_out, grad_in);
      g.d0 = select(outside, zero, g.d0), g.d1 = select(outside, zero, g.d1);
      g.start_x = select(outside, zero, g.start_x), g.start_y = select(outside, zero, g.start_y);
    } else {  // y = edge_y + d (x - edge_x)
      const V d = select(b.ends.below, b.d0, b.d1);
      const V distance = v - select(b.ends.below, b.ends.start, b.ends.end);
      const V grad_edge = m.inverse ? grad_out : -grad_out * d;  // of edge_x
      const V upstream = m.inverse ? -grad_out / d : grad_out;   // of y
      const V by_d =
          upstream * (m.inverse ? distance / d : distance) + (m.inverse ? -grad_log : grad_log) / d;
      g.d0 = select(outside, select(b.ends.below, by_d, zero), g.d0);
      g.d1 = select(outside, select(b.ends.below, zero, by_d), g.d1);
      grad_in = select(outside, m.inverse ? grad_out / d : grad_out * d, grad_in);
      const bool moves = C::parameters(m, kDomain);
      g.start_x = select(outside, moves ? grad_edge : zero, g.start_x);
      g.start_y = select(outside, moves ? upstream : zero, g.start_y);
      if (moves) {  // all bins lie before what is above
        const auto past = v > b.ends.end;
        b.place.bin = select(past, V(T(bins)), b.place.bin);
      }
    }
    g.size_x = select(outside, zero, g.size_x), g.size_y = select(outside, zero, g.size_y);
  }
  const Axis<V>&x = m.inverse ? b.out : b.in, &y = m.inverse ? b.in : b.out;
  const int ix = m.inverse ? 1 : 0, iy = 1 - ix;
  V all_x = zero, all_y = zero;
  if (C::free_sizes(m)) {
    const auto first = b.place.bin == T(0), last = b.place.bin >= T(bins - 1);
    // by the slope of the whole
    const V whole = select(first, g.d0, zero) + select(last, g.d1, zero);
    all_y = whole / span_of(x, bins);
    all_x = -all_y * (span_of(y, bins) / span_of(x, bins));
    t.put(m.domain, g.start_y), t.put(m.domain + 1, g.start_x);
  } else if (C::parameters(m, kDomain)) {  // half the interval: where it starts, and all sizes
    V by_half = -g.start_x - g.start_y;
    by_half =
        by_half + V(T(2)) * (g.start_x * b.place.before[ix] + g.size_x * b.place.size[ix]) / x.sum;
    by_half =
        by_half + V(T(2)) * (g.start_y * b.place.before[iy] + g.size_y * b.place.size[iy]) / y.sum;
    const Softplus<V> half = softplus_with_slope(t.get(m.domain) + V(m.domain_shift));
    t.put(m.domain, by_half * half.slope * V(m.bound));
  }
  size_gradients<C, V>(m, t, x, b.place.bin, b.place.before[ix], b.place.size[ix], g.start_x,
                       g.size_x, all_x);
  size_gradients<C, V>(m, t, y, b.place.bin, b.place.before[iy], b.place.size[iy], g.start_y,
                       g.size_y, all_y);
  // derivatives: knot j ends bin j - 1 and begins bin j
  const V raw0 = g.d0 * b.slope0, raw1 = g.d1 * b.slope1;
  const bool ended = !(C::tails(m, kIdentityTails) || C::parameters(m, kDomain));
  PFK_UNROLL
  for (int j = 1; j < bins; ++j) {
    t.put(m.knot + j,
          select(b.place.bin == T(j), raw0, select(b.place.bin == T(j - 1), raw1, zero)));
  }
  if (ended) {
    const V begin = select(b.place.bin == T(0), raw0, zero);
    const V end = select(b.place.bin == T(bins - 1), raw1, zero);
    if (C::tails(m, kCircular)) {
      t.put(m.knot, begin + end);
    } else {
      t.put(m.knot, begin);
      t.put(m.knot + bins, end);
    }
  }
  return grad_in;
}

PFK_END
