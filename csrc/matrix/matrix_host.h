// SPDX-License-Identifier: Apache-2.0
// From tensors to SlogdetArgs and PluArgs, once for CPU and CUDA.
#pragma once

#include "core/host.h"
#include "matrix/matrix.h"

namespace pfk {

struct SlogdetTensors {
  Tensor weight;  // kept alive while the kernel runs
  Tensor sign, log_abs_det, inverse;
  SlogdetArgs args;
  int64_t batch;
};

inline SlogdetTensors slogdet_tensors(const Tensor& weight) {
  const auto sizes = weight.sizes();
  const std::vector<int64_t> outer(sizes.begin(), sizes.end() - 2);
  SlogdetTensors t{with_format(weight, false),
                   empty(weight, outer),
                   empty(weight, outer),
                   empty(weight, sizes),
                   {},
                   1};
  for (const int64_t size : outer) t.batch *= size;
  t.args = {sizes[sizes.size() - 1], t.weight.const_data_ptr(), t.sign.mutable_data_ptr(),
            t.log_abs_det.mutable_data_ptr(), t.inverse.mutable_data_ptr()};
  return t;
}

struct PluTensors {
  Tensor permutation, lower, upper, log_diag, sign;
  PluArgs args;
};

inline PluTensors plu_tensors(const Tensor& permutation, const Tensor& lower, const Tensor& upper,
                              const Tensor& log_diag, const Tensor& sign, bool inverse) {
  PluTensors t{with_format(permutation, false), with_format(lower, false),
               with_format(upper, false),       with_format(log_diag, false),
               with_format(sign, false),        {}};
  PluArgs& a = t.args;
  a.size = lower.sizes()[0];
  a.inverse = inverse;
  a.permutation = static_cast<const int64_t*>(t.permutation.const_data_ptr());
  a.lower = t.lower.const_data_ptr(), a.upper = t.upper.const_data_ptr();
  a.log_diag = t.log_diag.const_data_ptr(), a.sign = t.sign.const_data_ptr();
  return t;
}

// The gradients of lower, upper and log_diag.
inline std::tuple<Tensor, Tensor, Tensor> plu_grads(PluTensors& t) {
  Tensor lower = empty(t.lower, t.lower.sizes());
  Tensor upper = empty(t.upper, t.upper.sizes());
  Tensor log_diag = empty(t.log_diag, t.log_diag.sizes());
  t.args.grad_lower = lower.mutable_data_ptr(), t.args.grad_upper = upper.mutable_data_ptr();
  t.args.grad_log_diag = log_diag.mutable_data_ptr();
  return {lower, upper, log_diag};
}

}  // namespace pfk
