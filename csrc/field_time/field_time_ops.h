// SPDX-License-Identifier: Apache-2.0
// The ops of field_time.h on the host, for any Device:  run(TimeArgs, time, backward).
#pragma once

#include "core/host.h"
#include "field_time/field_time.h"

namespace pfk {

struct TimeLayers {
  using Tensors = std::vector<Tensor>;
  Tensor time;
  Tensors biases, rows;
  TimeArgs args{};

  TimeLayers(const Tensor& time_, const Tensors& biases_, const Tensors& rows_) : time(time_) {
    args.count = static_cast<int>(biases_.size());
    STD_TORCH_CHECK(time.numel() == 1 && args.count > 0 && args.count <= kTimeLayers &&
                        rows_.size() == biases_.size(),
                    "one time, and rows of times for each of at most ", kTimeLayers, " layers");
    args.time = time.const_data_ptr();
    args.squash = rows_[0].sizes()[0] == 3;
    for (int l = 0; l < args.count; ++l) {
      biases.push_back(dense(biases_[l]));
      rows.push_back(dense(rows_[l]));
      TimeLayer& y = args.layer[l];
      y.size = biases[l].numel();
      y.bias = biases[l].const_data_ptr();
      y.rows = rows[l].const_data_ptr();
      const bool fits = rows[l].numel() == y.size * (args.squash ? 3 : 1);
      STD_TORCH_CHECK(fits && biases[l].scalar_type() == time.scalar_type() &&
                          rows[l].scalar_type() == time.scalar_type(),
                      "the rows of times of layer ", l, " do not fit its bias of ", y.size,
                      " numbers in size or dtype");
    }
  }
  Tensors like(const Tensors& tensors) const {
    Tensors outputs;
    for (const Tensor& t : tensors) outputs.push_back(empty(t, t.sizes()));
    return outputs;
  }
};

template <class Device>
std::vector<Tensor> time_forward(const Tensor& time, std::vector<Tensor> biases,
                                 std::vector<Tensor> rows) {
  TimeLayers f(time, biases, rows);
  std::vector<Tensor> outputs = f.like(f.biases);
  for (int l = 0; l < f.args.count; ++l) f.args.layer[l].to_bias = data_of(outputs[l]);
  for (int l = 0; f.args.squash && l < f.args.count; ++l) {
    outputs.push_back(empty(time, f.biases[l].sizes()));
    f.args.layer[l].to_gate = data_of(outputs.back());
  }
  Device::run(f.args, time, false);
  return outputs;
}

template <class Device>
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> time_backward(
    std::vector<Tensor> grads, const Tensor& time, std::vector<Tensor> biases,
    std::vector<Tensor> rows) {
  TimeLayers f(time, biases, rows);
  const size_t count = biases.size();
  STD_TORCH_CHECK(grads.size() == (f.args.squash ? 2 : 1) * count, "a gradient for each result");
  for (size_t i = 0; i < grads.size(); ++i) {
    check_gradient(grads[i], biases[i % count].numel(), time);
    grads[i] = dense(grads[i]);
  }
  std::vector<Tensor> of_biases = f.like(f.biases), of_rows = f.like(f.rows);
  Tensor of_time = empty(time, time.sizes());
  f.args.of_time = data_of(of_time);
  for (size_t l = 0; l < count; ++l) {
    TimeLayer& y = f.args.layer[l];
    y.grad_bias = grads[l].const_data_ptr();
    if (f.args.squash) y.grad_gate = grads[count + l].const_data_ptr();
    y.of_bias = data_of(of_biases[l]);
    y.of_rows = data_of(of_rows[l]);
  }
  Device::run(f.args, time, true);
  return {of_time, of_biases, of_rows};
}

}  // namespace pfk
