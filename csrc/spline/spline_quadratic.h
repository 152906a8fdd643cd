// SPDX-License-Identifier: Apache-2.0
// Piecewise quadratic splines (Müller et al. 2019): the integral of a density that is linear in
// each bin, on the unit interval.
//
// Raw densities u_j become softplus(u_j) + 1e-3 and are divided by the area below them,
//   A = sum w_j (u_j + u_{j+1}) / 2,   g_j = floor + (1 - floor) u_j / A.
// With alpha = (x - b) / w:
//   y = c + w (g0 alpha + (g1 - g0) alpha^2 / 2),   f' = g0 + (g1 - g0) alpha.
// With linear tails, the outer two densities are
//   (edge (w_0 u_1 + w_l u_{K-1}) + I) / (1 - edge (w_0 + w_l)),
// where I is the area of the inner bins.
#pragma once

#include "spline/spline_bins.h"

PFK_BEGIN

// The densities at the knots, which the tile holds once they are positive.
template <class V, class Tile>
struct Densities {
  const SplineMap<Lane<V>>& m;
  Tile& t;
  V end;  // of linear tails

  PFK_HD bool ended() const { return m.tails == kIdentityTails; }
  PFK_HD int column(int j) const { return m.knot + (m.tails == kCircular ? j % m.bins : j); }
  PFK_HD V operator()(int j) const {
    return ended() && (j == 0 || j == m.bins) ? end : t.get(column(j));
  }
};

template <class V>
struct QuadraticBin {
  Axis<AnySpline, V> x;
  V end, room_end;  // of linear tails: the density of the ends, and the divisor in it
  V area;
  V bin, w, g0, g1, alpha, out, slope, v;
  Ends<V> ends;
};

template <class V>
PFK_HD V width_of(const Axis<AnySpline, V>& a, V e) {
  return e * a.rate + V(a.least);
}

template <class V, class Tile>
PFK_HD QuadraticBin<V> quadratic_bin(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  using T = Lane<V>;
  const int bins = m.bins;
  const V half = T(0.5), one = T(1), zero = T(0);
  QuadraticBin<V> b;
  b.x = normalized_sizes<AnySpline, V>(m, t, 0, 0);
  b.x.low = zero, b.x.high = one;
  const int first = m.tails == kIdentityTails ? 1 : 0;
  const int past = m.tails == kIdentityTails || m.tails == kCircular ? bins : bins + 1;
  for (int j = first; j < past; ++j)
    t.put(m.knot + j, softplus_with_slope(t.get(m.knot + j)).value + V(T(1e-3)));
  Densities<V, Tile> u{m, t, zero};
  b.room_end = one, b.end = zero;
  if (u.ended()) {
    const V w0 = width_of(b.x, t.get(0)), last = width_of(b.x, t.get(bins - 1));
    V inner = zero;
    for (int j = 1; j < bins - 1; ++j)
      inner = inner + width_of(b.x, t.get(j)) * (u(j) + u(j + 1)) * half;
    b.room_end = one - V(m.edge) * (w0 + last);
    b.end = (V(m.edge) * (w0 * u(1) + last * u(bins - 1)) + inner) / b.room_end;
    u.end = b.end;
  }
  CarefulSum<V> area = CarefulSum<V>::zero();
  for (int j = 0; j < bins; ++j) area.add(width_of(b.x, t.get(j)) * (u(j) + u(j + 1)) * half);
  b.area = area.value();
  const V share = (one - V(m.floor)) / b.area;
  auto density = [&](int j) { return V(m.floor) + u(j) * share; };

  const V low = V(m.low), span = V(m.high) - low;
  b.v = v = m.tails == kCircular ? wrap(v, low, V(m.high)) : v;
  b.ends = ends_of(v, low, V(m.high));
  const V unit = (v - low) / span;
  CarefulSum<V> left = CarefulSum<V>::zero(), below = left;
  V x0 = zero, y0 = zero, g = density(0), next = density(1), w = width_of(b.x, t.get(0));
  b.bin = zero, b.g0 = g, b.g1 = next, b.w = w;
  for (int j = 1; j < bins; ++j) {
    left.add(w), below.add(w * (g + next) * half);
    g = next, next = density(j + 1), w = width_of(b.x, t.get(j));
    const auto reached = unit >= (m.inverse ? below.value() : left.value());
    b.bin = select(reached, V(T(j)), b.bin);
    x0 = select(reached, left.value(), x0), y0 = select(reached, below.value(), y0);
    b.g0 = select(reached, g, b.g0), b.g1 = select(reached, next, b.g1);
    b.w = select(reached, w, b.w);
  }
  const V rise = (unit - y0) / b.w, turn = b.g1 - b.g0;
  if (m.inverse) {
    const V root = sqrt_(max_(b.g0 * b.g0 + (turn + turn) * rise, zero));
    b.alpha = (rise + rise) / (b.g0 + root);
  } else {
    b.alpha = (unit - x0) / b.w;
  }
  b.alpha = max_(min_(b.alpha, one), zero);
  b.slope = b.g0 * (one - b.alpha) + b.g1 * b.alpha;
  const V out =
      m.inverse ? x0 + b.w * b.alpha : y0 + b.w * b.alpha * (b.g0 + turn * half * b.alpha);
  b.out = max_(min_(low + span * out, V(m.high)), low);
  return b;
}

template <class V, class Tile>
PFK_HD SplineValue<V> quadratic_apply(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  const QuadraticBin<V> b = quadratic_bin(m, t, v);
  return with_tails<AnySpline>(m, b.ends, b.v, b.out, log_(b.slope), b.g0, b.g1, V(m.low),
                               V(m.high));
}

