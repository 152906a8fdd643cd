// SPDX-License-Identifier: Apache-2.0
// Piecewise linear splines (Müller et al. 2019): bins of equal width, whose heights alone have
// parameters.
#pragma once

#include "spline/spline_bins.h"

PFK_BEGIN

template <class V>
struct LinearBin {
  Axis<AnySpline, V> y;
  V bin, before, size;  // of the axis of y
  V slope, width, out, v;
  Ends<V> ends;
};

template <class V, class Tile>
PFK_HD LinearBin<V> linear_bin(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  using T = Lane<V>;
  using C = AnySpline;
  using Sum = SumOf<C, V>;
  const V low = V(m.low), high = V(m.high);
  LinearBin<V> b;
  b.y = normalized_sizes<C, V>(m, t, 1, 0);
  b.v = v = m.tails == kCircular ? wrap(v, low, high) : v;
  b.width = (high - low) / V(T(m.bins));
  b.bin = V(T(0)), b.size = t.get(0);
  Sum before = Sum::zero(), before_bin = before;
  V size = b.size;
  for (int j = 1; j < m.bins; ++j) {
    before.add(size);
    size = t.get(j);
    const V knot = m.inverse ? before.value() * b.y.rate + (low + V(T(j) * b.y.least))
                             : low + b.width * V(T(j));
    const auto reached = v >= knot;
    b.bin = select(reached, V(T(j)), b.bin);
    before_bin = select_sum(reached, before, before_bin);
    b.size = select(reached, size, b.size);
  }
  b.before = before_bin.value();
  const V start = start_of(b.y, b.bin, before_bin, m.bins), x0 = low + b.bin * b.width;
  b.slope = slope_of_bin(m, (b.size * b.y.rate + V(b.y.least)) / b.width);
  // a flat bin must not leave its own width
  const V from = max_(min_((v - start) / b.slope, b.width), V(T(0)));
  b.out = m.inverse ? x0 + from : start + (v - x0) * b.slope;
  b.out = max_(min_(b.out, high), low);
  b.ends = ends_of(v, low, high);
  return b;
}

template <class V, class Tile>
PFK_HD SplineValue<V> linear_apply(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  const LinearBin<V> b = linear_bin(m, t, v);
  return with_tails<AnySpline>(m, b.ends, b.v, b.out, log_(b.slope), b.slope, b.slope, V(m.low),
                               V(m.high));
}

template <class V, class Tile>
PFK_HD V linear_vjp(const SplineMap<Lane<V>>& m, Tile& t, V v, V grad_out, V grad_log) {
  using T = Lane<V>;
  const LinearBin<V> b = linear_bin(m, t, v);
  const V zero = T(0), x = m.inverse ? b.out : b.v;
  SplineGrad<V> g{};
  g.in = m.inverse ? grad_out / b.slope : grad_out * b.slope;
  g.start_y = m.inverse ? -g.in : grad_out;
  g.d0 =
      g.start_y * (x - (V(m.low) + b.bin * b.width)) + (m.inverse ? -grad_log : grad_log) / b.slope;
  g.d1 = zero;
  tail_grad<AnySpline>(m, b.ends, b.v, b.slope, b.slope, grad_out, grad_log, g);
  size_gradients<AnySpline, V>(m, t, b.y, b.bin, b.before, b.size, g.start_y,
                               (g.d0 + g.d1) / b.width, zero);
  return g.in;
}

PFK_END
