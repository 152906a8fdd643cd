// SPDX-License-Identifier: Apache-2.0
// The ops of field_layer.h on the host, for any Device:  forward(PlanesArgs, DType),
// backward(PlanesArgs, DType) and kSums: whether backward() adds up the gradients of parameters
// over the rows of a task, or writes them for every row.
#pragma once

#include "core/host.h"
#include "field_layer/field_layer.h"

namespace pfk {

// The axes of a channels_last tensor in the order of its memory.
inline Tensor channels_to_end(Tensor t) {
  for (int64_t d = 1; d + 1 < t.dim(); ++d) t = torch::stable::transpose(t, d, d + 1);
  return t;
}
inline Tensor channels_from_end(Tensor t) {
  for (int64_t d = t.dim() - 1; d > 1; --d) t = torch::stable::transpose(t, d, d - 1);
  return t;
}
inline Tensor sum_axis(const Tensor& t, int64_t axis) {
  return torch::stable::sum(t, Sizes(&axis, 1));
}

struct Planes {
  Canonical p;
  Tensor bias, gate;
  bool gated;
  int64_t samples;
  PlanesArgs args{};

  Planes(const Tensor& p_, const Tensor& bias_, const std::optional<Tensor>& gate_,
         int64_t tangents, int64_t activation, bool from_output)
      : p(canonical(p_)), gated(gate_.has_value()) {
    constexpr int64_t kGroup =
        64;  // rows whose gradients are added up in the type of the computation
    const ImageShape s = image_shape(p.tensor);
    const bool maps = p_.dim() > 2 && bias_.dim() == p_.dim();
    STD_TORCH_CHECK(tangents >= 0 && s.samples % (1 + tangents) == 0,
                    "pyflowkern: p must stack 1 + tangents times as many rows as samples, got ",
                    s.samples, " rows and ", tangents, " tangents");
    samples = s.samples / (1 + tangents);
    bias = with_format(bias_, maps && p.channels_last);
    if (gated) gate = with_format(*gate_, maps && p.channels_last);
    PlanesArgs& a = args;
    a.tangents = tangents;
    a.activation = checked_kind("activation", activation, kActivations);
    a.from_output = from_output;
    a.runs = !maps && s.space > 1 && !p.channels_last;
    a.repeat = maps || a.runs ? 1 : s.space;
    a.columns = maps ? s.features() : a.runs ? s.space : s.channels;
    a.rows = samples * s.features() / (a.columns > 0 ? a.columns : 1);
    auto period = [&](const Tensor& t) {
      const int64_t own = t.dim() > 1 ? t.sizes()[0] : 1;
      return a.runs ? own * s.channels : own;
    };
    a.bias_period = period(bias);
    a.gate_period = gated ? period(gate) : 1;
    const bool shared = a.bias_period == 1 && a.gate_period == 1 && a.repeat == 1;
    a.unit = a.runs ? 1 : shared ? a.rows : a.repeat;
    a.group = a.unit < kGroup ? a.unit : kGroup;
    a.p = p.tensor.const_data_ptr();
    a.bias = bias.const_data_ptr();
    a.gate = gated ? address_of(gate) : nullptr;
  }

  Tensor top(const Tensor& stack) const {
    Tensor all = stack;
    return torch::stable::narrow(all, 0, 0, samples);
  }
  bool nothing() const { return args.rows * args.columns == 0; }
  // Tasks of a unit, and of all.
  int64_t groups() const { return (args.unit + args.group - 1) / args.group; }
  int64_t tasks() const { return args.rows / args.unit * groups(); }

