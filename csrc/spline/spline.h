// SPDX-License-Identifier: Apache-2.0
// Monotonic splines: what all kinds share.
//
// The raw parameters of an element lie in a tile: a table with a column for each of them, whose
// entries are of type V.  V is a scalar (CUDA), or a Vec of as many elements as it has lanes (CPU).
// The functions below overwrite the tile: raw sizes become exponentials, and a VJP leaves the
// gradients in the place of the parameters.
#pragma once

#include "core/codes.h"
#include "core/softmax.h"

// Plain data is the same for every SIMD level.
namespace pfk {

// Which spline: what a SplineMap of Python says, but for its numbers.
struct SplineForm {
  int kind, tails, parameters, bins;
};

struct SplineNumbers {
  double bound, min_width, min_height, min_derivative, scale, edge;
};

// Everything that is the same for all elements, in the type computed in.
template <class T>
struct SplineMap {
  int kind, tails, parameters, bins;
  int columns;  // raw parameters of an element
  int scratch;  // columns for intermediate results, behind them
  int domain;   // first column of the learned interval
  int knot;     // column of the derivative (quadratic: density) of knot j is knot + j
  bool inverse;
  bool any_slope;  // bins may be so small that the square of a slope leaves the range of T
  T low, high;     // the interval, unless learned
  T least[2],
      room[2];        // of widths and heights: the least size, and what the exponentials divide up
  T shift[2];         // sizes of a learned interval: softplus(shift) is the default
  T exponent, scale;  // scale log2 e; scale
  T min_derivative, derivative_shift;
  T clip, derivative_clip;
  T bound, domain_shift, edge, floor;  // floor: least density of a quadratic spline
};

inline double softplus_inverse(double v) { return v + ::log(-::expm1(-v)); }

template <class T>
SplineMap<T> spline_map(const SplineNumbers& n, const SplineForm& form, bool inverse) {
  SplineMap<T> m{};
  const int bins = form.bins;
  m.kind = form.kind, m.tails = form.tails, m.parameters = form.parameters, m.bins = bins;
  m.inverse = inverse;
  const bool learned = m.parameters == kDomain, free = learned && m.tails == kAffineTails;
  const double low = m.tails == kNoTails ? 0 : -n.bound, high = m.tails == kNoTails ? 1 : n.bound;
  const double least[2] = {n.min_width, n.min_height}, span = high - low;
  m.low = T(low), m.high = T(high), m.bound = T(n.bound);
  for (int i = 0; i < 2; ++i) {
    const double size = m.parameters == kSoftclip || (learned && !free) ? 0 : least[i];
    const double whole = m.kind == kQuadratic ? 1 : span;  // quadratic: on the unit interval
    m.least[i] = T(free ? size : whole * size);
    m.room[i] = T(whole * (1 - bins * size));
    m.shift[i] = free ? T(softplus_inverse(2 * n.bound / bins - least[i])) : T(0);
  }
  const int inner = m.tails == kIdentityTails ? bins - 1 : m.tails == kCircular ? bins : bins + 1;
  m.domain = 2 * bins;
  m.knot = m.domain + (learned ? (free ? 2 : 1) : 0);
  m.columns = m.knot + (learned ? bins - 1 : inner);
  if (m.kind == kLinearSpline) m.columns = bins, m.knot = bins;
  if (m.kind == kQuadratic) m.knot = bins, m.columns = bins + inner;
  if (m.kind == kCubic) m.columns = 2 * bins + 2;
  if (m.tails == kIdentityTails || learned) --m.knot;  // the first knot has no raw derivative
  m.scratch = m.parameters == kSoftclip ? 2 * bins : m.kind == kQuadratic ? 2 * bins + 2 : 0;
  m.exponent = T(n.scale * 1.44269504088896340736), m.scale = T(n.scale);
  m.min_derivative = T(n.min_derivative);
  m.derivative_shift = learned ? T(softplus_inverse(1 - n.min_derivative)) : T(0);
  m.domain_shift = T(softplus_inverse(1));
  if (m.parameters == kSoftclip) {
    m.derivative_clip = T(-1 / ::log(n.min_derivative));
    m.clip = m.derivative_clip * T(2);
  }
  m.any_slope = m.parameters != kSoftclip && (m.least[0] < T(1e-6) || m.least[1] < T(1e-6));
  m.edge = T(n.edge), m.floor = T(n.min_height);
  return m;
}

}  // namespace pfk

PFK_BEGIN

// What a kernel is compiled for.  0 bins, or a negative choice: what the map says at run time.
template <int kBins, int kParameters, int kTails>
struct SplineConfig {
  template <class T>
  static PFK_HD int bins(const SplineMap<T>& m) {
    return kBins > 0 ? kBins : m.bins;
  }
  template <class T>
  static PFK_HD bool parameters(const SplineMap<T>& m, int which) {
    return (kParameters >= 0 ? kParameters : m.parameters) == which;
  }
  template <class T>
  static PFK_HD bool tails(const SplineMap<T>& m, int which) {
    return (kTails >= 0 ? kTails : m.tails) == which;
  }
  // Whether the interval is learned and each size has a parameter of its own, without a softmax.
  template <class T>
  static PFK_HD bool free_sizes(const SplineMap<T>& m) {
    return parameters(m, kDomain) && tails(m, kAffineTails);
  }
};
using AnySpline = SplineConfig<0, -1, -1>;

