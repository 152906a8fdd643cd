// SPDX-License-Identifier: Apache-2.0
// Vector fields of dense layers with the divergence of their flow: the formulas of an element of a
// layer, of its tangents and of the VJP, for scalars (CUDA) and Vecs (CPU).
//
// A layer is  p = W h  (a matrix product, primal and K tangents stacked),  a = g p + b,
// h' = f(a),  and for every tangent  p. = W h.,  a. = g p.,  h.' = f'(a) a. .  The field's output
// is a last layer without f.  Where the first tangent is the probe e, the last one is J e, and
// e . (J e) estimates the trace.
//
// VJP with cotangents  q of h' and q. of h.':
//   A. = f'(a) q.,  A = f'(a) q + f''(a) sum a. q.,
//   cotangents of p and p. are g A and g A., of b it is A, of g it is A p + sum A. p. .
#pragma once

#include "core/activations.h"
#include "core/codes.h"
#include "core/philox.h"

// Plain data is the same for every SIMD level.
namespace pfk {

// Parameters of a layer; steps are between samples: 0 for parameters that all samples share.
struct FieldLayer {
  int64_t in, out;
  const void* weight;  // [out, in]
  const void* bias;    // [out] or [samples, out]
  const void* gate;    // the same, or null
  const void* scale;   // or null: a gate [out] that the packed weight contains
  int64_t bias_step, gate_step;
  bool value_kept;  // h' is kept instead of p: tanh without a gate
  int64_t kept;     // offset of this layer in what is kept, or -1
  void* grad_weight;
  void* grad_bias;
  void* grad_gate;  // or null
  // of the packed copy: padded rows, and where the layer begins in `packed` and in a task's sums
  int64_t in_stride, out_stride, packed, sums;
  bool sum_transposed;  // the sum of weight gradients is [in, out], which takes fewer whole vectors
  // wide layers: padded stacks of cotangents and inputs, which are multiplied after each wave
  void* grad_rows;  // or null
  void* input_rows;
  int64_t column;  // sum of the strides of the layers before
};

inline int64_t weight_sum_size(const FieldLayer& y) {
  return y.grad_rows ? 0 : y.sum_transposed ? y.in * y.out_stride : y.out * y.in_stride;
}

// Probes [probes, samples, features] with these steps, or the seed of random signs.
struct FieldProbe {
  const void* data;
  int64_t step_probe, step_sample;
  const int64_t* seed;  // on the device; or null
};

// One pass of the whole field.  Rows are stacked: the primal of all samples, then each tangent.
struct FieldArgs {
  int64_t samples, probes, features;
  int layers;  // the last one, which has no activation, included
  int activation, flags;
  FieldLayer* layer;
  FieldProbe probe;
  const void* x;
  void* y;
  void* trace;  // [probes, samples]; see kFieldFlat
  void* norm;   // the same: |J e|^2; or null
  void* kept;   // a block [(1 + probes) samples, out] for every layer but the last; or null
  const void* grad_y;
  const void* grad_trace;
  const void* grad_norm;
  void* grad_x;
  const void* packed;  // copies of weights, padded and in both orders
  void* sums;          // [tasks, sums_size]: gradients of shared parameters
  int64_t sums_size, task, first_task;
  const FieldLayer* coupling;  // of exact traces: M, see field_exact.h; or null
  const void* ones;            // as many as the widest layer has columns, padded
};

// Whether the backward pass needs the output of layer l to compute the products of the next layer
// again, which were not kept.
inline bool continues(const FieldArgs& a, int l) {
  return l + 1 < a.layers - 1 && a.layer[l + 1].kept < 0;
}
// Whether the backward pass then finds h' in the place of p.
inline bool has_value(const FieldArgs& a, int l) {
  return a.layer[l].value_kept && (a.layer[l].kept >= 0 || continues(a, l));
}

// The elementwise part of one layer, over rows [(1 + probes) samples, columns].
struct LayerArgs {
  int64_t samples, probes, columns, stride;  // rows of p, tangents, s and grad are `stride` apart
  int activation;
  bool value_kept;
  void* p;  // forward, if value_kept: h' replaces the primal
  const void*
      tangents;  // of p, [probes, samples, columns], rows tangent_step apart; null: behind p
  int64_t tangent_step;
  void* s;     // h' and its tangents, or null
  void* grad;  // backward: cotangents of h' and h.', replaced by those of p and p.
  const void* bias;
  const void* gate;
  int64_t bias_step, gate_step;
  void* grad_bias;  // A of every sample, or with step 0 added to their sum; or null
  void* grad_gate;  // the same, or null
  int64_t grad_bias_step, grad_gate_step;
};

// The last layer, over rows [(1 + probes) samples, features] of p; and its VJP.
struct OutputArgs {
  int64_t samples, probes, features, stride;
  int64_t trace_step;  // of trace and norm between probes
  const void* p;       // backward reads it for the norm and for gates
  const void* e;       // the stacked input, whose rows are `stride` apart, too
  const void* bias;
  const void* gate;
  int64_t bias_step, gate_step;
  void* y;
  void* trace;
  void* norm;  // or null
  const void* grad_y;
  const void* grad_trace;
  const void* grad_norm;  // or null
  void* grad;             // cotangents of p
  void* grad_bias;        // as in LayerArgs
  void* grad_gate;
  int64_t grad_bias_step, grad_gate_step;
};

// The stacked input, [(1 + probes) samples, features].
struct StackArgs {
  int64_t samples, probes, features;
  const void* x;
  FieldProbe probe;
  void* s;
};

// trace[n] = sum_j a b and norm[n] = sum_j b b of rows [rows, features]; and the VJP.
struct RowDotArgs {
  int64_t rows, features;
  const void* a;
  const void* b;
  void* trace;
  void* norm;  // or null
  const void* grad_trace;
  const void* grad_norm;
  void* grad_a;
  void* grad_b;
};

}  // namespace pfk

