// SPDX-License-Identifier: Apache-2.0
// Inverse of an autoregressive flow by one walk through its masked network.
//
// Units are sorted by degree: those of degree t at most are the first counts[t] of their layer, and
// they read the first counts[t] units of the layer below.  Step t computes the units of degree t,
// layer by layer, then the features of level t:
//   v_u = g_u (sum_k W_uk a(v_k) + b_u) + residual_u,    x_i = tau^-1(z_i; theta_i),
// with gates g of some layers, and 1 in the others.
// Each unit is computed once, as soon as its inputs are known.
#pragma once

#include "affine/affine.h"
#include "core/activations.h"
#include "spline/spline_kinds.h"

namespace pfk {

// The values of a layer lie in rows of the work space, a row for each unit, from row `raw` and row
// `activated` on; -1 means that they are not stored.  Those of the last layer are the parameters of
// the features of one level.
struct MaskedLayer {
  const void *weight, *bias;  // [units, stride], [units] or [samples, units]
  const void* gate;           // like bias, or null
  const int32_t* counts;      // units of degree t at most, t = 0 ... levels - 1
  const int32_t* residual_at;
  int stride, units, bias_row, gate_row;
  int source;  // first row of its inputs in the work space
  const int32_t* source_counts;
  int residual;  // row, -1 for none
  Activation activation;
  int raw, activated;
};

struct AutoregressiveArgs {
  MaskedLayer layers[kMaxLayers];
  int layer_count, features, outputs, levels;
  int rows, params;               // rows of the work space; where the parameters begin
  int param_rows;                 // of a feature: outputs, and scratch rows of a spline
  const int32_t* order;           // features in the order in which they become known
  const int32_t* feature_counts;  // features of levels below t
  int kind, flags;                // of the scale map; kind -1: a spline
  ScaleNumbers numbers;
  SplineForm form;
  SplineNumbers spline;
  const void* z;
  void *x, *log_det;
  int64_t samples;
};

}  // namespace pfk

PFK_BEGIN

template <class V>
struct InvertedFeature {
  V x, log_det;
};

// One feature by an affine map; tile.get(k) is its k-th parameter.
template <int kKind, class V, class Tile>
PFK_HD InvertedFeature<V> invert_affine(V z, const Tile& tile, const AffineMap<Lane<V>>& m) {
  const V shift = tile.get(0);
  const Scale<V> s = scale_of<kKind>(kKind == kAdditive ? shift : tile.get(1), m);
  return {affine_apply(z, s.factor, shift, m), s.log_factor};
}

// One feature by a spline, which works in its tile.
template <int kKind, class C, class V, class Tile>
PFK_HD InvertedFeature<V> invert_spline(V z, Tile& tile, const SplineMap<Lane<V>>& m) {
  const SplineValue<V> r = spline_apply<kKind, C>(m, tile, z);
  return {r.out, r.log_slope};
}

PFK_END
