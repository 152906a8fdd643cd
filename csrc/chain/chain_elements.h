// SPDX-License-Identifier: Apache-2.0
// Affine and spline maps of elements whose parameters lie in rows: forward and VJP.
#pragma once

#include "chain/chain.h"
#include "core/vec.h"
#include "spline/spline_kinds.h"

PFK_BEGIN

namespace {

constexpr int kChainColumns = 5 * kMostBins + 2;  // softclip has the most

// A vector of elements and its parameters: column c at p + c kLanes.
template <class T>
struct ChainTile {
  T* p;
  PFK_HD Vec<T> get(int c) const { return Vec<T>::load(p + c * Vec<T>::kLanes); }
  PFK_HD void put(int c, Vec<T> v) { v.store(p + c * Vec<T>::kLanes); }
};

// Where the parameters of an element lie, in a vector of samples.
template <class T>
struct ParamRows {
  T* p;
  int64_t begin, feature, param;  // the first feature; steps
  PFK_HD T* of(int64_t j) const { return p + (j - begin) * feature; }
};
template <class T>
ParamRows<T> param_rows(const ChainGroup& g, T* params, int64_t width) {
  return {params + g.first * width, g.begin, g.feature_step * width, g.param_step * width};
}

// log_det += the lanes of a vector of samples.
template <class T>
PFK_HD void add_lanes(Vec<T> v, double* log_det) {
  T lanes[Vec<T>::kLanes];
  v.store(lanes);
  for (int i = 0; i < Vec<T>::kLanes; ++i) log_det[i] += static_cast<double>(lanes[i]);
}

// ---- affine ------------------------------------------------------------------------------------
// The scales of a vector of samples.
template <int kKind, class T>
struct ChainScales {
  AffineMap<T> m;
  ParamRows<T> rows;
  Vec<T> mean = T(0);  // what is subtracted of all logarithms

