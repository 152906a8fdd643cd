// SPDX-License-Identifier: Apache-2.0
// Monotonic cubic splines (Durkan et al. 2019), with the derivatives of Steffen 1990 at inner
// knots.
//
// With xi = (x - x0) / w and zeta = 1 - xi, in the form of Bernstein:
//   y = y0 + w (d0 xi zeta^2 + (3 s - d1) xi^2 zeta + s xi^3),
//   f' = d0 zeta^2 + 2 (3 s - d0 - d1) xi zeta + d1 xi^2.
#pragma once

#include "spline/spline_bins.h"

PFK_BEGIN

// The derivative at a knot from the slopes and widths on both sides, and its derivatives by these.
template <class V>
struct Steffen {
  V value, by_left, by_right, by_left_width, by_right_width;
};

template <class V>
PFK_HD Steffen<V> steffen(V left, V right, V left_width, V right_width) {
  using T = Lane<V>;
  const V both = V(T(1)) / (left_width + right_width), zero = T(0), two = T(2);
  const V mean = (right_width * left + left_width * right) * both;
  const auto smaller = left < right;
  const V limit = two * select(smaller, left, right);
  const auto limited = limit < mean;
  return {
      select(limited, limit, mean), select(limited, select(smaller, two, zero), right_width * both),
      select(limited, select(smaller, zero, two), left_width * both),
      select(limited, zero, (right - mean) * both), select(limited, zero, (left - mean) * both)};
}

template <class V>
struct CubicBin {
  Axis<AnySpline, V> x, y;
  Place<V> place;         // [0]: of the axis on which the input lies
  V before[2], after[2];  // the e of the bins before and after, of x and of y
  V w, h, s;
  V w_before, w_after, s_before, s_after;
  Steffen<V> left, right;  // at the ends of the bin, where they are inner knots
  V share0, share1;        // at the outer knots: sigmoids
  V d0, d1;
  MaskOf<V> first, last;
  Ends<V> ends;
  V v, xi, out;
};

template <class V>
PFK_HD V cubic_rise(V xi, V s, V d0, V d1) {
  using T = Lane<V>;
  const V zeta = V(T(1)) - xi;
  return xi * (d0 * zeta * zeta + xi * ((V(T(3)) * s - d1) * zeta + s * xi));
}
template <class V>
PFK_HD V cubic_slope(V xi, V s, V d0, V d1) {
  using T = Lane<V>;
  const V zeta = V(T(1)) - xi;
  const V f = d0 * zeta * zeta + V(T(2)) * (V(T(3)) * s - d0 - d1) * xi * zeta + d1 * xi * xi;
  return max_(f, V(least_number<T>()));
}

// Newton's steps within a bracket; every third step halves it, so that a fixed number is enough.
template <class V>
PFK_HD V cubic_root(V rise, V s, V d0, V d1) {
  using T = Lane<V>;
  constexpr int kSteps = sizeof(T) == 4 ? 33 : 60;
  V low = T(0), high = T(1);
  V xi = max_(min_(rise / s, high), low);
  for (int i = 0; i < kSteps; ++i) {
    const V value = cubic_rise(xi, s, d0, d1);
    const auto up = value < rise;
    low = select(up, xi, low), high = select(up, high, xi);
    const V step = xi - (value - rise) / cubic_slope(xi, s, d0, d1);
    const V middle = (low + high) * V(T(0.5));
    xi = i % 3 == 2 && i < kSteps - 6 ? middle
                                      : select(mask_and(step >= low, step <= high), step, middle);
  }
  return xi;
}

template <class V, class Tile>
PFK_HD CubicBin<V> cubic_bin(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  using T = Lane<V>;
  using C = AnySpline;
  const int bins = m.bins;
  CubicBin<V> b;
  b.x = normalized_sizes<C, V>(m, t, 0, 0), b.y = normalized_sizes<C, V>(m, t, 1, bins);
  b.v = v;
  b.before[0] = b.before[1] = V(T(1));  // where there is no bin
  b.after[0] = t.get(1), b.after[1] = t.get(bins + 1);
  b.place = find<C, V>(m, t, v, choose(m.inverse, b.y, b.x), choose(m.inverse, b.x, b.y),
                       [&](auto reached, int j) {
                         const int next = j + 1 < bins ? j + 1 : j;
                         for (int i = 0; i < 2; ++i) {
                           b.before[i] = select(reached, t.get(i * bins + j - 1), b.before[i]);
                           b.after[i] = select(reached, t.get(i * bins + next), b.after[i]);
                         }
                       });
  auto size = [&](const Axis<C, V>& a, V e) { return size_of_bin(m, e * a.rate + V(a.least)); };
  b.w = size(b.x, b.place.size_of(m.inverse)), b.h = size(b.y, b.place.size_of(!m.inverse)),
  b.s = slope_of_bin(m, b.h / b.w);
  b.w_before = size(b.x, b.before[0]), b.w_after = size(b.x, b.after[0]);
  b.s_before = slope_of_bin(m, size(b.y, b.before[1]) / b.w_before);
  b.s_after = slope_of_bin(m, size(b.y, b.after[1]) / b.w_after);
  b.left = steffen(b.s_before, b.s, b.w_before, b.w);
  b.right = steffen(b.s, b.s_after, b.w, b.w_after);
  b.share0 = sigmoid_(t.get(2 * bins)), b.share1 = sigmoid_(t.get(2 * bins + 1));
  b.first = b.place.bin == T(0), b.last = b.place.bin == T(bins - 1);
  b.d0 = select(b.first, V(T(3)) * b.share0 * b.s, b.left.value);
  b.d1 = select(b.last, V(T(3)) * b.share1 * b.s, b.right.value);
  b.ends = ends_of(v, V(m.low), V(m.high));
  const V from = v - b.place.start[0], zero = T(0), one = T(1);
  if (m.inverse) {
    b.xi = cubic_root(max_(min_(from / b.h, one), zero) * b.s, b.s, b.d0, b.d1);
    b.out = b.place.start[1] + b.w * b.xi;
  } else {
    b.xi = max_(min_(from / b.w, one), zero);
    b.out = b.place.start[1] + b.w * cubic_rise(b.xi, b.s, b.d0, b.d1);
  }
  b.out = max_(min_(b.out, V(m.high)), V(m.low));
  return b;
}

