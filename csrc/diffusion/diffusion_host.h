// SPDX-License-Identifier: Apache-2.0
// From tensors to DiffusionArgs, once for CPU and CUDA.
#pragma once

#include "core/host.h"
#include "diffusion/diffusion.h"

namespace pfk {

struct DiffusionTensors {
  Tensor x, drift, other, out;  // kept alive while the kernel runs
  int drifts;
  DiffusionArgs args;
};

inline DiffusionTensors diffusion_tensors(const Tensor& x, const std::optional<Tensor>& drift,
                                          const std::optional<Tensor>& other, const Tensor& seed,
                                          int64_t stream, double step, double scale) {
  DiffusionTensors t{dense(x), {}, {}, empty(x, x.sizes()), 0, {}};
  DiffusionArgs& a = t.args;
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kFloat64, "diffusion: x in float32 or float64");
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long,
                  "diffusion: the seed must be one int64");
  STD_TORCH_CHECK(drift || !other, "diffusion: a second drift needs a first");
  const auto take = [&](const std::optional<Tensor>& given, Tensor& kept, const void*& data) {
    if (!given) return;
    STD_TORCH_CHECK(given->numel() == x.numel() && given->scalar_type() == x.scalar_type(),
                    "diffusion: drifts must be like x");
    kept = dense(*given);
    data = kept.const_data_ptr();
    ++t.drifts;
  };
  take(drift, t.drift, a.drift);
  take(other, t.other, a.other);
  a.count = x.numel();
  a.x = t.x.const_data_ptr();
  a.out = t.out.mutable_data_ptr();
  a.step = step, a.scale = scale;
  a.stream = static_cast<uint64_t>(stream);
  return t;
}

}  // namespace pfk
