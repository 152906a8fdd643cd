// SPDX-License-Identifier: Apache-2.0
// Affine transforms of single elements: scale maps, forward, inverse and VJP, for scalars (CUDA)
// and Vecs (CPU).
//
// A scale map sends a raw parameter u to a scale s(u) > 0.  With v = gain u + offset, log s is
//   exp v | clamp tanh(v/clamp) | 0.636 clamp atan(v/clamp) | log(max_scale sigmoid v + eps) |
//   log(softplus v + eps) | v / (1 + |v/clamp|) | 0,
// and two maps have log(softplus(f(gain u) + offset) + eps) with f = asinh or clamp tanh(./clamp).
// An element becomes  y = s x + t,  or with the shift first  y = s (x + t), where t is shift_gain
// times the raw shift.  "reciprocal" means 1/s in place of s, for the inverse direction and for
// layers that divide.
#pragma once

#include <cfloat>
#include <type_traits>

#include "core/activations.h"
#include "core/codes.h"

// Plain data is the same for every SIMD level: it lives outside their namespaces.
namespace pfk {

// No upper limit is the largest finite number: files of compiled graphs hold no infinity.
struct ScaleNumbers {
  double clamp, gain, offset, eps, max_scale, shift_gain;
};

// ---- where the elements lie ---------------------------------------------------------------------
// In each sample the transformed elements form `rows` rows of `length` consecutive elements of x,
// and those that are copied `copy_rows` rows of `copy_length`.  Parameters of consecutive elements
// are `p_step` apart.  All steps count elements.
struct AffineGeometry {
  int64_t samples;
  int64_t rows, length, x_start, x_row, x_sample;
  int64_t copy_rows, copy_length, copy_start, copy_row;
  int64_t shift_start, raw_start, p_row, p_step, p_sample;
  int64_t mask_row, mask_step;  // in the boolean mask [C, *space]
};

// Pointers are to elements of the storage type.  Gradients are null in the forward pass, log-dets
// in the backward pass.
struct AffineArgs {
  AffineGeometry g;
  ScaleNumbers numbers;
  int kind, flags;
  const void* in;   // forward: input; backward: what was kept
  const void* raw;  // null for the additive map
  const void* shift;
  const uint8_t* mask;  // null: every element of a row is transformed
  void* out;            // forward: output; backward: gradient of the input
  const void* grad_out;
  const void* grad_log_det;  // accumulation type
  void* grad_raw;
  void* grad_shift;
  double* partial;        // CPU: log-det of each task, [samples, chunks]
  int64_t chunk, chunks;  // elements of a task, tasks of a sample
};

}  // namespace pfk

PFK_BEGIN

// The numbers in the type of the computation, and what the flags mean.
template <class T>
struct AffineMap {
  T clamp, inverse_clamp, gain, offset, eps, max_scale, log_max_scale, shift_gain;
  T sign;  // log_factor = sign log s
  bool inverse, reciprocal, shift_first, from_output;
};

template <class T>
PFK_HD AffineMap<T> affine_map(const ScaleNumbers& n, int flags) {
  const bool inverse = flags & kInverse, divide = flags & kDivide;
  return {T(n.clamp),
          T(1.0 / n.clamp),
          T(n.gain),
          T(n.offset),
          T(n.eps),
          T(n.max_scale < DBL_MAX ? n.max_scale : double(INFINITY)),
          T(log_(n.max_scale)),
          T(n.shift_gain),
          inverse != divide ? T(-1) : T(1),
          inverse,
          inverse != divide,
          bool(flags & kShiftFirst),
          bool(flags & kFromOutput)};
}

// factor = s or 1/s, log_factor its logarithm, slope = d log_factor / du.
template <class V>
struct Scale {
  V factor, log_factor, slope;
};

// Whether s is the softplus of a function f of the raw parameter that has a formula of its own.
template <int kKind>
constexpr bool kComposed = kKind == kSoftplusAsinh || kKind == kSoftplusTanh;

// Maps with long formulas are computed in two parts: a first transcendental function, and the rest.
// On a CPU one loop for each part is faster than a single loop, whose operations depend on each
// other in too long a chain.
template <int kKind>
constexpr bool kTwoParts =
    kKind == kTanh || kKind == kAtan || kKind == kSigmoid || kKind == kSoftplus || kComposed<kKind>;