template <class V, class Tile>
PFK_HD SplineValue<V> cubic_apply(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  const CubicBin<V> b = cubic_bin(m, t, v);
  const V log_slope = log_(cubic_slope(b.xi, b.s, b.d0, b.d1));
  return with_tails<AnySpline>(m, b.ends, v, b.out, log_slope, b.d0, b.d1, V(m.low), V(m.high));
}

// Gradients of raw sizes from those of the bin and of its two neighbours.
template <class V, class Tile>
PFK_HD void neighbour_gradients(const SplineMap<Lane<V>>& m, Tile& t, const Axis<AnySpline, V>& a,
                                const Place<V>& p, bool other, V e_before, V e_after, V grad_start,
                                V grad_before, V grad_size, V grad_after) {
  using T = Lane<V>;
  const V mean = (grad_start * p.before_of(other) + grad_before * e_before +
                  grad_size * p.size_of(other) + grad_after * e_after) /
                 a.sum;
  const V factor = a.rate * V(m.scale), zero = T(0);
  for (int j = 0; j < m.bins; ++j) {
    const V place = V(T(j));
    V g = select(p.bin > place, grad_start, zero);
    g = g + select(p.bin == place + V(T(1)), grad_before, zero);
    g = g + select(p.bin == place, grad_size, zero);
    g = g + select(p.bin == place - V(T(1)), grad_after, zero);
    t.put(a.first + j, (g - mean) * factor * t.get(a.first + j));
  }
}

template <class V, class Tile>
PFK_HD V cubic_vjp(const SplineMap<Lane<V>>& m, Tile& t, V v, V grad_out, V grad_log) {
  using T = Lane<V>;
  const CubicBin<V> b = cubic_bin(m, t, v);
  const V zero = T(0), two = T(2), three = T(3), xi = b.xi, zeta = V(T(1)) - xi;
  const V slope = cubic_slope(xi, b.s, b.d0, b.d1), over = V(T(1)) / slope;
  const V of_log = select(slope > V(least_number<T>()), over, zero);  // constant at its least
  const V log_by_x =
      two * (b.d1 * xi - b.d0 * zeta + (three * b.s - b.d0 - b.d1) * (zeta - xi)) * of_log / b.w;
  SplineGrad<V> g;
  g.in =
      m.inverse ? (grad_out - grad_log * log_by_x) * over : grad_out * slope + grad_log * log_by_x;
  const V gy = m.inverse ? -g.in : grad_out, gl = m.inverse ? -grad_log : grad_log;
  const V gx = m.inverse ? -grad_out : g.in, rise = gy * b.w;
  V by_s = rise * xi * xi * (three - two * xi) + gl * V(T(6)) * xi * zeta * of_log;
  g.d0 = rise * xi * zeta * zeta + gl * zeta * (zeta - two * xi) * of_log;
  g.d1 = gl * xi * (xi - two * zeta) * of_log - rise * xi * xi * zeta;
  g.start_x = -gx, g.start_y = gy;
  g.size_x = gy * cubic_rise(xi, b.s, b.d0, b.d1) - xi * gx;
  g.size_y = zero;
  tail_grad<AnySpline>(m, b.ends, v, b.d0, b.d1, grad_out, grad_log, g);
  by_s = select(b.ends.outside, zero, by_s);
  // the derivatives at the ends depend on slopes and widths of this bin and its neighbours
  const V left = select(b.first, zero, g.d0), right = select(b.last, zero, g.d1);
  const V begin = select(b.first, g.d0, zero), end = select(b.last, g.d1, zero);
  by_s = by_s + left * b.left.by_right + right * b.right.by_left +
         three * (begin * b.share0 + end * b.share1);
  const V by_before = left * b.left.by_left, by_after = right * b.right.by_right;
  const V size_x =
      g.size_x + left * b.left.by_right_width + right * b.right.by_left_width - by_s * b.s / b.w;
  const V before_x = left * b.left.by_left_width - by_before * b.s_before / b.w_before;
  const V after_x = right * b.right.by_right_width - by_after * b.s_after / b.w_after;
  neighbour_gradients(m, t, b.x, b.place, m.inverse, b.before[0], b.after[0], g.start_x, before_x,
                      size_x, after_x);
  neighbour_gradients(m, t, b.y, b.place, !m.inverse, b.before[1], b.after[1], g.start_y,
                      by_before / b.w_before, by_s / b.w, by_after / b.w_after);
  const V one = T(1);
  t.put(2 * m.bins, begin * three * b.s * b.share0 * (one - b.share0));
  t.put(2 * m.bins + 1, end * three * b.s * b.share1 * (one - b.share1));
  return g.in;
}

PFK_END
