// SPDX-License-Identifier: Apache-2.0
// Monotonic splines: what all kinds share.  Raw parameters of an element lie in a tile, a table
// with a column for each number that hands out values of type V: a scalar (CUDA), or a Vec of as
// many elements as it has lanes (CPU, and samplers whose parameters lie as [P][samples]).  The
// functors work in place: raw sizes become exponentials, and a VJP leaves the gradients where the
// parameters were.
//
// A bin j of an axis has the size  least + rate e_j,  where e_j is an exponential (softmax) or a
// softplus, and starts at  low + j least + rate (e_0 + ... + e_{j-1}):  normalising takes one
// division, a knot one multiplication, and the bin's size keeps the relative accuracy of e_j.
#pragma once

#include "core/softmax.h"

// Plain data is the same for every SIMD level.
namespace pfk {

enum SplineKind : int { kRational, kLinearSpline, kQuadratic, kCubic };
constexpr int kSplineKinds = 4;
enum SplineTails : int { kIdentityTails, kCircular, kNoTails, kAffineTails };
enum SplineParameters : int { kSoftmax, kSoftclip, kDomain };
enum SplineFlags : int {
  kSplineInverse = 1,
  kSplineElementwise = 2,
  kSplineSwap = 4,
  kSplineCoupling = 8
};
constexpr int kMostBins = 64;

struct SplineNumbers {
  double bound, min_width, min_height, min_derivative, scale, edge;
};

// Everything that is the same for all elements, in the type computed in.
template <class T>
struct SplineMap {
  int kind, tails, parameters, bins;
  int columns;  // raw numbers of an element
  int scratch;  // columns that the functors need beyond them
  int domain;   // first column of the learned interval
  int knot;     // column of the derivative (quadratic: density) of knot j is knot + j
  bool inverse;
  T low, high;          // the interval, unless learned
  T least[2], room[2];  // of widths and heights: least size; what the exponentials share out
  T shift[2];           // learned interval: softplus(shift) is the default size
  T exponent, scale;    // scale log2 e; scale
  T min_derivative, derivative_shift;
  T clip, derivative_clip;
  T bound, domain_shift, edge, floor;  // floor: least density of a quadratic spline
};

inline double softplus_inverse(double v) { return v + ::log(-::expm1(-v)); }

template <class T>
SplineMap<T> spline_map(const SplineNumbers& n, int code, int bins, bool inverse) {
  SplineMap<T> m{};
  m.kind = code % 4, m.tails = code / 4 % 4, m.parameters = code / 16, m.bins = bins;
  m.inverse = inverse;
  const bool learned = m.parameters == kDomain, free = learned && m.tails == kAffineTails;
  const double low = m.tails == kNoTails ? 0 : -n.bound, high = m.tails == kNoTails ? 1 : n.bound;
  const double least[2] = {n.min_width, n.min_height}, span = high - low;
  m.low = T(low), m.high = T(high), m.bound = T(n.bound);
  for (int i = 0; i < 2; ++i) {
    const double size = m.parameters == kSoftclip || (learned && !free) ? 0 : least[i];
    m.least[i] = T(free ? size : span * size);
    m.room[i] = T(span * (1 - bins * size));
    m.shift[i] = free ? T(softplus_inverse(2 * n.bound / bins - least[i])) : T(0);
  }
  const int inner = m.tails == kIdentityTails ? bins - 1 : m.tails == kCircular ? bins : bins + 1;
  m.domain = 2 * bins;
  m.knot = m.domain + (learned ? (free ? 2 : 1) : 0);
  m.columns = m.knot + (learned ? bins - 1 : inner);
  if (m.kind == kLinearSpline) m.columns = bins, m.knot = bins;
  if (m.kind == kQuadratic) m.knot = bins, m.columns = bins + inner;
  if (m.kind == kCubic) m.columns = 2 * bins + 2;
  if (m.tails == kIdentityTails || learned) --m.knot;  // the first knot has none
  m.scratch = m.parameters == kSoftclip ? 2 * bins : m.kind == kQuadratic ? 2 * bins + 2 : 0;
  m.exponent = T(n.scale * 1.44269504088896340736), m.scale = T(n.scale);
  m.min_derivative = T(n.min_derivative);
  m.derivative_shift = learned ? T(softplus_inverse(1 - n.min_derivative)) : T(0);
  m.domain_shift = T(softplus_inverse(1));
  if (m.parameters == kSoftclip) {
    m.derivative_clip = T(-1 / ::log(n.min_derivative));
    m.clip = m.derivative_clip * T(2);
  }
  m.edge = T(n.edge), m.floor = T(n.min_height);
  return m;
}

}  // namespace pfk

#if defined(__CUDACC__)
#define PFK_UNROLL
#else
#define PFK_UNROLL _Pragma("GCC unroll 8")
#endif

PFK_BEGIN

// What is known when a kernel is compiled; negative or 0: at run time.
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
  // The interval is learned, and so is each size by itself.
  template <class T>
  static PFK_HD bool free_sizes(const SplineMap<T>& m) {
    return parameters(m, kDomain) && tails(m, kAffineTails);
  }
};
using AnySpline = SplineConfig<0, -1, -1>;

// ---- the bins of an axis -----------------------------------------------------------------------
template <class V>
struct Axis {
  int first;  // column
  V low, rate, sum;
  Lane<V> least;
};

