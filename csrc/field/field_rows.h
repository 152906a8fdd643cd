// SPDX-License-Identifier: Apache-2.0
// The elementwise parts of a field on the CPU: activations, outputs and row sums.  They serve both
// the tiles that stay in cache, whose rows are padded, and whole matrices between BLAS products.
#pragma once

#include "core/half.h"
#include "field/field.h"

PFK_BEGIN

namespace {

// Calls f(column, lanes) for whole vectors (lanes a constant) and then for the rest of a row.
template <class T, class F>
PFK_HD void each_vector(int64_t columns, F f) {
  constexpr int w = Vec<T>::kLanes;
  int64_t j = 0;
  for (; j + w <= columns; j += w) f(j, w);
  if (j < columns) f(j, static_cast<int>(columns - j));
}
template <class T>
PFK_HD Vec<T> get(const T* p, int m) {
  return m == Vec<T>::kLanes ? Vec<T>::load(p) : load_vec_n(p, m);
}
template <class T>
PFK_HD void put(Vec<T> v, T* p, int m) {
  m == Vec<T>::kLanes ? v.store(p) : store_vec_n(v, p, m);
}

// ---- a layer -----------------------------------------------------------------------------------
// Calls f(column, lanes, first row, last row) for the vectors of a few rows at a time, which stay
// in L1.  So shared parameters are read, and sums of their gradients written, once for these rows.
template <class T, class F>
PFK_HD void each_column(int64_t columns, int64_t first, int64_t last, F f) {
  constexpr int64_t kRows = 24;
  for (int64_t i = first; i < last; i += kRows) {
    const int64_t end = last - i < kRows ? last : i + kRows;
    each_vector<T>(columns, [&](int64_t j, int m) { f(j, m, i, end); });
  }
}

// A parameter in the row of a sample, or 1 where there is none; `step` is 0 if all samples share
// it.
template <class T>
struct Parameter {
  const T* p;
  int64_t step;
  Vec<T> value;
  int m;
  PFK_HD Parameter(const void* from, int64_t step_, int64_t j, int m_)
      : p(from ? typed<T>(from) + j : nullptr), step(step_), value(T(1)), m(m_) {
    if (p && step == 0) value = get(p, m);
  }
  PFK_HD Vec<T> operator[](int64_t i) {
    if (step) value = get(p + i * step, m);
    return value;
  }
};

// Writes the gradient of a parameter of each sample, or adds their sum to what is there.
template <class T>
struct ParameterGradient {
  T* p;
  int64_t step;
  Vec<T> sum = T(0);
  int m;
  PFK_HD ParameterGradient(void* to, int64_t step_, int64_t j, int m_)
      : p(to ? typed<T>(to) + j : nullptr), step(step_), m(m_) {}
  PFK_HD void add(Vec<T> v, int64_t i) {
    if (step == 0) {
      sum += v;
    } else if (p) {
      put(v, p + i * step, m);
    }
  }
  PFK_HD void finish() const {
    if (p && step == 0) put(get(p, m) + sum, p, m);
  }
};

// kRestore: from what was kept.
//
// Arguments are copied: the compiler reloads what a reference leads to after every store.
template <int kKind, bool kRestore, bool kGated, class T>
void layer_forward(const LayerArgs& args, int64_t first, int64_t last) {
  using V = Vec<T>;
  const LayerArgs a = args;
  each_column<T>(a.columns, first, last, [&](int64_t j, int m, int64_t begin, int64_t end) {
    Parameter<T> bias(a.bias, a.bias_step, j, m), gate(a.gate, a.gate_step, j, m);
    T* const p = typed<T>(a.p) + j;
    T* const s = typed<T>(a.s) + j;
    for (int64_t i = begin; i < end; ++i) {
      const V b = bias[i], g = kGated ? gate[i] : V(T(1));
      const V pre = get(p + i * a.stride, m);
      const Curve<V> c =
          kRestore ? curve_of_kept<kKind>(pre, b, g, a.value_kept) : curve_at<kKind>(g * pre + b);
      const V value = c.value, slope = c.slope;
      if (!kRestore && a.value_kept) put(value, p + i * a.stride, m);
      put(value, s + i * a.stride, m);
      const T* tangent = typed<T>(a.tangents) + i * a.tangent_step + j;
      for (int64_t k = 1; k <= a.probes; ++k, tangent += a.samples * a.tangent_step) {
        put(slope * (g * get(tangent, m)), s + (k * a.samples + i) * a.stride, m);
      }
    }
  });
}

template <int kKind, bool kGated, class T>
void layer_backward(const LayerArgs& args, int64_t first, int64_t last) {
  using V = Vec<T>;
  const LayerArgs a = args;
  each_column<T>(a.columns, first, last, [&](int64_t j, int m, int64_t begin, int64_t end) {
    Parameter<T> bias(a.bias, a.bias_step, j, m), gate(a.gate, a.gate_step, j, m);
    ParameterGradient<T> of_bias(a.grad_bias, a.grad_bias_step, j, m);
    ParameterGradient<T> of_gate(a.grad_gate, a.grad_gate_step, j, m);
    const T* const p = typed<T>(a.p) + j;
    T* const s = typed<T>(a.s) + j;
    T* const grad = typed<T>(a.grad) + j;
    for (int64_t i = begin; i < end; ++i) {
      const V b = bias[i], g = kGated ? gate[i] : V(T(1));
      const int64_t top = i * a.stride;
      const V pre = get(p + top, m);
      const Curve<V> c = curve_of_kept<kKind>(pre, b, g, a.value_kept);
      const V value = c.value, slope = c.slope;
      LayerVjp<V> v(c, g);
      const T* tangent = typed<T>(a.tangents) + i * a.tangent_step + j;
      for (int64_t k = 1; k <= a.probes; ++k, tangent += a.samples * a.tangent_step) {
        const int64_t at = top + k * a.samples * a.stride;
        const V t = get(tangent, m);
        put(v.tangent(t, get(grad + at, m)), grad + at, m);
        put(slope * (g * t), s + at, m);
      }
      put(v.primal(pre, get(grad + top, m)), grad + top, m);
      put(value, s + top, m);
      of_bias.add(v.crossed, i);
      if (kGated) of_gate.add(v.of_gate, i);
    }
    of_bias.finish();
    if (kGated) of_gate.finish();
  });
}

using LayerFunction = void (*)(const LayerArgs&, int64_t, int64_t);

enum LayerPass : int { kForward, kRestored, kBackward };

template <int kKind, class T>
LayerFunction layer_function_of(bool gated, LayerPass pass) {
  static constexpr LayerFunction table[2][3] = {
      {layer_forward<kKind, false, false, T>, layer_forward<kKind, true, false, T>,
       layer_backward<kKind, false, T>},
      {layer_forward<kKind, false, true, T>, layer_forward<kKind, true, true, T>,
       layer_backward<kKind, true, T>}};
  return table[gated][pass];
}

template <class T>
void run_layer(const LayerArgs& a, LayerPass pass, int64_t first, int64_t last) {
  with_kind(a.activation, [&](auto kind) {
    layer_function_of<kind.value, T>(a.gate != nullptr, pass)(a, first, last);
  });
}

// ---- the output --------------------------------------------------------------------------------
// kPadded: rows of p, e, grad, bias and gate may be read and written in whole vectors.
template <bool kPadded, class T>
PFK_HD Vec<T> get_padded(const T* p, int m) {
  return kPadded ? Vec<T>::load(p) : get(p, m);
}
template <bool kPadded, class T>
PFK_HD void put_padded(Vec<T> v, T* p, int m) {
  kPadded ? v.store(p) : put(v, p, m);
}

template <bool kPadded, class T>
void output_forward(const OutputArgs& a, int64_t first, int64_t last) {
  using V = Vec<T>;
  const T* const p = typed<T>(a.p);
  const T* const e = typed<T>(a.e);
  const T* const bias = typed<T>(a.bias);
  const T* const gate = typed<T>(a.gate);
  for (int64_t i = first; i < last; ++i) {
    auto gate_at = [&](int64_t j, int m) {
      return gate ? get_padded<kPadded>(gate + i * a.gate_step + j, m) : V(T(1));
    };
    each_vector<T>(a.features, [&](int64_t j, int m) {
      const V y = gate_at(j, m) * get_padded<kPadded>(p + i * a.stride + j, m) +
                  get_padded<kPadded>(bias + i * a.bias_step + j, m);
      put(y, typed<T>(a.y) + i * a.features + j, m);
    });
    for (int64_t k = 0; k < a.probes; ++k) {
      const int64_t row = ((k + 1) * a.samples + i) * a.stride;
      const int64_t at = k * a.trace_step + i;
      V trace = T(0), norm = T(0);
      each_vector<T>(a.features, [&](int64_t j, int m) {
        const V je = gate_at(j, m) * get_padded<kPadded>(p + row + j, m);
        trace += je * get_padded<kPadded>(e + row + j, m);
        norm += je * je;
      });
      typed<T>(a.trace)[at] = static_cast<T>(sum_lanes(trace));
      if (a.norm) typed<T>(a.norm)[at] = static_cast<T>(sum_lanes(norm));
    }
  }
}

template <bool kPadded, class T>
void output_backward(const OutputArgs& a, int64_t first, int64_t last) {
  using V = Vec<T>;
  const T* const p = typed<T>(a.p);
  const T* const e = typed<T>(a.e);
  const T* const grad_y = typed<T>(a.grad_y);
  T* const grad = typed<T>(a.grad);
  each_column<T>(a.features, first, last, [&](int64_t j, int m, int64_t begin, int64_t end) {
    const int whole = kPadded ? V::kLanes : m;
    Parameter<T> gate(a.gate, a.gate_step, j, whole);
    ParameterGradient<T> of_bias(a.grad_bias, a.grad_bias_step, j, whole);
    ParameterGradient<T> of_gate(a.grad_gate, a.grad_gate_step, j, whole);
    for (int64_t i = begin; i < end; ++i) {
      const V g = gate[i];
      const V q = grad_y ? get(grad_y + i * a.features + j, m) : V(T(0));
      V crossed = a.gate ? q * get_padded<kPadded>(p + i * a.stride + j, m) : V(T(0));
      put_padded<kPadded>(g * q, grad + i * a.stride + j, m);
      for (int64_t k = 0; k < a.probes; ++k) {
        const int64_t at = ((k + 1) * a.samples + i) * a.stride + j;
        const int64_t scalar = k * a.trace_step + i;
        V t = T(0);
        if (a.grad_trace) {
          t = V(typed<T>(a.grad_trace)[scalar]) * get_padded<kPadded>(e + at, m);
        }
        if (a.grad_norm) {
          t += V(T(2) * typed<T>(a.grad_norm)[scalar]) * (g * get_padded<kPadded>(p + at, m));
        }
        if (a.gate) crossed += t * get_padded<kPadded>(p + at, m);
        put_padded<kPadded>(g * t, grad + at, m);
      }
      of_bias.add(q, i);
      if (a.gate) of_gate.add(crossed, i);
    }
    of_bias.finish();
    of_gate.finish();
  });
}

// ---- the probe ---------------------------------------------------------------------------------
// Elements [begin, begin + count) of random signs.
template <class T>
void fill_signs(const int64_t* key, int64_t begin, int64_t count, T* to) {
  const uint64_t seed = static_cast<uint64_t>(*key);
  for (int64_t i = 0; i < count;) {
    const int64_t at = begin + i;
    const PhiloxBlock<uint32_t> b = philox_block(static_cast<uint64_t>(at / kSignBits), seed);
    for (int bit = static_cast<int>(at % kSignBits); bit < kSignBits && i < count; ++bit, ++i) {
      to[i] = sign_of(b, bit);
    }
  }
}

// Copies rows [first, last) of x and of every probe to rows that are `stride` apart; each probe
// begins `height` rows behind the last.
template <class T>
void stack_rows(const void* x, const FieldProbe& probe, int64_t probes, int64_t samples,
                int64_t features, int64_t first, int64_t last, T* to, int64_t stride,
                int64_t height) {
  for (int64_t i = first; i < last; ++i) {
    memcpy(to + (i - first) * stride, typed<T>(x) + i * features, features * sizeof(T));
  }
  for (int64_t k = 0; k < probes; ++k) {
    T* row = to + (k + 1) * height * stride;
    if (probe.seed && stride == features) {
      fill_signs(probe.seed, (k * samples + first) * features, (last - first) * features, row);
      continue;
    }
    for (int64_t i = first; i < last; ++i, row += stride) {
      if (probe.seed) {
        fill_signs(probe.seed, (k * samples + i) * features, features, row);
      } else {
        memcpy(row, typed<T>(probe.data) + k * probe.step_probe + i * probe.step_sample,
               features * sizeof(T));
      }
    }
  }
}

// ---- rows of products --------------------------------------------------------------------------
template <class T>
void row_dot(const RowDotArgs& a, int64_t first, int64_t last) {
  using V = Vec<T>;
  for (int64_t i = first; i < last; ++i) {
    const T* x = typed<T>(a.a) + i * a.features;
    const T* y = typed<T>(a.b) + i * a.features;
    double trace = 0, norm = 0;
    constexpr int64_t kRun = 1024;  // sums of runs are added up in double
    for (int64_t begin = 0; begin < a.features; begin += kRun) {
      V t = T(0), n = T(0);
      each_vector<T>(a.features - begin < kRun ? a.features - begin : kRun, [&](int64_t j, int m) {
        const V v = get(y + begin + j, m);
        t += get(x + begin + j, m) * v;
        n += v * v;
      });
      trace += sum_lanes(t);
      norm += sum_lanes(n);
    }
    typed<T>(a.trace)[i] = static_cast<T>(trace);
    if (a.norm) typed<T>(a.norm)[i] = static_cast<T>(norm);
  }
}

template <class T>
void row_dot_backward(const RowDotArgs& a, int64_t first, int64_t last) {
  using V = Vec<T>;
  for (int64_t i = first; i < last; ++i) {
    const V s = a.grad_trace ? typed<T>(a.grad_trace)[i] : T(0);
    const V f = a.grad_norm ? T(2) * typed<T>(a.grad_norm)[i] : T(0);
    each_vector<T>(a.features, [&](int64_t j, int m) {
      const int64_t at = i * a.features + j;
      const V x = get(typed<T>(a.a) + at, m), y = get(typed<T>(a.b) + at, m);
      put(s * y, typed<T>(a.grad_a) + at, m);
      put(a.grad_norm ? s * x + f * y : s * x, typed<T>(a.grad_b) + at, m);
    });
  }
}

}  // namespace

PFK_END
