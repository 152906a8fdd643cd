// SPDX-License-Identifier: Apache-2.0
// From tensors to NormalArgs, once for CPU and CUDA.
#pragma once

#include "core/host.h"
#include "density/density.h"

namespace pfk {

// A parameter has the axes of z, or those of a sample of z, in which case all samples share it.
struct Parameter {
  ParameterKind kind = kNone;
  Tensor tensor;
  const void* data() const { return kind == kNone ? nullptr : address_of(tensor); }
};

inline Parameter parameter_of(const std::optional<Tensor>& p, const Canonical& z) {
  if (!p) return {};
  if (p->dim() != z.tensor.dim()) return {kEvent, dense_sums(*p, z.tensor)};
  STD_TORCH_CHECK(p->scalar_type() == z.tensor.scalar_type(),
                  "pyflowkern: a parameter of each element has the dtype of z");
  return {kElement, with_format(*p, z.channels_last)};
}

struct NormalTensors {
  Canonical z;  // kept alive while the kernel runs, as are the others
  Parameter mean, log_std;
  NormalArgs args;
};

inline NormalTensors normal_tensors(const Tensor& z, const std::optional<Tensor>& mean,
                                    const std::optional<Tensor>& log_std) {
  const Canonical c = canonical(z);
  NormalTensors t{c, parameter_of(mean, c), parameter_of(log_std, c), {}};
  const ImageShape shape = image_shape(z);
  NormalArgs& a = t.args;
  a.mean_kind = t.mean.kind, a.log_std_kind = t.log_std.kind;
  a.rows = shape.samples, a.features = shape.features();
  a.channels = shape.channels, a.space = shape.space;
  a.channels_last = c.channels_last;
  a.constant = -kHalfLog2Pi * static_cast<double>(a.features);
  a.z = c.tensor.const_data_ptr();
  a.mean = t.mean.data(), a.log_std = t.log_std.data();
  return t;
}

// The gradients that a backward returns; one that is not wanted has no elements.
struct NormalGrads {
  Tensor z, mean, log_std;
};

inline Tensor grad_of(const Canonical& z, const Parameter& p, bool wanted) {
  if (p.kind == kNone || !wanted) return empty(z.tensor, {0});
  if (p.kind == kElement) return empty_like_canonical(z);
  return empty(p.tensor, p.tensor.sizes());
}

inline NormalGrads normal_grads(NormalTensors& t, int64_t wanted) {
  checked_flags("wanted", wanted, kAllGrads);
  NormalGrads g{grad_of(t.z, {kElement, t.z.tensor}, wanted & kGradZ),
                grad_of(t.z, t.mean, wanted & kGradMean),
                grad_of(t.z, t.log_std, wanted & kGradLogStd)};
  NormalArgs& a = t.args;
  if (wanted & kGradZ) a.grad_z = g.z.mutable_data_ptr();
  if (a.mean && (wanted & kGradMean)) a.grad_mean = g.mean.mutable_data_ptr();
  if (a.log_std && (wanted & kGradLogStd)) a.grad_log_std = g.log_std.mutable_data_ptr();
  return g;
}

}  // namespace pfk
