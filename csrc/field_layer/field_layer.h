// SPDX-License-Identifier: Apache-2.0
// Bias, gate and activation of a layer whose product comes from elsewhere, such as a convolution: a
// stack [(1 + K) N, C, *space] of the primal and its tangents.
//
// The formulas are those of field.h.  Where f' and f'' / f' follow from h' = f(a) alone (tanh,
// softplus) and there is no gate, whose cotangent needs p, the backward pass reads the output in
// place of the product: with h.' = f'(a) a.,
//   A = f'(a) q + (f'' / f')(a) sum h.' q. .
#pragma once

#include "field/field.h"

namespace pfk {

// The stack as rows and columns.  In NCHW a row is a plane, and all its columns have the same
// parameters.  Where channels are last, and where there is no space, columns are channels.  Where
// parameters are maps, each sample is a row.
struct PlanesArgs {
  int64_t rows, columns, tangents;  // rows of the primal; each tangent has as many, behind it
  bool runs;                        // all columns of a row have the same parameters
  bool from_output;                 // backward: p is h' with its tangents
  int activation;
  int64_t repeat;                    // consecutive rows with the same parameters
  int64_t bias_period, gate_period;  // number of rows of each parameter
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

}  // namespace pfk

PFK_BEGIN

template <int kKind, class V>
PFK_HD LayerVjp<V> layer_vjp(V p, V bias, V gate, bool from_output) {
  if constexpr (follow_from_value(activation_of(kKind))) {
    if (from_output) {
      const Derivatives<V> d = derivatives_from_value<activation_of(kKind)>(p);
      return {Curve<V>{p, d.slope, d.bend_by_slope}, gate};
    }
  }
  return {curve_at<kKind>(gate * p + bias), gate};
}

PFK_END
