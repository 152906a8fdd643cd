// SPDX-License-Identifier: Apache-2.0
// Vector fields of dense layers with the divergence of their flow: what an element of a layer does
// to the primal and to its tangents, forward and VJP, for scalars (CUDA) and Vecs (CPU).
//
// A layer is  p = W h  (a matrix product, primal and K tangents stacked),  a = g p + b,
// h' = f(a),  and for every tangent  p. = W h.,  a. = g p.,  h.' = f'(a) a. .  The field's output
// is a last layer without f; with the probe e in the first tangent the trace is estimated by e . (J
// e).
//
// VJP with cotangents  q of h' and q. of h.':
//   A. = f'(a) q.,  A = f'(a) q + f''(a) sum a. q.,
//   cotangents of p and p. are g A and g A., of b it is A, of g it is A p + sum A. p. .
#pragma once

#include "core/codes.h"
#include "core/math.h"
#include "core/philox.h"

// Plain data is the same for every SIMD level.
namespace pfk {

// Parameters of a layer; steps are between samples: 0 for parameters that all samples share.
struct FieldLayer {
  int64_t in, out;
  const void* weight;  // [out, in]
  const void* bias;    // [out] or [samples, out]
  const void* gate;    // the same, or null
  const void* scale;   // or null: a gate [out] that went into the packed weight
  int64_t bias_step, gate_step;
  bool value_kept;  // backward may find h' instead of p: tanh without a gate
  int64_t kept;     // offset of this layer in what is kept, or -1
  void* grad_weight;
  void* grad_bias;
  void* grad_gate;  // or null
  // the copy in cache: padded rows, and where the layer begins in `packed` and in a task's sums
  int64_t in_stride, out_stride, packed, sums;
  bool sum_turned;  // the sum of weight gradients is [in, out], which takes fewer whole vectors
  // wide layers take the product of these after a wave: stacks of cotangents and inputs, padded
  void* grad_rows;  // or null
  void* input_rows;
  int64_t column;  // sum of the strides of the layers before
};

inline int64_t weight_sum_size(const FieldLayer& y) {
  return y.grad_rows ? 0 : y.sum_turned ? y.in * y.out_stride : y.out * y.in_stride;
}

// Probes [probes, samples, features] with these steps, or the seed of signs.
struct FieldProbe {
  const void* data;
  int64_t step_probe, step_sample;
  const int64_t* seed;  // on the device; or null
};

// One pass of the whole field.  Rows are stacked: the primal of all samples, then each tangent.
struct FieldArgs {
  int64_t samples, probes, features;
  int layers;  // with the last, which has no activation
  int activation, flags;
  FieldLayer* layer;
  FieldProbe probe;
  const void* x;
  void* y;
  void* trace;  // [probes, samples], of one probe perhaps as [samples]
  void* norm;   // the same: |J e|^2; or null
  void* kept;   // a block [(1 + probes) samples, out] for every layer but the last; or null
  const void* grad_y;
  const void* grad_trace;
  const void* grad_norm;
  void* grad_x;
  const void* packed;  // weights as the products want them
  void* sums;          // [tasks, sums_size]: gradients of shared parameters
  int64_t sums_size, task, first_task;
  const FieldLayer* coupling;  // of exact traces: M, see field_exact.h; or null
  const void* ones;            // as many as the widest layer has columns, padded
};

// Whether the backward pass, having the products of layer l computed again where they were not
// kept, goes on to activate it: the next layer is computed again, too.
inline bool continues(const FieldArgs& a, int l) {
  return l + 1 < a.layers - 1 && a.layer[l + 1].kept < 0;
}
// Whether it then has h' in place of p.
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

// ---- activations -------------------------------------------------------------------------------
template <class V>
struct Curve {
  V value, slope, bend;  // f, f', f''
};

// Phi(-x) for x >= 0.
PFK_HD float normal_tail(float x) { return 0.5f * ::erfcf(x * 0.70710678118654752440f); }
PFK_HD double normal_tail(double x) { return 0.5 * ::erfc(x * 0.70710678118654752440); }
#if !defined(__CUDACC__)
// (1 + 2 x) e^(x^2 / 2) Phi(-x), x >= 0, interpolated in (x - centre) / (x + centre) as Shepherd
// and Laframboise 1981 do: to 2e-8 and to 2e-17.  Beyond the end Phi is zero; the rounder is a
// number whose last place is that of the halves that are squared exactly.
template <class T>
struct NormalTail;
template <>
struct NormalTail<float> {
  static constexpr float kCentre = 3, kEnd = 15, kRounder = 49152;
  static constexpr float kTerms[] = {0.850597651f,    0.0133491005f,    -0.156090223f,
                                     0.136540928f,    -0.0515817946f,   -0.000580623889f,
                                     0.00696262334f,  -0.000380511046f, -0.00107731175f,
                                     1.97201345e-06f, 0.000131346006f,  1.14178904e-05f};
};
template <>
struct NormalTail<double> {
  static constexpr double kCentre = 5, kEnd = 40, kRounder = 6442450944;
  static constexpr double kTerms[] = {
      0.84611235472506929,     -0.039647008404006111,   -0.054008075034077556,
      0.10088858203458727,     -0.10065743821670525,    0.07248782697502397,
      -0.039332201357163157,   0.015422845692508128,    -0.0035716954115872857,
      -0.00011869364958067348, 0.00042509568529797555,  -0.00010817646879708506,
      -2.6436294882238703e-05, 1.9389747606273739e-05,  5.3361170301456543e-07,
      -2.8583436753070545e-06, 1.7987739077791011e-07,  4.3194941270701092e-07,
      -4.2834524074568658e-08, -6.788340647682934e-08,  6.2043455585574289e-09,
      9.5754152130883462e-09,  -5.7641545972009118e-10, -8.2365522969944163e-10,
      2.2981126252889365e-11};
};

template <class T>
PFK_HD Vec<T> normal_tail(Vec<T> x) {
  using V = Vec<T>;
  using N = NormalTail<T>;
  constexpr int terms = sizeof(N::kTerms) / sizeof(T);
  x = min_(x, V(N::kEnd));
  const V u = (x - N::kCentre) / (x + N::kCentre);
  V p = N::kTerms[terms - 1];
  for (int i = terms - 2; i >= 0; --i) p = p * u + N::kTerms[i];
  // x^2 rounded would be wrong by as many times its size
  const V high = (x + N::kRounder) - N::kRounder, rest = (x - high) * (x + high);
  return p * exp_(T(-0.5) * high * high) * exp_(T(-0.5) * rest) / (T(1) + T(2) * x);
}
#endif

template <int kKind, class V>
PFK_HD Curve<V> curve_at(V a) {
  using T = Lane<V>;
  const V one = V(T(1));
  if constexpr (kKind == kActTanh) {
    const Tanh<V> t = tanh_(a);
    return {t.value, t.slope, V(T(-2)) * t.value * t.slope};
  } else if constexpr (kKind == kActGelu) {
    const V tail = normal_tail(abs_(a));  // Phi(-|a|)
    const V cdf = select(a < T(0), tail, one - tail);
    const V density = V(T(0.39894228040143267794)) * exp_(V(T(-0.5)) * a * a);
    return {a * cdf, cdf + a * density, density * (V(T(2)) - a * a)};
  } else {
    const V e = exp_(-abs_(a)), big = one / (one + e), small = e * big;
    const V q = select(a < T(0), small, big), rest = select(a < T(0), big, small);
    if constexpr (kKind == kActSoftplus) {
      return {max_(a, V(T(0))) + log1p_(e), q, q * rest};
    } else {
      return {a * q, q * (one + a * rest), q * rest * (V(T(2)) + a * (rest - q))};
    }
  }
}

// From f(a), of tanh.
template <class V>
PFK_HD Curve<V> curve_from_value(V h) {
  using T = Lane<V>;
  const V slope = (V(T(1)) - h) * (V(T(1)) + h);
  return {h, slope, V(T(-2)) * h * slope};
}

template <int kKind, class V>
PFK_HD Curve<V> curve_of_kept(V p, V bias, V gate, bool value_kept) {
  if constexpr (kKind == kActTanh) {
    if (value_kept) return curve_from_value(p);
  }
  return curve_at<kKind>(gate * p + bias);
}

// An element of a layer on the way back: call tangent() for each of its tangents, then primal().
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
// Signs: element i of [probes, samples, features] takes bit i % 128 of Philox block i / 128.
constexpr int kSignBits = 128;

PFK_HD uint32_t word_of(const PhiloxBlock<uint32_t>& b, int i) {
  return i < 2 ? (i == 0 ? b.word[0] : b.word[1]) : (i == 2 ? b.word[2] : b.word[3]);
}
PFK_HD float sign_of(const PhiloxBlock<uint32_t>& b, int bit) {
  return (word_of(b, bit / 32) >> (bit % 32)) & 1u ? -1.0f : 1.0f;
}

PFK_END