PFK_BEGIN

// ---- activations --------------------------------------------------------------------------------
// The activations of fields, as their ops number them.
constexpr Activation activation_of(int kind) {
  return kind == kActTanh       ? Activation::kTanh
         : kind == kActSoftplus ? Activation::kSoftplus
         : kind == kActSilu     ? Activation::kSilu
                                : Activation::kGelu;
}

template <int kKind, class V>
PFK_HD Curve<V> curve_at(V a) {
  return activation_curve<activation_of(kKind)>(a);
}

// Calls f with the kind as a constant, on the host or on the device.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F>
PFK_HD void with_kind(int kind, F f) {
  switch (kind) {
    case kActTanh:
      return f(std::integral_constant<int, kActTanh>{});
    case kActSoftplus:
      return f(std::integral_constant<int, kActSoftplus>{});
    case kActSilu:
      return f(std::integral_constant<int, kActSilu>{});
    default:
      return f(std::integral_constant<int, kActGelu>{});
  }
}

// From what is kept of a layer: its product, or, of tanh, its value.
template <int kKind, class V>
PFK_HD Curve<V> curve_of_kept(V p, V bias, V gate, bool value_kept) {
  if constexpr (kKind == kActTanh) {
    if (value_kept) {
      const Derivatives<V> d = derivatives_from_value<Activation::kTanh>(p);
      return {p, d.slope, d.bend_by_slope * d.slope};
    }
  }
  return curve_at<kKind>(gate * p + bias);
}

// The VJP of an element of a layer: call tangent() for each of its tangents, then primal().
template <class V>
struct LayerVjp {
  using T = Lane<V>;
  V gate, slope, bend, crossed, of_gate;

  LayerVjp() = default;
  PFK_HD LayerVjp(const Curve<V>& c, V g)
      : gate(g), slope(c.slope), bend(c.bend), crossed(V(T(0))), of_gate(V(T(0))) {}
  // Cotangent of p. from that of h.' .
  PFK_HD V tangent(V t, V q) {
    const V A = slope * q;
    crossed += gate * t * q;
    of_gate += A * t;
    return gate * A;
  }
  // Cotangent of p from that of h'; leaves that of the bias in `crossed`.
  PFK_HD V primal(V p, V q) {
    crossed = slope * q + bend * crossed;
    of_gate += crossed * p;
    return gate * crossed;
  }
};

// ---- the probe ---------------------------------------------------------------------------------
// Random signs: element i of [probes, samples, features] is bit i % 128 of Philox block i / 128.
constexpr int kSignBits = 128;

PFK_HD uint32_t word_of(const PhiloxBlock<uint32_t>& b, int i) {
  return i < 2 ? (i == 0 ? b.word[0] : b.word[1]) : (i == 2 ? b.word[2] : b.word[3]);
}
PFK_HD float sign_of(const PhiloxBlock<uint32_t>& b, int bit) {
  return (word_of(b, bit / 32) >> (bit % 32)) & 1u ? -1.0f : 1.0f;
}

PFK_END
