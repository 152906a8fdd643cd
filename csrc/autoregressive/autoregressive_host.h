// SPDX-License-Identifier: Apache-2.0
// From tensors to AutoregressiveArgs, once for CPU and CUDA.
#pragma once

#include "affine/affine_host.h"
#include "autoregressive/autoregressive.h"
#include "core/host.h"
#include "spline/spline_form.h"

namespace pfk {

// What core/codes.h calls the structure of a network lies on the host.  Gates come behind the
// biases, those of the first layer first.  `table` lies on the device: the order, the counts
// [layers + 1, levels + 1] (the input's first), then where residual values lie.

// What finds a feature from its parameters: a scale map, or a spline.
struct ElementTransform {
  int64_t family, kind, tails, parameterization, bins;
  std::vector<double> numbers;
  int64_t flags;
};

struct AutoregressiveTensors {
  Tensor z, table, x, log_det;
  std::vector<Tensor> weights, biases;
  AutoregressiveArgs args{};
};

inline void place_layers(AutoregressiveTensors& t, const std::vector<int64_t>& structure) {
  AutoregressiveArgs& a = t.args;
  const int32_t* table = static_cast<const int32_t*>(t.table.const_data_ptr());
  const auto counts = [&](int row) { return a.feature_counts + row * (a.levels + 1); };
  a.order = table;
  a.feature_counts = table + a.features;
  const int32_t* residual_at = counts(a.layer_count + 1);
  int rows = a.features;
  size_t gates = t.weights.size();
  for (int j = 0; j < a.layer_count; ++j) {
    MaskedLayer& layer = a.layers[j];
    const int64_t* s = structure.data() + kHead + kEach * j;
    layer.weight = t.weights[j].const_data_ptr();
    layer.bias = t.biases[j].const_data_ptr();
    layer.units = static_cast<int>(t.weights[j].size(0));
    layer.stride = static_cast<int>(t.weights[j].size(1));
    layer.bias_row = t.biases[j].dim() == 2 ? layer.units : 0;
    if (s[kLayerFlags] & kGated) {
      const Tensor& gate = t.biases[gates++];
      layer.gate = address_of(gate);
      layer.gate_row = gate.dim() == 2 ? layer.units : 0;
    }
    layer.counts = counts(j + 1);
    STD_TORCH_CHECK(s[kSource] >= -1 && s[kSource] < j && s[kResidual] >= -1 && s[kResidual] < j,
                    "pyflowkern: layer ", j, " must read from layers before it");
    checked_flags("the flags of a layer", s[kLayerFlags], kAllLayerFlags);
    const int source = static_cast<int>(s[kSource]);
    layer.source_counts = counts(source + 1);
    layer.source = source < 0           ? 0
                   : s[kReadsActivated] ? a.layers[source].activated
                                        : a.layers[source].raw;
    layer.residual = s[kResidual] < 0 ? -1 : a.layers[s[kResidual]].raw;
    layer.residual_at = residual_at;
    if (s[kResidual] >= 0) residual_at += layer.units;
    layer.activation = static_cast<Activation>(
        checked_kind("the activation of a layer", s[kSeenThrough], kMaskedActivations));
    layer.raw = layer.activated = -1;
    if (j + 1 == a.layer_count) continue;
    if (s[kLayerFlags] & kKeepsRaw) layer.raw = rows, rows += layer.units;
    if (s[kSeenThrough]) layer.activated = rows, rows += layer.units;
  }
  a.params = rows;
}

inline void place_transform(AutoregressiveArgs& a, const ElementTransform& t) {
  const std::vector<double>& n = t.numbers;
  a.param_rows = a.outputs;
  a.flags = checked_flags("flags", t.flags, kAllAffineFlags);
  if (checked_kind("family", t.family, kElementFamilies) == kAffineElements) {
    a.kind = checked_kind("kind", t.kind, kScaleKinds), a.flags |= kInverse;
    a.numbers = scale_numbers(n);
    return;
  }
  a.kind = -1;
  a.form = checked_form(t.kind, t.tails, t.parameterization, t.bins);
  a.spline = spline_numbers(n);
  const SplineMap<float> map = spline_map<float>(a.spline, a.form, true);
  STD_TORCH_CHECK(map.columns == a.outputs, "the spline takes ", map.columns, " numbers");
  a.param_rows += map.scratch;
}

inline AutoregressiveTensors autoregressive_tensors(const Tensor& z, const Tensor& table,
                                                    const std::vector<Tensor>& weights,
                                                    const std::vector<Tensor>& biases,
                                                    const std::vector<int64_t>& structure,
                                                    const ElementTransform& transform) {
  size_t factors = weights.size();
  for (size_t i = kHead; i + kLayerFlags < structure.size(); i += kEach) {
    if (structure[i + kLayerFlags] & kGated) ++factors;
  }
  STD_TORCH_CHECK(weights.size() <= kMaxLayers && biases.size() == factors &&
                      structure.size() == kHead + kEach * weights.size(),
                  "pyflowkern: layers that do not fit each other");
  AutoregressiveTensors t{torch::stable::contiguous(z),   table, empty(z, z.sizes()),
                          empty_per_sample(z, z.size(0)), {},    {}};
  for (const Tensor& w : weights) t.weights.push_back(torch::stable::contiguous(w));
  for (const Tensor& b : biases) t.biases.push_back(torch::stable::contiguous(b));
  AutoregressiveArgs& a = t.args;
  a.layer_count = static_cast<int>(weights.size());
  a.features = static_cast<int>(structure[kFeatures]);
  a.outputs = static_cast<int>(structure[kOutputs]);
  a.levels = static_cast<int>(structure[kLevels]);
  place_layers(t, structure);
  place_transform(a, transform);
  a.rows = a.params + static_cast<int>(structure[kWidest]) * a.param_rows;
  a.z = t.z.const_data_ptr();
  a.x = t.x.mutable_data_ptr(), a.log_det = t.log_det.mutable_data_ptr();
  a.samples = z.size(0);
  return t;
}

using RunAutoregressive = void (*)(AutoregressiveArgs&, const Tensor& x);

template <RunAutoregressive kRun>
std::tuple<Tensor, Tensor> run_autoregressive(const Tensor& z, const Tensor& table, const Tensor&,
                                              std::vector<Tensor> weights,
                                              std::vector<Tensor> biases,
                                              std::vector<int64_t> structure, int64_t family,
                                              int64_t kind, int64_t tails, int64_t parameterization,
                                              int64_t bins, std::vector<double> numbers,
                                              int64_t flags) {
  AutoregressiveTensors t =
      autoregressive_tensors(z, table, weights, biases, structure,
                             {family, kind, tails, parameterization, bins, numbers, flags});
  if (t.args.samples > 0) kRun(t.args, t.x);
  return {t.x, t.log_det};
}

}  // namespace pfk

#define PFK_REGISTER_AUTOREGRESSIVE(key, run)                                   \
  STABLE_TORCH_LIBRARY_IMPL(pyflowkern, key, m) {                               \
    m.impl("autoregressive_inverse", TORCH_BOX(&pfk::run_autoregressive<run>)); \
  }
