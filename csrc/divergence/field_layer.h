// SPDX-License-Identifier: Apache-2.0
// What follows a product that comes from elsewhere, such as a convolution: bias, gate and
// activation of a layer on a stack [(1 + K) N, C, *space] of the primal and its tangents.
//
// The formulas are those of divergence.h.  Where f' and f'' / f' follow from h' = f(a) alone (tanh,
// softplus) and there is no gate, whose cotangent needs p, the backward pass reads the output in
// place of the product: with h.' = f'(a) a.,
//   A = f'(a) q + (f'' / f')(a) sum h.' q. .
#pragma once

#include "divergence/divergence.h"

namespace pfk {

// The stack as rows of columns.  Planes (NCHW) are rows with one number of each parameter for all
// columns; channels last, and where there is no space, the columns are channels; parameters that
// are maps make a row of each sample.
struct PlanesArgs {
  int64_t rows, columns, tangents;  // of the primal; every tangent follows with as many rows
  bool runs;                        // one number of a parameter for a row
  bool from_output;                 // backward: p is h' with its tangents
  int activation;
  int64_t repeat;                    // rows that have their parameters in common
  int64_t bias_period, gate_period;  // rows of parameters, after which they begin again
  int64_t unit, group;               // CPU: a task has up to `group` of the `unit` rows of a unit
  const void* p;
  void* h;  // may be p
  const void* grad;
  void* grad_p;
  const void* bias;
  const void* gate;  // or null
  void* grad_bias;   // parts of the sums, see field_layer_ops.h; or null
  void* grad_gate;
};

inline bool follows_from_output(int activation) {
  return activation == kActTanh || activation == kActSoftplus;
}

}  // namespace pfk

PFK_BEGIN

// From h = f(a): f, f' and f'' / f'.
template <int kKind, class V>
PFK_HD Curve<V> curve_of_output(V h) {
  using T = Lane<V>;
  if constexpr (kKind == kActSoftplus) {
    return {h, -expm1_(-h), exp_(-h)};
  } else {
    return {h, (V(T(1)) - h) * (V(T(1)) + h), V(T(-2)) * h};
  }
}

// An element of a layer on the way back: call tangent() for each of its tangents, then primal().
// From the output, h.' stands for p. and f'' / f' for the bend.
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

template <int kKind, class V>
PFK_HD LayerVjp<V> layer_vjp(V p, V bias, V gate, bool from_output) {
  if constexpr (kKind == kActTanh || kKind == kActSoftplus) {
    if (from_output) return {curve_of_output<kKind>(p), gate};
  }
  return {curve_at<kKind>(gate * p + bias), gate};
}

PFK_END