// The gradients of the input, and of the bin that an element is in.
template <class V>
PFK_HD SplineGrad<V> quadratic_bin_grad(const SplineMap<Lane<V>>& m, const QuadraticBin<V>& b,
                                        V grad_out, V grad_log) {
  using T = Lane<V>;
  const V half = T(0.5), one = T(1), span = V(m.high - m.low), turn = b.g1 - b.g0, a = b.alpha;
  const V log_by_x = turn / (b.slope * b.w * span);
  SplineGrad<V> g{};
  g.in = m.inverse ? (grad_out - grad_log * log_by_x) / b.slope
                   : grad_out * b.slope + grad_log * log_by_x;
  const V gl = m.inverse ? -grad_log : grad_log;
  const V gx =
      (m.inverse ? -grad_out : g.in) * span;  // by the unit interval, like all that follows
  const V gy = (m.inverse ? -g.in : grad_out) * span;
  g.start_x = -gx, g.start_y = gy;
  g.size_x = gy * a * (b.g0 + turn * half * a) - a * gx;
  g.d0 = gy * b.w * a * (one - half * a) + gl * (one - a) / b.slope;
  g.d1 = gy * b.w * half * a * a + gl * a / b.slope;
  tail_grad<AnySpline>(m, b.ends, b.v, b.g0, b.g1, grad_out, grad_log, g);
  return g;
}

// Gradients of densities and widths, in the scratch columns of the tile, and then those of raw
// parameters.
template <class V, class Tile>
struct QuadraticGradients {
  using T = Lane<V>;
  const SplineMap<T>& m;
  Tile& t;
  const QuadraticBin<V>& b;
  const SplineGrad<V>& g;
  Densities<V, Tile> u;
  int by_width, by_density;  // columns
  V share, half, zero;
  V by_area;  // of the area that all densities share
  V by_end;   // of the density of linear tails
  V mean;     // of the gradients of the widths

  PFK_HD QuadraticGradients(const SplineMap<T>& m_, Tile& t_, const QuadraticBin<V>& b_,
                            const SplineGrad<V>& g_)
      : m(m_),
        t(t_),
        b(b_),
        g(g_),
        u{m_, t_, b_.end},
        by_width(m_.columns),
        by_density(m_.columns + m_.bins),
        share((V(T(1)) - V(m_.floor)) / b_.area),
        half(T(0.5)),
        zero(T(0)) {}

  PFK_HD V width(int j) const { return width_of(b.x, t.get(j)); }
  PFK_HD V middle(int j) const { return (u(j) + u(j + 1)) * half; }

  PFK_HD void densities() {
    const int bins = m.bins;
    V weighted = zero;
    for (int j = 0; j <= bins; ++j) {
      V d = select(b.bin == T(j), g.d0, zero) + select(b.bin == T(j - 1), g.d1, zero);
      if (j > 0) d = d + select(b.bin >= T(j), g.start_y * half * width(j - 1), zero);
      if (j < bins) d = d + select(b.bin > T(j), g.start_y * half * width(j), zero);
      weighted = weighted + d * u(j);
      t.put(by_density + j, d * share);
    }
    by_area = -weighted * share / b.area;
    for (int j = 0; j <= bins; ++j) {
      V d = t.get(by_density + j);
      if (j > 0) d = d + by_area * half * width(j - 1);
      if (j < bins) d = d + by_area * half * width(j);
      t.put(by_density + j, d);
    }
    by_end = zero;
    if (u.ended()) by_end = (t.get(by_density) + t.get(by_density + bins)) / b.room_end;
  }

  PFK_HD void widths() {
    const int bins = m.bins;
    mean = zero;
    for (int j = 0; j < bins; ++j) {
      const V normal = V(m.floor) + middle(j) * share;  // density in the middle of the bin
      V d = select(b.bin > T(j), g.start_x + g.start_y * normal,
                   select(b.bin == T(j), g.size_x, zero));
      d = d + by_area * middle(j);
      if (u.ended()) {
        const bool outer = j == 0 || j == bins - 1;
        d = d + by_end * (outer ? V(m.edge) * (u(j == 0 ? 1 : bins - 1) + b.end) : middle(j));
      }
      mean = mean + d * t.get(j);
      t.put(by_width + j, d);
    }
    mean = mean / b.x.sum;
  }

  // Raw densities: a density is softplus(raw) + 1e-3.
  PFK_HD void raw() {
    const int bins = m.bins, first = u.ended() ? 1 : 0;
    const int past = u.ended() || m.tails == kCircular ? bins : bins + 1;
    for (int j = first; j < past; ++j) {
      V d = t.get(by_density + j);
      if (m.tails == kCircular && j == 0) d = d + t.get(by_density + bins);
      if (u.ended()) {
        d = d + by_end * (j == 1 ? V(m.edge) : half) * width(j - 1);
        d = d + by_end * (j == bins - 1 ? V(m.edge) : half) * width(j);
      }
      const V softplus = u(j) - V(T(1e-3));
      t.put(by_density + j, d * derivatives_from_value<Activation::kSoftplus>(softplus).slope);
    }
    for (int j = first; j < past; ++j) t.put(m.knot + j, t.get(by_density + j));
    for (int j = 0; j < bins; ++j)
      t.put(j, (t.get(by_width + j) - mean) * b.x.rate * V(m.scale) * t.get(j));
  }
};

template <class V, class Tile>
PFK_HD V quadratic_vjp(const SplineMap<Lane<V>>& m, Tile& t, V v, V grad_out, V grad_log) {
  const QuadraticBin<V> b = quadratic_bin(m, t, v);
  const SplineGrad<V> g = quadratic_bin_grad(m, b, grad_out, grad_log);
  QuadraticGradients<V, Tile> gradients(m, t, b, g);
  gradients.densities();
  gradients.widths();
  gradients.raw();
  return g.in;
}

PFK_END