  PFK_HD Vec<T> shift(int64_t j, int64_t i) const { return Vec<T>::load(rows.of(j) + i); }
  PFK_HD Scale<Vec<T>> scale(int64_t j, int64_t i) const {
    const T* p = rows.of(j) + i;
    return scale_of<kKind>(Vec<T>::load(kKind == kAdditive ? p : p + rows.param), m);
  }
  // Scales of which the logarithms have mean 0.
  PFK_HD Scale<Vec<T>> centred_scale(int64_t j, int64_t i) const {
    Scale<Vec<T>> s = scale(j, i);
    s.log_factor = s.log_factor - mean;
    s.factor = exp_(s.log_factor);
    return s;
  }
  void find_mean(const ChainGroup& g, int64_t i) {
    Vec<T> sum = T(0);
    for (int64_t j = g.begin; j < g.end; ++j) sum += scale(j, i).log_factor;
    mean = sum / Vec<T>(static_cast<T>(g.end - g.begin));
  }
};
template <int kKind, class T>
ChainScales<kKind, T> scales_of(const ChainGroup& g, T* params, int64_t width) {
  return {affine_map<T>(g.scale, g.flags), param_rows(g, params, width)};
}

template <int kKind, class T>
void affine_rows(const ChainElements& e, const ChainGroup& g, int64_t begin, int64_t end,
                 int64_t width, int64_t columns, T* x, T* params, double* log_det) {
  using V = Vec<T>;
  const ChainScales<kKind, T> scales = scales_of<kKind>(g, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    V sum = T(0);
    for (int64_t j = begin; j < end; ++j) {
      T* at = x + e.moved[j] * width + i;
      const V shift = scales.shift(j, i);
      const Scale<V> s = scales.scale(j, i);
      affine_apply(V::load(at), s.factor, shift, scales.m).store(at);
      sum += s.log_factor;
    }
    add_lanes(sum, log_det + i);
  }
}

// The gradients of parameters replace the parameters, and those of the input those of the output.
template <int kKind, class T>
void affine_rows_vjp(const ChainElements& e, const ChainGroup& group, int64_t begin, int64_t end,
                     int64_t width, int64_t columns, const T* x, int64_t x_width, T* params,
                     T* grad, const T* grad_log) {
  using V = Vec<T>;
  const ChainScales<kKind, T> scales = scales_of<kKind>(group, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    const V gl = V::load(grad_log + i);
    for (int64_t j = begin; j < end; ++j) {
      T* g = grad + e.moved[j] * width + i;
      T* p = scales.rows.of(j) + i;
      const V shift = V::load(p);
      const Scale<V> s = scales.scale(j, i);
      const AffineGrad<V> r =
          affine_vjp(V::load(x + e.moved[j] * x_width + i), shift, V::load(g), gl, s, scales.m);
      r.in.store(g);
      r.shift.store(p);
      if (kKind != kAdditive) r.raw.store(p + scales.rows.param);
    }
  }
}

// Of all moved features together, since the logarithms of their scales have mean 0: log_det stays.
template <int kKind, class T>
void centred_rows(const ChainElements& e, int64_t width, int64_t columns, T* x, T* params) {
  using V = Vec<T>;
  ChainScales<kKind, T> scales = scales_of<kKind>(*e.group, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    scales.find_mean(*e.group, i);
    for (int64_t j = 0; j < e.moves; ++j) {
      T* at = x + e.moved[j] * width + i;
      const V factor = scales.centred_scale(j, i).factor;
      affine_apply(V::load(at), factor, scales.shift(j, i), scales.m).store(at);
    }
  }
}

template <int kKind, class T>
void centred_rows_vjp(const ChainElements& e, int64_t width, int64_t columns, const T* x,
                      int64_t x_width, T* params, T* grad) {
  using V = Vec<T>;
  ChainScales<kKind, T> scales = scales_of<kKind>(*e.group, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    scales.find_mean(*e.group, i);
    // the gradient of the logarithm of a scale before the mean is subtracted has mean 0, too
    const auto of_element = [&](int64_t j, const Scale<V>& s) {
      const V in = V::load(x + e.moved[j] * x_width + i);
      const V out = V::load(grad + e.moved[j] * width + i);
      const Scale<V> unit = {s.factor, s.log_factor, V(T(1))};
      return affine_vjp(in, scales.shift(j, i), out, V(T(0)), unit, scales.m);
    };
    V mean = T(0);
    for (int64_t j = 0; j < e.moves; ++j) mean += of_element(j, scales.centred_scale(j, i)).raw;
    mean = mean / V(static_cast<T>(e.moves));
    for (int64_t j = 0; j < e.moves; ++j) {
      const Scale<V> s = scales.centred_scale(j, i);
      const AffineGrad<V> r = of_element(j, s);
      T* p = scales.rows.of(j) + i;
      r.in.store(grad + e.moved[j] * width + i);
      r.shift.store(p);
      ((r.raw - mean) * s.slope).store(p + scales.rows.param);
    }
  }
}

// ---- splines -----------------------------------------------------------------------------------
// Calls f(kind, config) with both as constants.
template <class T, class F>
void with_spline(const SplineMap<T>& m, F f) {
  with_spline_kind(m.kind, [&](auto kind) {
    using Common = SplineConfig<8, kSoftmax, kIdentityTails>;
    if constexpr (decltype(kind)::value == kRational) {
      if (m.bins == 8 && m.parameters == kSoftmax && m.tails == kIdentityTails) {
        return f(kind, Common{});
      }
    }
    return f(kind, AnySpline{});
  });
}

// By half a circle, which goes from -bound to bound: (v mod 2 bound) - bound.
template <class V>
PFK_HD V half_turned(V v, Lane<V> bound) {
  using T = Lane<V>;
  const V span = T(2) * bound, rest = v - span * floor_(v / span);
  const V above = select(rest < V(T(0)), rest + span, rest);  // the quotient may have been rounded
  const V turned = select(above > span, above - span, above);
  // angles so large that they are many turns apart may still lie elsewhere
  const V low = select(turned < V(T(0)), V(T(0)), turned);
  return select(low > span, span, low) - V(bound);
}

// A vector of splines, and the half turns of their elements.
//
// From z to x the log-derivative is minus that of the way from x to z: that is another number where
// z lies outside of the interval, since x does not.
template <int kKind, class C, class T>
struct ChainSplines {
  using V = Vec<T>;
  SplineMap<T> m;  // a copy: the compiler reloads what a reference leads to
  ParamRows<T> rows;
  int64_t count;
  bool turned;