template <int kKind, class V>
PFK_HD V first_part(V u, const AffineMap<Lane<V>>& m) {
  const V v = u * V(m.gain) + V(m.offset);
  if constexpr (kKind == kSoftplusAsinh) {
    return asinh_(u * V(m.gain));
  } else if constexpr (kKind == kSoftplusTanh) {
    return tanh_exponential(u * V(m.gain) * V(m.inverse_clamp));
  } else if constexpr (kKind == kTanh) {
    return tanh_exponential(v * V(m.inverse_clamp));
  } else if constexpr (kKind == kAtan) {
    return atan_(v * V(m.inverse_clamp));
  } else if constexpr (kKind == kSigmoid || kKind == kSoftplus) {
    return exp_(-abs_(v));
  } else {
    return v;
  }
}

// log s and d log s / dv of the maps that define log s.
template <int kKind, class V>
PFK_HD Scale<V> bounded_scale(V v, V first, const AffineMap<Lane<V>>& m) {
  using T = Lane<V>;
  if constexpr (kKind == kTanh) {
    const Tanh<V> th = tanh_from(v * V(m.inverse_clamp), first);
    return {V(T(0)), V(m.clamp) * th.value, th.slope};
  } else if constexpr (kKind == kAtan) {
    const V r = v * V(m.inverse_clamp);
    return {V(T(0)), V(T(0.636) * m.clamp) * first, V(T(0.636)) / (V(T(1)) + r * r)};
  } else if constexpr (kKind == kSoftclipScale) {
    const V d = V(T(1)) / (V(T(1)) + abs_(v * V(m.inverse_clamp)));
    return {V(T(0)), v * d, d * d};
  } else {
    return {V(T(0)), v, V(T(1))};
  }
}

// s, log s and d log s / dv of the maps that define s.
template <int kKind, class V>
PFK_HD Scale<V> floored_scale(V v, V e, const AffineMap<Lane<V>>& m) {
  using T = Lane<V>;
  if constexpr (kKind == kSigmoid) {
    const Sigmoid<V> sig = sigmoid_from(v, e);
    const V bounded = V(m.max_scale) * sig.value;
    if (m.eps == T(0)) {
      return {bounded, V(m.log_max_scale) - softplus_from(-v, e).value, sig.rest};
    }
    const V s = bounded + V(m.eps);
    return {s, log_(s), bounded * sig.rest / s};
  } else {  // softplus; for very negative v it is e^v, whose logarithm is v also where e^v
            // underflows
    const Softplus<V> plus = softplus_from(v, e);
    const V s = plus.value + V(m.eps);
    V log_s = log_(s), slope = plus.slope / s;
    if (m.eps == T(0)) {
      log_s = select(v < T(-30), v, log_s);
      slope = select(v < T(-30), V(T(1)), slope);
    }
    const V top = V(m.max_scale);
    return {min_(s, top), select(s > top, V(m.log_max_scale), log_s),
            select(s > top, V(T(0)), slope)};
  }
}

// The same of softplus(f(v) + offset), v = gain u; `first` is asinh v, or what tanh begins with.
template <int kKind, class V>
PFK_HD Scale<V> composed_scale(V v, V first, const AffineMap<Lane<V>>& m) {
  using T = Lane<V>;
  V inner = first, slope;
  if constexpr (kKind == kSoftplusAsinh) {
    slope = V(T(1)) / sqrt_(V(T(1)) + v * v);
  } else {
    const Tanh<V> th = tanh_from(v * V(m.inverse_clamp), first);
    inner = V(m.clamp) * th.value, slope = th.slope;
  }
  inner = inner + V(m.offset);
  Scale<V> s = floored_scale<kSoftplus>(inner, exp_(-abs_(inner)), m);
  s.slope = s.slope * slope;
  return s;
}

