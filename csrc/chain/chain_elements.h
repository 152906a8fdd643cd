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
  int64_t feature, param;  // steps
};
template <class T>
ParamRows<T> param_rows(const ChainElements& e, T* params, int64_t width) {
  return {params, e.feature_step * width, e.param_step * width};
}

// log_det += the lanes of a vector of samples.
template <class T>
PFK_HD void add_lanes(Vec<T> v, double* log_det) {
  T lanes[Vec<T>::kLanes];
  v.store(lanes);
  for (int i = 0; i < Vec<T>::kLanes; ++i) log_det[i] += static_cast<double>(lanes[i]);
}

// ---- affine ------------------------------------------------------------------------------------
template <int kKind, class T>
void affine_rows(const ChainElements& e, int64_t begin, int64_t end, int64_t width, int64_t columns,
                 T* x, T* params, double* log_det) {
  using V = Vec<T>;
  const AffineMap<T> m = affine_map<T>(e.scale, e.flags);
  const ParamRows<T> rows = param_rows(e, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    V sum = T(0);
    for (int64_t j = begin; j < end; ++j) {
      T* at = x + e.moved[j] * width + i;
      const T* p = rows.p + j * rows.feature + i;
      const V shift = V::load(p);
      const Scale<V> s = scale_of<kKind>(kKind == kAdditive ? shift : V::load(p + rows.param), m);
      affine_apply(V::load(at), s.factor, shift, m).store(at);
      sum += s.log_factor;
    }
    add_lanes(sum, log_det + i);
  }
}

// The gradients of parameters replace the parameters, and those of the input those of the output.
template <int kKind, class T>
void affine_rows_vjp(const ChainElements& e, int64_t begin, int64_t end, int64_t width,
                     int64_t columns, const T* x, int64_t x_width, T* params, T* grad,
                     const T* grad_log) {
  using V = Vec<T>;
  const AffineMap<T> m = affine_map<T>(e.scale, e.flags);
  const ParamRows<T> rows = param_rows(e, params, width);
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    const V gl = V::load(grad_log + i);
    for (int64_t j = begin; j < end; ++j) {
      T* g = grad + e.moved[j] * width + i;
      T* p = rows.p + j * rows.feature + i;
      const V shift = V::load(p);
      const Scale<V> s = scale_of<kKind>(kKind == kAdditive ? shift : V::load(p + rows.param), m);
      const AffineGrad<V> r =
          affine_vjp(V::load(x + e.moved[j] * x_width + i), shift, V::load(g), gl, s, m);
      r.in.store(g);
      r.shift.store(p);
      if (kKind != kAdditive) r.raw.store(p + rows.param);
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

template <class T>
PFK_HD void load_params(const T* p, int64_t step, int count, T* tile) {
  for (int c = 0; c < count; ++c) Vec<T>::load(p + c * step).store(tile + c * Vec<T>::kLanes);
}

template <int kKind, class C, class T>
void spline_rows(const SplineMap<T>& map, const ChainElements& e, int64_t begin, int64_t end,
                 int64_t width, int64_t columns, T* x, T* params, double* log_det) {
  using V = Vec<T>;
  const SplineMap<T> m = map;  // a copy: the compiler reloads what a reference leads to
  const ParamRows<T> rows = param_rows(e, params, width);
  const int count = static_cast<int>(e.per_feature);
  alignas(64) T memory[kChainColumns * V::kLanes];
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    V sum = T(0);
    for (int64_t j = begin; j < end; ++j) {
      T* at = x + e.moved[j] * width + i;
      load_params(rows.p + j * rows.feature + i, rows.param, count, memory);
      ChainTile<T> tile{memory};
      const SplineValue<V> r = spline_apply<kKind, C>(m, tile, V::load(at));
      r.out.store(at);
      sum += r.log_slope;
    }
    add_lanes(sum, log_det + i);
  }
}

template <int kKind, class C, class T>
void spline_rows_vjp(const SplineMap<T>& map, const ChainElements& e, int64_t begin, int64_t end,
                     int64_t width, int64_t columns, const T* x, int64_t x_width, T* params,
                     T* grad, const T* grad_log) {
  using V = Vec<T>;
  const SplineMap<T> m = map;
  const ParamRows<T> rows = param_rows(e, params, width);
  const int count = static_cast<int>(e.per_feature);
  alignas(64) T memory[kChainColumns * V::kLanes];
  for (int64_t i = 0; i < columns; i += V::kLanes) {
    const V gl = V::load(grad_log + i);
    for (int64_t j = begin; j < end; ++j) {
      T* g = grad + e.moved[j] * width + i;
      T* p = rows.p + j * rows.feature + i;
      load_params(p, rows.param, count, memory);
      ChainTile<T> tile{memory};
      const V in = V::load(x + e.moved[j] * x_width + i);
      spline_vjp<kKind, C>(m, tile, in, V::load(g), gl).store(g);
      for (int c = 0; c < count; ++c) {
        V::load(memory + c * V::kLanes).store(p + c * rows.param);
      }
    }
  }
}

// ---- either ------------------------------------------------------------------------------------
// The spline of a step that has one.
template <class T>
SplineMap<T> spline_of(const ChainElements& e) {
  if (e.family == kAffineElements) return {};
  return spline_map<T>(e.spline, e.form, e.inverse);
}

// Moves features [begin, end) of `moved` in x, whose rows lie `width` apart as the parameters do,
// and adds to log_det.
template <class T>
void elements_forward(const ChainElements& e, const SplineMap<T>& m, int64_t begin, int64_t end,
                      int64_t width, int64_t columns, T* x, T* params, double* log_det) {
  if (e.family == kAffineElements) {
    with_scale_kind(e.kind, [&](auto kind) {
      affine_rows<decltype(kind)::value>(e, begin, end, width, columns, x, params, log_det);
    });
    return;
  }
  with_spline(m, [&](auto kind, auto config) {
    spline_rows<decltype(kind)::value, decltype(config)>(m, e, begin, end, width, columns, x,
                                                         params, log_det);
  });
}

template <class T>
void elements_backward(const ChainElements& e, const SplineMap<T>& m, int64_t begin, int64_t end,
                       int64_t width, int64_t columns, const T* x, int64_t x_width, T* params,
                       T* grad, const T* grad_log) {
  if (e.family == kAffineElements) {
    with_scale_kind(e.kind, [&](auto kind) {
      affine_rows_vjp<decltype(kind)::value>(e, begin, end, width, columns, x, x_width, params,
                                             grad, grad_log);
    });
    return;
  }
  with_spline(m, [&](auto kind, auto config) {
    spline_rows_vjp<decltype(kind)::value, decltype(config)>(m, e, begin, end, width, columns, x,
                                                             x_width, params, grad, grad_log);
  });
}

}  // namespace

PFK_END