// ---- tiny bins ---------------------------------------------------------------------------------
// Without a least size (any_slope) bins may underflow.  A size is then the least number, and a
// slope stays where twice its reciprocal, and sums of a few, are finite: log-slopes end at about
// +-85 in float32.
template <class T>
PFK_HD constexpr T least_number() {
  return sizeof(T) == 4 ? T(1.17549435e-38f) : T(2.2250738585072014e-308);
}
template <class V>
PFK_HD V size_of_bin(const SplineMap<Lane<V>>& m, V size) {
  using T = Lane<V>;
  if (!m.any_slope) return size;
  return max_(size, V(least_number<T>()));
}
template <class V>
PFK_HD V slope_of_bin(const SplineMap<Lane<V>>& m, V slope) {
  using T = Lane<V>;
  if (!m.any_slope) return slope;
  const T most = sizeof(T) == 4 ? T(1e37f) : T(1e307);
  return max_(min_(slope, V(most)), V(T(1) / most));
}

// ---- tails -------------------------------------------------------------------------------------
template <class V>
struct Ends {
  V start, end;  // of the axis on which the input lies
  MaskOf<V> below, outside;
};

template <class V>
PFK_HD Ends<V> ends_of(V v, V start, V end) {
  const auto below = v < start;
  return {start, end, below, mask_or(below, v > end)};
}

template <class V>
struct SplineValue {
  V out, log_slope;  // of the direction that is computed
};

// Replaces the results of elements outside of [start, end] by those of the tails.  Outside, the bin
// is the first or the last one, and d0 or d1 the derivative of the tail.
template <class C, class V>
PFK_HD SplineValue<V> with_tails(const SplineMap<Lane<V>>& m, const Ends<V>& e, V v, V out,
                                 V log_slope, V d0, V d1, V low, V high) {
  using T = Lane<V>;
  if (C::tails(m, kIdentityTails)) {
    out = select(e.outside, v, out);
    log_slope = select(e.outside, V(T(0)), log_slope);
  } else if (C::tails(m, kNoTails)) {
    out = select(e.outside, V(T(NAN)), out);
    log_slope = select(e.outside, V(T(NAN)), log_slope);
  } else if (C::tails(m, kAffineTails)) {
    const V d = select(e.below, d0, d1), distance = v - select(e.below, e.start, e.end);
    const V edge = select(e.below, low, high);
    out = select(e.outside, edge + (m.inverse ? distance / d : distance * d), out);
    log_slope = select(e.outside, log_(d), log_slope);
  }
  return {out, m.inverse ? -log_slope : log_slope};
}

// The gradients of one element: of its input, of the start and size of its bin on both axes, and of
// the derivatives at the ends of the bin.
template <class V>
struct SplineGrad {
  V in, start_x, size_x, start_y, size_y, d0, d1;
};

// Replaces the gradients of elements outside by those of the tails.  Where the edges are learned,
// they move with the start.
template <class C, class V>
PFK_HD void tail_grad(const SplineMap<Lane<V>>& m, const Ends<V>& e, V v, V d0, V d1, V grad_out,
                      V grad_log, SplineGrad<V>& g) {
  using T = Lane<V>;
  const V zero = T(0);
  if (C::tails(m, kCircular)) return;
  V in = C::tails(m, kNoTails) ? zero : grad_out, start_x = zero, start_y = zero;
  V first = zero, last = zero;
  if (C::tails(m, kAffineTails)) {  // y = edge_y + d (x - edge_x)
    const V d = select(e.below, d0, d1), distance = v - select(e.below, e.start, e.end);
    const V upstream = m.inverse ? -grad_out / d : grad_out;  // of y
    const V by_d =
        upstream * (m.inverse ? distance / d : distance) + (m.inverse ? -grad_log : grad_log) / d;
    in = m.inverse ? grad_out / d : grad_out * d;
    first = select(e.below, by_d, zero), last = select(e.below, zero, by_d);
    if (C::parameters(m, kDomain)) start_x = -upstream * d, start_y = upstream;
  }
  g.in = select(e.outside, in, g.in);
  g.d0 = select(e.outside, first, g.d0), g.d1 = select(e.outside, last, g.d1);
  g.start_x = select(e.outside, start_x, g.start_x);
  g.start_y = select(e.outside, start_y, g.start_y);
  g.size_x = select(e.outside, zero, g.size_x), g.size_y = select(e.outside, zero, g.size_y);
}

// Circular tails: brings v into [low, high).
template <class V>
PFK_HD V wrap(V v, V low, V high) {
  const V span = high - low;
  const V wrapped = v - span * floor_((v - low) / span);
  return select(mask_and(v >= low, v < high), v, max_(min_(wrapped, high), low));
}

// Brings v into [-bound, bound).
template <class V>
PFK_HD V on_circle(V v, Lane<V> bound) {
  const V turned = wrap(v, V(-bound), V(bound));
  return select(turned >= V(bound), V(-bound), turned);
}

PFK_END