  // The gradient of a parameter from parts [count, width]; all samples have the same number of
  // parts.
  Tensor finish(Tensor parts, const Tensor& parameter) const {
    const int64_t count = parts.sizes()[0], width = parts.sizes()[1];
    const bool own = parameter.dim() > 1 && parameter.sizes()[0] > 1;
    if (own && count > samples) {
      parts = sum_axis(torch::stable::view(parts, {samples, count / samples, width}), 1);
    } else if (!own && count > 1) {
      parts = sum_axis(parts, 0);
    }
    const auto sizes = parameter.sizes();
    if (!p.channels_last || parameter.dim() < 3) return torch::stable::view(parts, sizes);
    std::vector<int64_t> transposed{sizes[0]};
    for (size_t d = 2; d < sizes.size(); ++d) transposed.push_back(sizes[d]);
    transposed.push_back(sizes[1]);
    return channels_from_end(torch::stable::view(parts, transposed));
  }
};

template <class Device>
Tensor layer_forward_op(const Tensor& p, const Tensor& bias, std::optional<Tensor> gate,
                        int64_t tangents, int64_t activation) {
  Planes f(p, bias, gate, tangents, activation, false);
  Tensor h = empty_like_canonical(f.p);
  f.args.h = data_of(h);
  if (!f.nothing()) Device::forward(f, full_dtype(p));
  return h;
}

// In place of p.
template <class Device>
void layer_inplace_op(const Tensor& p, const Tensor& bias, std::optional<Tensor> gate,
                      int64_t tangents, int64_t activation) {
  STD_TORCH_CHECK(p.is_contiguous() || is_channels_last(p),
                  "pyflowkern::field_layer_: p must be contiguous or channels_last");
  Planes f(p, bias, gate, tangents, activation, false);
  f.args.h = data_of(p);
  if (!f.nothing()) Device::forward(f, full_dtype(p));
}

// Gradients of bias and gate; those of p to grad_p, which may be q.
template <class Device>
std::tuple<Tensor, Tensor> layer_gradients(Planes& f, const Tensor& q, const Tensor& grad_p) {
  const Tensor& like = f.p.tensor;
  if (f.nothing()) {
    auto zeros = [](const Tensor& t) {
      Tensor z = empty(t, t.sizes());
      return torch::stable::fill_(z, 0.0);
    };
    return {zeros(f.bias), f.gated ? zeros(f.gate) : empty(like, {0})};
  }
  PlanesArgs& a = f.args;
  a.grad = q.const_data_ptr();
  a.grad_p = data_of(grad_p);
  // a part has a number for each column, or, where these share parameters, for each channel
  const int64_t width = a.runs ? a.rows / f.samples : a.columns;
  const int64_t count = a.runs ? f.samples : Device::kSums ? f.tasks() : a.rows;
  const bool primal =
      !Device::kSums && !a.runs && !f.gated;  // the cotangents of p are those of the bias
  Tensor of_bias, of_gate = empty(like, {f.gated ? count : 0, width});
  if (!primal) {
    of_bias = empty(like, {count, width});
    a.grad_bias = data_of(of_bias);
  }
  if (f.gated) a.grad_gate = data_of(of_gate);
  Device::backward(f, full_dtype(like));
  if (primal) {
    const Tensor top = f.top(grad_p);
    of_bias = torch::stable::view(f.p.channels_last ? channels_to_end(top) : top, {count, width});
  }
  return {f.finish(of_bias, f.bias), f.gated ? f.finish(of_gate, f.gate) : of_gate};
}

// `kept` is p, or the output if it is enough: without a gate, see follow_from_value().
inline Planes kept_planes(const Tensor& kept, const Tensor& bias, const std::optional<Tensor>& gate,
                          int64_t tangents, int64_t activation) {
  const bool from_output =
      !gate.has_value() && follow_from_value(activation_of(static_cast<int>(activation)));
  return Planes(kept, bias, gate, tangents, activation, from_output);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_backward_op(const Tensor& grad, const Tensor& kept,
                                                     const Tensor& bias, std::optional<Tensor> gate,
                                                     int64_t tangents, int64_t activation) {
  Planes f = kept_planes(kept, bias, gate, tangents, activation);
  Tensor grad_p = empty_like_canonical(f.p);
  auto [of_bias, of_gate] =
      layer_gradients<Device>(f, with_format(grad, f.p.channels_last), grad_p);
  return {grad_p, of_bias, of_gate};
}

// In place of the gradient.
template <class Device>
std::tuple<Tensor, Tensor> layer_backward_inplace_op(const Tensor& grad, const Tensor& kept,
                                                     const Tensor& bias, std::optional<Tensor> gate,
                                                     int64_t tangents, int64_t activation) {
  Planes f = kept_planes(kept, bias, gate, tangents, activation);
  const bool fits = f.p.channels_last ? is_channels_last(grad) : grad.is_contiguous();
  STD_TORCH_CHECK(fits,
                  "pyflowkern::field_layer_backward_: grad must be laid out like what is kept");
  return layer_gradients<Device>(f, grad, grad);
}

}  // namespace pfk
