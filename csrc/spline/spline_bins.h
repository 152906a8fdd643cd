// SPDX-License-Identifier: Apache-2.0
// The bins of a spline: sizes from raw numbers, the bin of an element, and gradients of raw sizes.
//
// Bin j of an axis has the size  least + rate e_j,  where e_j is an exponential (softmax) or a
// softplus, and starts at  low + j least + rate (e_0 + ... + e_{j-1}).  So normalising takes one
// division and a knot one multiplication, and the size of a bin is as accurate as e_j, however
// small it is: a difference of two knots would lose a small bin.
#pragma once

#include "spline/spline.h"

PFK_BEGIN

// ---- sums of the sizes before a bin -------------------------------------------------------------
// Kahan's sum: its error is at most two roundings of the total for any number of terms.
template <class V>
struct CarefulSum {
  V total, lost;

  static PFK_HD V scaled(V e) { return e; }
  static PFK_HD CarefulSum zero() { return {V(Lane<V>(0)), V(Lane<V>(0))}; }
  PFK_HD void add(V e) {
    const V term = e - lost, next = total + term;
    lost = (next - total) - term;
    total = next;
  }
  PFK_HD V value() const { return total; }
};
template <class V, class M>
PFK_HD CarefulSum<V> select_sum(M mask, const CarefulSum<V>& a, const CarefulSum<V>& b) {
  return {select(mask, a.total, b.total), V(Lane<V>(0))};
}
template <class V>
PFK_HD CarefulSum<V> choose_sum(bool first, const CarefulSum<V>& a, const CarefulSum<V>& b) {
  return {first ? a.total : b.total, first ? a.lost : b.lost};
}
template <class V>
PFK_HD V rest_of(const CarefulSum<V>& whole, const CarefulSum<V>& part) {
  return whole.total - part.total;  // exact where part is more than half
}

// In fixed point: exact but for the digits of e below 2^-27, and faster: an addition of integers
// takes one cycle.  For up to 8 terms, none above 1.
#if !defined(__CUDACC__)
struct FixedSum {
  using V = Vec<float>;
  Vec<float>::RawInt total;

  static PFK_HD V scaled(V e) { return e * V(134217728.0f); }
  static PFK_HD FixedSum zero() { return {Vec<float>::RawInt{}}; }
  PFK_HD void add(V e) {
    total = plus_bits<float>(total, __builtin_convertvector(e.v, Vec<float>::RawInt));
  }
  PFK_HD V value() const { return V(__builtin_convertvector(total, Vec<float>::Raw)); }
};
static PFK_HD FixedSum select_sum(Mask<float> mask, const FixedSum& a, const FixedSum& b) {
  return {mask.m ? a.total : b.total};
}
static PFK_HD FixedSum choose_sum(bool first, const FixedSum& a, const FixedSum& b) {
  return first ? a : b;
}
static PFK_HD Vec<float> rest_of(const FixedSum& whole, const FixedSum& part) {
  return FixedSum{minus_bits<float>(whole.total, part.total)}.value();
}
#endif

template <class C, class V>
struct SumType {
  using type = CarefulSum<V>;
};
#if !defined(__CUDACC__)
template <int kParameters, int kTails>
struct SumType<SplineConfig<8, kParameters, kTails>, Vec<float>> {
  using type = FixedSum;
};
#endif
template <class C, class V>
using SumOf = typename SumType<C, V>::type;

// ---- the bins of an axis -----------------------------------------------------------------------
template <class C, class V>
struct Axis {
  int first;  // column
  V low, high, rate, sum;
  Lane<V> least;
  SumOf<C, V> whole;

  PFK_HD V span(int bins) const { return sum * rate + V(Lane<V>(bins) * least); }
};

// u f with f = 1 / (1 + |u| clip); its derivative is f^2.  For large |u| it is computed as the
// limit 1 / clip less the difference to it, which halves the effect of rounding errors of f.
template <class V>
struct Clipped {
  V value, factor;
};
template <class V>
PFK_HD Clipped<V> softclip(V u, Lane<V> clip) {
  using T = Lane<V>;
  const V size = abs_(u * V(clip)), factor = V(T(1)) / (V(T(1)) + size), limit = T(1) / clip;
  return {select(size > V(T(1)), copysign_(limit - limit * factor, u), u * factor), factor};
}

// Returns a or b, member by member: a choice between two addresses would force them into memory on
// a GPU.
template <class C, class V>
PFK_HD Axis<C, V> choose(bool first, const Axis<C, V>& a, const Axis<C, V>& b) {
  return {first ? a.first : b.first,
          first ? a.low : b.low,
          first ? a.high : b.high,
          first ? a.rate : b.rate,
          first ? a.sum : b.sum,
          first ? a.least : b.least,
          choose_sum(first, a.whole, b.whole)};
}