template <int kKind, class V>
PFK_HD Scale<V> scale_from(V u, V first, const AffineMap<Lane<V>>& m) {
  using T = Lane<V>;
  const V v = u * V(m.gain) + V(m.offset);
  const T sign = m.sign;
  Scale<V> s = {};
  if constexpr (kKind == kAdditive) {
    return {V(T(1)), V(T(0)), V(T(0))};
  } else if constexpr (kKind == kSigmoid || kKind == kSoftplus || kComposed<kKind>) {
    if constexpr (kComposed<kKind>) {
      s = composed_scale<kKind>(u * V(m.gain), first, m);
    } else {
      s = floored_scale<kKind>(v, first, m);
    }
    if (m.reciprocal) s.factor = V(T(1)) / s.factor;
  } else {
    s = bounded_scale<kKind>(v, first, m);
    if (kKind == kExp && m.eps > T(0)) {
      const V e = exp_(v);
      s.log_factor = log_(e + V(m.eps));
      s.slope = e / (e + V(m.eps));
    }
    s.factor = exp_(s.log_factor * V(sign));
  }
  s.log_factor = s.log_factor * V(sign);
  s.slope = s.slope * V(sign * m.gain);
  return s;
}

template <int kKind, class V>
PFK_HD Scale<V> scale_of(V u, const AffineMap<Lane<V>>& m) {
  return scale_from<kKind>(u, first_part<kKind>(u, m), m);
}

// ---- one element, either direction --------------------------------------------------------------
template <class V>
PFK_HD V affine_apply(V in, V factor, V raw_shift, const AffineMap<Lane<V>>& m) {
  const V t = raw_shift * V(m.shift_gain);
  if (m.inverse) return m.shift_first ? in * factor - t : (in - t) * factor;
  return m.shift_first ? (in + t) * factor : in * factor + t;
}

// Whether affine_vjp reads t.
template <class T>
PFK_HD bool vjp_reads_shift(const AffineMap<T>& m) {
  return m.from_output ? m.shift_first == m.inverse : m.shift_first != m.inverse;
}

template <class V>
struct AffineGrad {
  V in, raw, shift;
};

// From the upstream gradients of the element and of log_factor, and from what was kept of the
// element: its input, or (from_output) its output.  `moved` is d out / d log_factor, the part of
// the output that is scaled.
template <class V>
PFK_HD AffineGrad<V> affine_vjp(V kept, V raw_shift, V grad_out, V grad_log, const Scale<V>& s,
                                const AffineMap<Lane<V>>& m) {
  const V grad_in = grad_out * s.factor, t = raw_shift * V(m.shift_gain);
  V moved, grad_shift;
  if (m.inverse) {  // x = (y - t) / s, or y / s - t
    moved = m.from_output ? (m.shift_first ? kept + t : kept)
                          : (m.shift_first ? kept : kept - t) * s.factor;
    grad_shift = m.shift_first ? -grad_out : -grad_in;
  } else {  // y = s x + t, or s (x + t)
    moved = m.from_output ? (m.shift_first ? kept : kept - t)
                          : (m.shift_first ? kept + t : kept) * s.factor;
    grad_shift = m.shift_first ? grad_in : grad_out;
  }
  return {grad_in, (grad_out * moved + grad_log) * s.slope, grad_shift * V(m.shift_gain)};
}

// Calls f with the kind of scale map as a constant.
template <class F>
PFK_HD void with_scale_kind(int kind, F f) {
  switch (kind) {
    case kExp:
      return f(std::integral_constant<int, kExp>{});
    case kTanh:
      return f(std::integral_constant<int, kTanh>{});
    case kAtan:
      return f(std::integral_constant<int, kAtan>{});
    case kSigmoid:
      return f(std::integral_constant<int, kSigmoid>{});
    case kSoftplus:
      return f(std::integral_constant<int, kSoftplus>{});
    case kSoftclipScale:
      return f(std::integral_constant<int, kSoftclipScale>{});
    case kSoftplusAsinh:
      return f(std::integral_constant<int, kSoftplusAsinh>{});
    case kSoftplusTanh:
      return f(std::integral_constant<int, kSoftplusTanh>{});
    default:
      return f(std::integral_constant<int, kAdditive>{});
  }
}

// The scale of a kind that is known at run time: on a GPU, where all threads take the same branch,
// one loop with a branch needs fewer registers than a loop for each kind.
template <class V>
PFK_HD Scale<V> scale_of_kind(int kind, V u, const AffineMap<Lane<V>>& m) {
  Scale<V> s;
  with_scale_kind(kind, [&](auto k) { s = scale_of<decltype(k)::value>(u, m); });
  return s;
}

PFK_END
