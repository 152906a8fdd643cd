// SPDX-License-Identifier: Apache-2.0
// The ops of the family on the host, for any Device (see field_host.h); those of exact traces
// are in field_exact.h.
#pragma once

#include "field/field_host.h"

namespace pfk {

using RunForward = void(Field&, const Tensor&);
using RunBackward = void(Field&, const Tensor&, FieldGradients&);

template <RunForward kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor> field_forward(const Tensor& x, const Tensor& probe,
                                                         int64_t probes, Tensors weights,
                                                         Tensors biases, Tensors gates,
                                                         int64_t activation, int64_t flags) {
  Field f(x, probe, probes, weights, biases, gates, activation, flags);
  FieldOutputs out(f);
  kRun(f, out.kept);
  return {out.y, out.trace, out.norm, out.kept};
}

template <RunBackward kRun>
std::tuple<Tensor, Tensors, Tensors, Tensors> field_backward(
    std::optional<Tensor> grad_y, std::optional<Tensor> grad_trace, std::optional<Tensor> grad_norm,
    const Tensor& x, const Tensor& probe, int64_t probes, Tensors weights, Tensors biases,
    Tensors gates, const Tensor& kept, int64_t activation, int64_t flags) {
  Field f(x, probe, probes, weights, biases, gates, activation, flags);
  FieldGradients to(f);
  const std::optional<Tensor> gy = dense(grad_y), gt = dense(grad_trace), gn = dense(grad_norm);
  if (gy) check_gradient(*gy, x.numel(), x);
  for (const auto& g : {gt, gn}) {
    if (g) check_gradient(*g, f.args.samples * probes, x);
  }
  f.args.grad_y = data_of(gy);
  f.args.grad_trace = data_of(gt);
  f.args.grad_norm = data_of(gn);
  f.args.kept = data_of(kept);
  if (kept.numel() != f.kept_size) f.forget();
  kRun(f, kept, to);
  return {to.x, to.weights, to.biases, to.gates};
}

// ---- rows of products --------------------------------------------------------------------------
inline RowDotArgs row_args(const Tensor& a, const Tensor& b) {
  RowDotArgs r{};
  r.rows = a.sizes()[0];
  r.features = a.sizes()[1];
  r.a = a.const_data_ptr();
  r.b = b.const_data_ptr();
  return r;
}

template <class Device>
std::tuple<Tensor, Tensor> trace_forward(const Tensor& e, const Tensor& je) {
  const Tensor a = dense(e), b = dense(je);
  RowDotArgs r = row_args(a, b);
  Tensor trace = empty(a, {r.rows}), norm = empty(a, {r.rows});
  r.trace = data_of(trace);
  r.norm = data_of(norm);
  Device::row_dot(r, false, full_dtype(a));
  return {trace, norm};
}

template <class Device>
std::tuple<Tensor, Tensor> trace_backward(std::optional<Tensor> grad_trace,
                                          std::optional<Tensor> grad_norm, const Tensor& e,
                                          const Tensor& je) {
  const Tensor a = dense(e), b = dense(je);
  const std::optional<Tensor> gt = dense(grad_trace), gn = dense(grad_norm);
  RowDotArgs r = row_args(a, b);
  Tensor grad_a = empty(a, a.sizes()), grad_b = empty(a, a.sizes());
  r.grad_trace = data_of(gt);
  r.grad_norm = data_of(gn);
  r.grad_a = data_of(grad_a);
  r.grad_b = data_of(grad_b);
  Device::row_dot(r, true, full_dtype(a));
  return {grad_a, grad_b};
}

}  // namespace pfk