// Replaces raw sizes by exponentials (softclip: and stores its factors in the scratch columns), and
// returns what turns these into sizes.
template <class C, class V, class Tile>
PFK_HD Axis<C, V> normalized_sizes(const SplineMap<Lane<V>>& m, Tile& t, int axis, int first) {
  using T = Lane<V>;
  using Sum = SumOf<C, V>;
  const int bins = C::bins(m);
  Axis<C, V> a{first, V(m.low), V(m.high), V(T(1)), V(T(0)), m.least[axis], Sum::zero()};
  if (C::free_sizes(m)) {
    for (int j = 0; j < bins; ++j) {
      const V size = softplus_with_slope(t.get(first + j) * V(m.scale) + V(m.shift[axis])).value;
      t.put(first + j, size);
      a.whole.add(size);
    }
    a.sum = a.whole.value();
    a.low = t.get(m.domain + 1 - axis) - V(m.bound);
    a.high = a.low + a.span(bins);
    return a;
  }
  if (C::parameters(m, kSoftclip)) {
    PFK_UNROLL_ON_CPU(8)
    for (int j = 0; j < bins; ++j) {
      const Clipped<V> u = softclip(t.get(first + j), m.clip);
      t.put(first + j, u.value);
      t.put(m.columns + first + j, u.factor);
    }
  }
  V top = t.get(first);
  PFK_UNROLL_ON_CPU(8)
  for (int j = 1; j < bins; ++j) top = max_(top, t.get(first + j));
  // the difference first: it is exact where the result is not small
  PFK_UNROLL_ON_CPU(8)
  for (int j = 0; j < bins; ++j) {
    const V e = Sum::scaled(exp2_below((t.get(first + j) - top) * V(m.exponent)));
    t.put(first + j, e);
    a.whole.add(e);
  }
  a.sum = a.whole.value();
  a.rate = V(m.room[axis]) / a.sum;
  if (C::parameters(m, kDomain)) {
    a.high = V(m.bound) * softplus_with_slope(t.get(m.domain) + V(m.domain_shift)).value;
    a.low = -a.high;
    a.rate = (a.high - a.low) / a.sum;
  }
  return a;
}

// ---- finding the bin ---------------------------------------------------------------------------
// The bin of an element.  [0] belongs to the axis that was searched, [1] to the other one: the sum
// of e before the bin, and the e of the bin.
template <class V>
struct Place {
  V bin;  // its number
  V before[2], size[2];
  V start[2], end[2];

  // no index at run time: it would force the arrays into memory on a GPU
  PFK_HD V before_of(bool other) const { return other ? before[1] : before[0]; }
  PFK_HD V size_of(bool other) const { return other ? size[1] : size[0]; }
};

// Where a bin starts, measured from the nearer end of the interval, which halves the effect of
// rounding errors of the rate.
template <class C, class V>
PFK_HD V start_of(const Axis<C, V>& a, V bin, const SumOf<C, V>& before, int bins) {
  using T = Lane<V>;
  const V rest = rest_of(a.whole, before), value = before.value();
  const auto far = value > rest;
  const V from = select(far, a.high - V(T(bins) * a.least), a.low);
  return select(far, -rest, value) * a.rate + (bin * V(a.least) + from);
}

// Calls picked(mask, j) for every inner knot j; the mask tells the lanes with v beyond it.
template <class C, class V, class Tile, class Picked>
PFK_HD Place<V> find(const SplineMap<Lane<V>>& m, Tile& t, V v, const Axis<C, V>& in,
                     const Axis<C, V>& out, Picked picked) {
  using T = Lane<V>;
  using Sum = SumOf<C, V>;
  const int bins = C::bins(m);
  Place<V> p{};
  p.bin = V(T(0));
  Sum before = Sum::zero(), other = before, before_bin = before, other_before_bin = before;
  V size = t.get(in.first), other_size = t.get(out.first);
  p.size[0] = size, p.size[1] = other_size;
  PFK_UNROLL_ON_CPU(8)
  for (int j = 1; j < bins; ++j) {
    before.add(size), other.add(other_size);
    size = t.get(in.first + j), other_size = t.get(out.first + j);
    const auto reached = v >= before.value() * in.rate + (in.low + V(T(j) * in.least));
    p.bin = select(reached, V(T(j)), p.bin);
    before_bin = select_sum(reached, before, before_bin);
    other_before_bin = select_sum(reached, other, other_before_bin);
    p.size[0] = select(reached, size, p.size[0]);
    p.size[1] = select(reached, other_size, p.size[1]);
    picked(reached, j);
  }
  const V next = p.bin + V(T(1));
  p.before[0] = before_bin.value(), p.before[1] = other_before_bin.value();
  p.start[0] = start_of(in, p.bin, before_bin, bins);
  p.start[1] = start_of(out, p.bin, other_before_bin, bins);
  before_bin.add(p.size[0]), other_before_bin.add(p.size[1]);
  p.end[0] = start_of(in, next, before_bin, bins),
  p.end[1] = start_of(out, next, other_before_bin, bins);
  return p;
}

// ---- gradients of raw sizes --------------------------------------------------------------------
// The gradients of raw sizes from those of the start and the size of the bin, and from grad_all,
// which every size has (learned intervals only).  The sizes before the bin move its start; those
// after it have no effect.
template <class C, class V, class Tile>
PFK_HD void size_gradients(const SplineMap<Lane<V>>& m, Tile& t, const Axis<C, V>& a, V bin,
                           V before, V size, V grad_start, V grad_size, V grad_all) {
  using T = Lane<V>;
  const int bins = C::bins(m);
  if (C::free_sizes(m)) {
    const V start = (grad_start + grad_all) * V(m.scale), own = (grad_size + grad_all) * V(m.scale),
            all = grad_all * V(m.scale);
    for (int j = 0; j < bins; ++j) {
      const V g = select(bin > V(T(j)), start, select(bin == V(T(j)), own, all));
      t.put(a.first + j,
            g * derivatives_from_value<Activation::kSoftplus>(t.get(a.first + j)).slope);
    }
    return;
  }
  const V mean = (grad_start * before + grad_size * size) / a.sum, factor = a.rate * V(m.scale);
  const V start = (grad_start - mean) * factor, own = (grad_size - mean) * factor,
          none = -mean * factor;
  PFK_UNROLL_ON_CPU(8)
  for (int j = 0; j < bins; ++j) {
    V g = select(bin > V(T(j)), start, select(bin == V(T(j)), own, none)) * t.get(a.first + j);
    if (C::parameters(m, kSoftclip)) {
      const V clipped = t.get(m.columns + a.first + j);
      g = g * clipped * clipped;
    }
    t.put(a.first + j, g);
  }
}

PFK_END