  PFK_HD void load(int64_t j, int64_t i, T* tile) const {
    const T* p = rows.of(j) + i;
    for (int64_t c = 0; c < count; ++c) V::load(p + c * rows.param).store(tile + c * V::kLanes);
  }
  PFK_HD SplineValue<V> apply(int64_t j, int64_t i, V v) const {
    alignas(64) T memory[kChainColumns * V::kLanes];
    ChainTile<T> tile{memory};
    load(j, i, memory);
    if (!turned) return spline_apply<kKind, C>(m, tile, v);
    if (!m.inverse) return spline_apply<kKind, C>(m, tile, half_turned(v, m.bound));
    SplineValue<V> r = spline_apply<kKind, C>(m, tile, v);
    r.out = half_turned(r.out, m.bound);
    const Mask<T> outside = abs_(v) > V(m.bound);
    if (any_lane(outside)) {
      load(j, i, memory);
      const V again = half_turned(r.out, m.bound);
      const V slope = spline_apply<kKind, C>(forward_map(), tile, again).log_slope;
      r.log_slope = select(outside, -slope, r.log_slope);
    }
    return r;
  }
  // Returns the gradient of v; those of the parameters replace these.
  PFK_HD V vjp(int64_t j, int64_t i, V v, V grad_out, V grad_log) const {
    alignas(64) T memory[kChainColumns * V::kLanes];
    ChainTile<T> tile{memory};
    load(j, i, memory);
    const V at = turned && !m.inverse ? half_turned(v, m.bound) : v;
    V grad = spline_vjp<kKind, C>(m, tile, at, grad_out, grad_log);
    if (turned && m.inverse && any_lane(abs_(v) > V(m.bound))) {
      alignas(64) T other[kChainColumns * V::kLanes];
      grad = outside_vjp(*this, j, i, v, grad_out, grad_log, grad, memory, other);
    }
    T* p = rows.of(j) + i;
    for (int64_t c = 0; c < count; ++c) V::load(memory + c * V::kLanes).store(p + c * rows.param);
    return grad;
  }