// Turns raw sizes into exponentials; leaves the softclip's factors in the scratch columns.
template <class C, class V, class Tile>
PFK_HD Axis<V> spread(const SplineMap<Lane<V>>& m, Tile& t, int axis) {
  using T = Lane<V>;
  const int bins = C::bins(m), first = axis * bins;
  Axis<V> a{first, V(m.low), V(T(1)), V(T(0)), m.least[axis]};
  if (C::free_sizes(m)) {
    for (int j = 0; j < bins; ++j) {
      const V size = softplus_with_slope(t.get(first + j) * V(m.scale) + V(m.shift[axis])).value;
      t.put(first + j, size);
      a.sum = a.sum + size;
    }
    a.low = t.get(m.domain + 1 - axis) - V(m.bound);
    return a;
  }
  if (C::parameters(m, kSoftclip)) {
    PFK_UNROLL
    for (int j = 0; j < bins; ++j) {
      const V u = t.get(first + j), factor = V(T(1)) / (V(T(1)) + abs_(u * V(m.clip)));
      t.put(first + j, u * factor);
      t.put(m.columns + first + j, factor);
    }
  }
  V top = t.get(first);
  PFK_UNROLL
  for (int j = 1; j < bins; ++j) top = max_(top, t.get(first + j));
  const V shift = top * V(m.exponent);
  PFK_UNROLL
  for (int j = 0; j < bins; ++j) {
    const V e = exp2_below(t.get(first + j) * V(m.exponent) - shift);
    t.put(first + j, e);
    a.sum = a.sum + e;
  }
  a.rate = V(m.room[axis]) / a.sum;
  if (C::parameters(m, kDomain)) {
    const V half = V(m.bound) * softplus_with_slope(t.get(m.domain) + V(m.domain_shift)).value;
    a.low = -half;
    a.rate = (half + half) / a.sum;
  }
  return a;
}

template <class V>
PFK_HD V span_of(const Axis<V>& a, int bins) {
  return a.sum * a.rate + V(Lane<V>(bins) * a.least);
}
template <class V>
PFK_HD V end_of(const Axis<V>& a, int bins) {
  return a.low + span_of(a, bins);
}

// ---- finding the bin ---------------------------------------------------------------------------
// Of the axis searched and of the other: what lies before the bin (the sum of e) and its own e.
template <class V>
struct Place {
  V bin;  // its number
  V before[2], size[2];
};

// Calls picked(mask, j) for every inner knot, which v has reached in the lanes of the mask.
template <class C, class V, class Tile, class Picked>
PFK_HD Place<V> find(const SplineMap<Lane<V>>& m, Tile& t, V v, const Axis<V>& in,
                     const Axis<V>& out, Picked picked) {
  using T = Lane<V>;
  const int bins = C::bins(m);
  const V zero = T(0);
  Place<V> p{zero, {zero, zero}, {t.get(in.first), t.get(out.first)}};
  V before = zero, other = zero, size = p.size[0], other_size = p.size[1];
  PFK_UNROLL
  for (int j = 1; j < bins; ++j) {
    before = before + size, other = other + other_size;
    size = t.get(in.first + j), other_size = t.get(out.first + j);
    const auto reached = v >= before * in.rate + (in.low + V(T(j) * in.least));
    p.bin = select(reached, V(T(j)), p.bin);
    p.before[0] = select(reached, before, p.before[0]);
    p.before[1] = select(reached, other, p.before[1]);
    p.size[0] = select(reached, size, p.size[0]);
    p.size[1] = select(reached, other_size, p.size[1]);
    picked(reached, j);
  }
  return p;
}

// ---- gradients of raw sizes --------------------------------------------------------------------
// From those of the bin's start and size, and one of every size alike (a learned interval alone);
// bins before this one moved its start, and bins after it did nothing.
template <class C, class V, class Tile>
PFK_HD void size_gradients(const SplineMap<Lane<V>>& m, Tile& t, const Axis<V>& a, V bin, V before,
                           V size, V grad_start, V grad_size, V grad_all) {
  using T = Lane<V>;
  const int bins = C::bins(m);
  if (C::free_sizes(m)) {
    const V start = (grad_start + grad_all) * V(m.scale), own = (grad_size + grad_all) * V(m.scale),
            all = grad_all * V(m.scale);
    for (int j = 0; j < bins; ++j) {
      const V g = select(bin > V(T(j)), start, select(bin == V(T(j)), own, all));
      t.put(a.first + j, g * -expm1_(-t.get(a.first + j)));  // the slope of softplus
    }
    return;
  }
  const V mean = (grad_start * before + grad_size * size) / a.sum, factor = a.rate * V(m.scale);
  const V start = (grad_start - mean) * factor, own = (grad_size - mean) * factor,
          none = -mean * factor;
  PFK_UNROLL
  for (int j = 0; j < bins; ++j) {
    V g = select(bin > V(T(j)), start, select(bin == V(T(j)), own, none)) * t.get(a.first + j);
    if (C::parameters(m, kSoftclip)) {
      const V clipped = t.get(m.columns + a.first + j);
      g = g * clipped * clipped;
    }
    t.put(a.first + j, g);
  }
}

// ---- tails -------------------------------------------------------------------------------------
template <class V>
using MaskOf = decltype(V() < V());

template <class V>
struct Ends {
  V start, end;  // of the axis searched
  MaskOf<V> below, outside;
};

template <class V>
PFK_HD Ends<V> ends_of(V v, V start, V end) {
  const auto below = v < start;
  return {start, end, below, mask_or(below, v > end)};
}

// Circular tails: into [low, high).
template <class V>
PFK_HD V wrap(V v, V low, V high) {
  const V span = high - low;
  const V wrapped = v - span * floor_((v - low) / span);
  return select(mask_and(v >= low, v < high), v, max_(min_(wrapped, high), low));
}

PFK_END
