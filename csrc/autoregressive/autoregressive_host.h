// SPDX-License-Identifier: Apache-2.0
// From tensors to AutoregressiveArgs, once for CPU and CUDA.
#pragma once

#include "autoregressive/autoregressive.h"
#include "core/host.h"

namespace pfk {

// `structure` is features, outputs, levels, most features of a level, then five numbers a layer:
// its source (-1: the input), whether activated values are read there, the residual layer (-1:
// none), the activation that others see it through, and whether its raw values are kept (1) and it
// has a gate (2).  Gates come behind the biases, those of the first layer first.  `table` lies on
// the device: the order, the counts [layers + 1, levels + 1] (the input's first), then where
// residual values lie.
constexpr int kHead = 4, kEach = 5;
constexpr int kKeepsRaw = 1, kGated = 2;
constexpr int kSplineCode = 64;  // a spline's kind is this and its code, its flags are its bins

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
    if (s[4] & kGated) {
      const Tensor& gate = t.biases[gates++];
      layer.gate = gate.const_data_ptr();
      layer.gate_row = gate.dim() == 2 ? layer.units : 0;
    }
    layer.counts = counts(j + 1);
    const int source = static_cast<int>(s[0]);
    layer.source_counts = counts(source + 1);
    layer.source = source < 0 ? 0 : s[1] ? a.layers[source].activated : a.layers[source].raw;
    layer.residual = s[2] < 0 ? -1 : a.layers[s[2]].raw;
    layer.residual_at = residual_at;
    if (s[2] >= 0) residual_at += layer.units;
    layer.activation = static_cast<Activation>(s[3]);
    layer.raw = layer.activated = -1;
    if (j + 1 == a.layer_count) continue;
    if (s[4] & kKeepsRaw) layer.raw = rows, rows += layer.units;
    if (s[3]) layer.activated = rows, rows += layer.units;
  }
  a.params = rows;
}

inline void place_transform(AutoregressiveArgs& a, int kind, const std::vector<double>& n,
                            int flags) {
  a.param_rows = a.outputs;
  if (kind < kSplineCode) {
    STD_TORCH_CHECK(n.size() == 5, "scale_map takes 5 numbers");
    a.kind = kind, a.flags = flags | kInverse;
    a.numbers = {n[0], n[1], n[2], n[3], n[4]};
    return;
  }
  STD_TORCH_CHECK(n.size() == 6, "a spline map takes 6 numbers");
  a.kind = -1, a.code = kind - kSplineCode, a.bins = flags;
  a.spline = {n[0], n[1], n[2], n[3], n[4], n[5]};
  const SplineMap<float> map = spline_map<float>(a.spline, a.code, a.bins, true);
  STD_TORCH_CHECK(map.columns == a.outputs, "the spline takes ", map.columns, " numbers");
  a.param_rows += map.scratch;
}

inline AutoregressiveTensors autoregressive_tensors(
    const Tensor& z, const Tensor& table, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& biases, const std::vector<int64_t>& structure, int64_t kind,
    const std::vector<double>& numbers, int64_t flags) {
  size_t factors = weights.size();
  for (size_t i = kHead + kEach - 1; i < structure.size(); i += kEach) {
    if (structure[i] & kGated) ++factors;
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
  a.features = static_cast<int>(structure[0]), a.outputs = static_cast<int>(structure[1]);
  a.levels = static_cast<int>(structure[2]);
  place_layers(t, structure);
  place_transform(a, static_cast<int>(kind), numbers, static_cast<int>(flags));
  a.rows = a.params + static_cast<int>(structure[3]) * a.param_rows;
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
                                              std::vector<int64_t> structure, int64_t kind,
                                              std::vector<double> numbers, int64_t flags) {
  AutoregressiveTensors t =
      autoregressive_tensors(z, table, weights, biases, structure, kind, numbers, flags);
  if (t.args.samples > 0) kRun(t.args, t.x);
  return {t.x, t.log_det};
}

}  // namespace pfk

#define PFK_REGISTER_AUTOREGRESSIVE(key, run)                                   \
  STABLE_TORCH_LIBRARY_IMPL(pyflowkern, key, m) {                               \
    m.impl("autoregressive_inverse", TORCH_BOX(&pfk::run_autoregressive<run>)); \
  }