 private:
  PFK_HD SplineMap<T> forward_map() const {
    SplineMap<T> forward = m;
    forward.inverse = false;
    return forward;
  }
  // Takes a copy: an address of the splines that other functions know costs time everywhere.
  static V outside_vjp(const ChainSplines s, int64_t j, int64_t i, V v, V grad_out, V grad_log,
                       V grad, T* tile, T* other) {
    const Mask<T> outside = abs_(v) > V(s.m.bound);
    s.load(j, i, other);
    ChainTile<T> of_other{other};
    const V again = half_turned(half_turned(v, s.m.bound), s.m.bound);
    const V more = spline_vjp<kKind, C>(s.forward_map(), of_other, again, V(T(0)), -grad_log);
    for (int c = 0; c < s.count; ++c) {
      T* p = tile + c * V::kLanes;
      select(outside, of_other.get(c), V::load(p)).store(p);
    }
    return select(outside, grad_out + more, grad);
  }
};
template <int kKind, class C, class T>
ChainSplines<kKind, C, T> splines_of(const SplineMap<T>& map, const ChainElements& e,
                                     const ChainGroup& g, T* params, int64_t width) {
  return {map, param_rows(g, params, width), g.per_feature, e.turned};
}

template <int kKind, class C, class T>
void spline_rows(const SplineMap<T>& map, const ChainElements& e, const ChainGroup& g,
                 int64_t begin, int64_t end, int64_t width, int64_t columns, T* x, T* params,
                 double* log_det) {
  using V = Vec<T>;
  const auto splines = splines_of<kKind, C>(map, e, g, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    V sum = T(0);
    for (int64_t j = begin; j < end; ++j) {
      T* at = x + e.moved[j] * width + i;
      const SplineValue<V> r = splines.apply(j, i, V::load(at));
      r.out.store(at);
      sum += r.log_slope;
    }
    add_lanes(sum, log_det + i);
  }
}

template <int kKind, class C, class T>
void spline_rows_vjp(const SplineMap<T>& map, const ChainElements& e, const ChainGroup& group,
                     int64_t begin, int64_t end, int64_t width, int64_t columns, const T* x,
                     int64_t x_width, T* params, T* grad, const T* grad_log) {
  using V = Vec<T>;
  const auto splines = splines_of<kKind, C>(map, e, group, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    const V gl = V::load(grad_log + i);
    for (int64_t j = begin; j < end; ++j) {
      T* g = grad + e.moved[j] * width + i;
      const V in = V::load(x + e.moved[j] * x_width + i);
      splines.vjp(j, i, in, V::load(g), gl).store(g);
    }
  }
}

// ---- either ------------------------------------------------------------------------------------
template <class T>
SplineMap<T> spline_of(const ChainGroup& g, bool inverse) {
  if (g.family == kAffineElements) return {};
  return spline_map<T>(g.spline, g.form, inverse);
}
// The spline of a step that has one for all features.
template <class T>
SplineMap<T> spline_of(const ChainElements& e) {
  return e.groups == 1 ? spline_of<T>(*e.group, e.inverse) : SplineMap<T>{};
}

// Calls f(group, its spline, begin, end) for the groups of moved features [begin, end).
template <class T, class F>
void each_group(const ChainElements& e, const SplineMap<T>& only, int64_t begin, int64_t end, F f) {
  if (e.groups == 1) return f(*e.group, only, begin, end);
  for (int i = 0; i < e.groups; ++i) {
    const ChainGroup& g = e.group[i];
    const int64_t from = g.begin > begin ? g.begin : begin, to = g.end < end ? g.end : end;
    if (from < to) f(g, spline_of<T>(g, e.inverse), from, to);
  }
}

// Moves features [begin, end) of `moved` in x, whose rows lie `width` apart as the parameters do,
// and adds to log_det.
template <class T>
void elements_forward(const ChainElements& e, const SplineMap<T>& only, int64_t begin, int64_t end,
                      int64_t width, int64_t columns, T* x, T* params, double* log_det) {
  if (e.centred) {
    return with_scale_kind(e.group->kind, [&](auto kind) {
      centred_rows<decltype(kind)::value>(e, width, columns, x, params);
    });
  }
  each_group(
      e, only, begin, end, [&](const ChainGroup& g, const auto& m, int64_t from, int64_t to) {
        if (g.family == kAffineElements) {
          return with_scale_kind(g.kind, [&](auto kind) {
            affine_rows<decltype(kind)::value>(e, g, from, to, width, columns, x, params, log_det);
          });
        }
        with_spline(m, [&](auto kind, auto config) {
          spline_rows<decltype(kind)::value, decltype(config)>(m, e, g, from, to, width, columns, x,
                                                               params, log_det);
        });
      });
}

template <class T>
void elements_backward(const ChainElements& e, const SplineMap<T>& only, int64_t begin, int64_t end,
                       int64_t width, int64_t columns, const T* x, int64_t x_width, T* params,
                       T* grad, const T* grad_log) {
  if (e.centred) {
    return with_scale_kind(e.group->kind, [&](auto kind) {
      centred_rows_vjp<decltype(kind)::value>(e, width, columns, x, x_width, params, grad);
    });
  }
  each_group(e, only, begin, end,
             [&](const ChainGroup& g, const auto& m, int64_t from, int64_t to) {
               if (g.family == kAffineElements) {
                 return with_scale_kind(g.kind, [&](auto kind) {
                   affine_rows_vjp<decltype(kind)::value>(e, g, from, to, width, columns, x,
                                                          x_width, params, grad, grad_log);
                 });
               }
               with_spline(m, [&](auto kind, auto config) {
                 spline_rows_vjp<decltype(kind)::value, decltype(config)>(
                     m, e, g, from, to, width, columns, x, x_width, params, grad, grad_log);
               });
             });
}

}  // namespace

PFK_END
