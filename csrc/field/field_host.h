// SPDX-License-Identifier: Apache-2.0
// Fields on the host: from tensors to FieldArgs, and wide layers by matrix products of torch.
//
// A wide layer is one matrix product of all stacked rows (two in the backward pass, for the input
// and for the weight) and an elementwise kernel.  A Device provides both:  multiply(out, a, b),
// stack(StackArgs, DType), layer(LayerArgs, LayerStep, DType), output(OutputArgs, backward, DType)
// and row_dot(RowDotArgs, backward, DType).
#pragma once

#include "core/host.h"
#include "field/field.h"

namespace pfk {

using Tensors = std::vector<Tensor>;

enum LayerStep : int { kLayerForward, kLayerRestore, kLayerBackward };

// ---- torch's operators -------------------------------------------------------------------------
inline void call_torch(const char* name, const char* overload, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
}

// out = a b
inline void multiply_out(Tensor& out, const Tensor& a, const Tensor& b) {
  StableIValue stack[3] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                           torch::stable::detail::from(out)};
  call_torch("aten::mm", "out", stack);
  torch::stable::detail::to<Tensor>(stack[0]);
}
inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
inline Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor copy = t;
  return torch::stable::narrow(copy, 0, first, count);
}
inline Tensor sum_rows(const Tensor& t) {
  const int64_t rows = 0;
  return torch::stable::sum(t, Sizes(&rows, 1));
}
inline const void* data_of(const std::optional<Tensor>& t) {
  return t.has_value() ? address_of(*t) : nullptr;
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(dense(*t)) : t;
}

// ---- arguments ---------------------------------------------------------------------------------
struct Field {
  Tensor x, probe;
  Tensors weights, biases, gates;
  std::vector<FieldLayer> layers;
  FieldArgs args{};
  int64_t packed_size = 0, kept_size = 0;

  Field(const Tensor& x_, const Tensor& probe_, int64_t probes, const Tensors& weights_,
        const Tensors& biases_, const Tensors& gates_, int64_t activation, int64_t flags)
      : x(dense(x_)), probe(dense(probe_)) {
    const auto sizes = x.sizes();
    args.samples = sizes[0];
    args.features = sizes[1];
    args.probes = probes;
    args.layers = static_cast<int>(weights_.size());
    args.activation = checked_kind("activation", activation, kActivations);
    args.flags = checked_flags("flags", flags, kAllFieldFlags);
    STD_TORCH_CHECK(probes >= 0 && (probes == 1 || !(flags & kFieldFlat)),
                    "pyflowkern: a trace without an axis of probes is of 1, got ", probes);
    args.x = x.const_data_ptr();
    if (probe.scalar_type() == ScalarType::Long) {
      args.probe.seed = static_cast<const int64_t*>(probe.const_data_ptr());
    } else {  // [probes, samples or 1, features]
      const int64_t count = probe.dim() == 3 ? probe.sizes()[1] : 1;
      STD_TORCH_CHECK(probes == 0 || (probe.dim() == 3 && probe.sizes()[0] == probes &&
                                      (count == 1 || count == args.samples) &&
                                      probe.sizes()[2] == args.features &&
                                      probe.scalar_type() == x.scalar_type()),
                      "pyflowkern: probe must be [probes, samples or 1, features] for ", probes,
                      " probes, in the dtype of x");
      args.probe.data = probe.const_data_ptr();
      args.probe.step_probe = count * args.features;
      args.probe.step_sample = count == 1 ? 0 : args.features;
    }
    for (int l = 0; l < args.layers; ++l) add_layer(l, weights_, biases_, gates_);
    STD_TORCH_CHECK(args.layers > 0 && layers.back().out == args.features,
                    "the last layer must give what the first takes, ", args.features);
    args.layer = layers.data();
  }

  int64_t rows() const { return args.samples * (1 + args.probes); }
  FieldLayer& last() { return layers.back(); }

  // Multiplies gates that all samples share into the packed copies of the weights: g (W h) = (g W)
  // h.
  void fold_gates() {
    for (FieldLayer& y : layers) {
      if (y.gate == nullptr || y.gate_step) continue;
      y.scale = y.gate;
      y.gate = nullptr;
      y.value_kept = args.activation == kActTanh && &y != &layers.back();
    }
  }

  // For a forward pass that kept nothing: the backward pass computes everything again.
  void forget() {
    for (FieldLayer& y : layers) y.kept = -1;
  }

  // The block of a layer in what is kept, [rows, out].
  Tensor kept_block(const Tensor& kept, int l) const {
    const FieldLayer& y = layers[l];
    Tensor flat = kept;
    const Tensor part = torch::stable::narrow(flat, 0, y.kept, rows() * y.out);
    return torch::stable::view(part, {rows(), y.out});
  }

  // Places the packed copy of a layer behind those of the layers before.
  void place(FieldLayer& y) {
    y.in_stride = padded(y.in);
    y.out_stride = padded(y.out);
    constexpr int64_t kLanes = 16;
    y.sum_transposed =
        y.in * ((y.out + kLanes - 1) / kLanes) < y.out * ((y.in + kLanes - 1) / kLanes);
    y.sums = args.sums_size;
    args.sums_size += weight_sum_size(y) + 2 * y.out_stride;
    y.packed = packed_size;
    packed_size += y.in * y.out_stride + y.out * y.in_stride + 2 * y.out_stride;
    y.column = columns_;
    columns_ += y.out_stride;
  }

 private:
  int64_t columns_ = 0;

  // The layers of a module may have been replaced by others: nothing may be read beyond their ends.
  void check(int l, const FieldLayer& y) const {
    const int64_t before = l ? layers.back().out : args.features;
    auto fits = [&](const Tensor& t) {
      return t.scalar_type() == x.scalar_type() &&
             t.numel() == y.out * (t.dim() == 2 ? args.samples : 1);
    };
    STD_TORCH_CHECK(weights[l].scalar_type() == x.scalar_type() && weights[l].dim() == 2 &&
                        y.in == before && fits(biases[l]) && (gates.empty() || fits(gates[l])),
                    "the parameters of layer ", l, " do not fit its input, of ", before,
                    " columns, in size or dtype");
  }

  void add_layer(int l, const Tensors& w, const Tensors& b, const Tensors& g) {
    weights.push_back(dense(w[l]));
    biases.push_back(dense(b[l]));
    if (!g.empty()) gates.push_back(dense(g[l]));
    const bool last = l == args.layers - 1;
    FieldLayer y{};
    y.out = weights[l].sizes()[0];
    y.in = weights[l].sizes()[1];
    y.weight = weights[l].const_data_ptr();
    y.bias = biases[l].const_data_ptr();
    y.bias_step = biases[l].dim() == 2 ? y.out : 0;
    if (!g.empty()) {
      y.gate = address_of(gates[l]);
      y.gate_step = gates[l].dim() == 2 ? y.out : 0;
    }
    y.value_kept = !last && args.activation == kActTanh && y.gate == nullptr;
    // every second layer from the last one is kept; the others follow by one product each, which
    // costs little for a first layer of few inputs
    const bool keep = !last && (args.layers - l) % 2 == 0 && (l > 0 || y.in >= y.out);
    y.kept = keep ? kept_size : -1;
    if (keep) kept_size += rows() * y.out;
    check(l, y);
    place(y);
    layers.push_back(y);
  }
};

struct FieldOutputs {
  Tensor y, trace, norm, kept;
  FieldOutputs(Field& f) {
    FieldArgs& a = f.args;
    y = empty(f.x, {a.samples, a.features});
    trace = a.flags & kFieldFlat ? empty(f.x, {a.samples}) : empty(f.x, {a.probes, a.samples});
    const bool norm_wanted = a.flags & kFieldNorm, keep = a.flags & kFieldKeep;
    norm = empty(f.x, {norm_wanted ? a.probes : 0, a.samples});
    kept = empty(f.x, {keep ? f.kept_size : 0});
    a.y = data_of(y);
    a.trace = data_of(trace);
    a.norm = norm_wanted ? data_of(norm) : nullptr;
    a.kept = keep ? data_of(kept) : nullptr;
  }
};

struct FieldGradients {
  Tensor x;
  Tensors weights, biases, gates;
  FieldGradients(Field& f) {
    x = empty(f.x, f.x.sizes());
    f.args.grad_x = data_of(x);
    for (int l = 0; l < f.args.layers; ++l) {
      FieldLayer& y = f.layers[l];
      weights.push_back(empty(f.x, f.weights[l].sizes()));
      biases.push_back(empty(f.x, f.biases[l].sizes()));
      y.grad_weight = data_of(weights[l]);
      y.grad_bias = data_of(biases[l]);
      if (f.gates.empty()) continue;
      gates.push_back(empty(f.x, f.gates[l].sizes()));
      y.grad_gate = data_of(gates[l]);
    }
  }
};

// ---- wide layers ----------------------------------------------------------------------
inline LayerArgs layer_args(const Field& f, int l, const Tensor& p) {
  const FieldLayer& y = f.layers[l];
  LayerArgs r{};
  r.samples = f.args.samples;
  r.probes = f.args.probes;
  r.columns = r.stride = y.out;
  r.activation = f.args.activation;
  r.value_kept = y.value_kept;
  r.p = data_of(p);
  r.tangent_step = y.out;
  r.bias = y.bias;
  r.gate = y.gate;
  r.bias_step = y.bias_step;
  r.gate_step = y.gate_step;
  return r;
}

inline OutputArgs output_args(const Field& f, const Tensor& p, const Tensor& input) {
  const FieldArgs& a = f.args;
  const FieldLayer& y = f.layers.back();
  OutputArgs r{};
  r.samples = r.trace_step = a.samples;
  r.probes = a.probes;
  r.features = r.stride = a.features;
  r.p = data_of(p);
  r.e = data_of(input);
  r.bias = y.bias;
  r.gate = y.gate;
  r.bias_step = y.bias_step;
  r.gate_step = y.gate_step;
  r.y = a.y;
  r.trace = a.trace;
  r.norm = a.norm;
  r.grad_y = a.grad_y;
  r.grad_trace = a.grad_trace;
  r.grad_norm = a.grad_norm;
  return r;
}

template <class Device>
Tensor stacked_input(const Field& f) {
  const FieldArgs& a = f.args;
  Tensor s = empty(f.x, {f.rows(), a.features});
  Device::stack({a.samples, a.probes, a.features, a.x, a.probe, data_of(s)}, full_dtype(f.x));
  return s;
}

// h' and its tangents of layer l from its products.
template <class Device>
Tensor activated(const Field& f, int l, const Tensor& p, LayerStep step) {
  Tensor s = empty(f.x, {f.rows(), f.layers[l].out});
  LayerArgs r = layer_args(f, l, p);
  r.s = data_of(s);
  if (step == kLayerRestore) r.value_kept = has_value(f.args, l);
  Device::layer(r, step, full_dtype(f.x));
  return s;
}

template <class Device>
void wide_forward(const Field& f, const Tensor& kept) {
  const Tensor input = stacked_input<Device>(f);
  Tensor h = input;
  for (int l = 0; l < f.args.layers; ++l) {
    const bool last = l == f.args.layers - 1;
    Tensor p = f.args.kept && f.layers[l].kept >= 0 ? f.kept_block(kept, l)
                                                    : empty(f.x, {f.rows(), f.layers[l].out});
    Device::multiply(p, h, transposed(f.weights[l]));
    if (last) {
      Device::output(output_args(f, p, input), false, full_dtype(f.x));
    } else {
      h = activated<Device>(f, l, p, kLayerForward);
    }
  }
}

// Gradients of a layer's parameters of every sample, summed where all share them.
struct OwnGradients {
  bool needed;
  Tensor bias, gate;

  template <class Args>
  OwnGradients(const Field& f, const FieldLayer& y, Args& to) : needed(y.bias_step || y.gate) {
    if (!needed) return;
    bias = empty(f.x, {f.args.samples, y.out});
    to.grad_bias = data_of(bias);
    to.grad_bias_step = to.grad_gate_step = y.out;
    if (!y.gate) return;
    gate = empty(f.x, {f.args.samples, y.out});
    to.grad_gate = data_of(gate);
  }
  // `primal`: cotangents of the layer's product; without a gate they are those of the bias, too
  void finish(const FieldLayer& y, const Tensor& primal, Tensor& to_bias, Tensor* to_gate) {
    to_bias = y.bias_step ? bias : sum_rows(needed ? bias : primal);
    if (to_gate) *to_gate = y.gate_step ? gate : sum_rows(gate);
  }
};

// The products of all hidden layers: read where they were kept, computed again where not.
template <class Device>
Tensors wide_products(const Field& f, const Tensor& kept, const Tensor& input) {
  Tensors products;
  Tensor h = input;
  for (int l = 0; l < f.args.layers - 1; ++l) {
    const FieldLayer& y = f.layers[l];
    Tensor p = y.kept < 0 ? empty(f.x, {f.rows(), y.out}) : f.kept_block(kept, l);
    if (y.kept < 0) Device::multiply(p, h, transposed(f.weights[l]));
    if (continues(f.args, l)) {
      h = activated<Device>(f, l, p, y.kept < 0 ? kLayerForward : kLayerRestore);
    }
    products.push_back(p);
  }
  return products;
}

template <class Device>
void wide_backward(Field& f, const Tensor& kept, FieldGradients& to) {
  const FieldArgs& a = f.args;
  const DType dtype = full_dtype(f.x);
  const Tensor input = stacked_input<Device>(f);
  Tensors products = wide_products<Device>(f, kept, input);
  int l = a.layers - 1;
  Tensor grad = empty(f.x, {f.rows(), a.features});
  const bool again = a.grad_norm || f.last().gate;
  Tensor p = empty(f.x, {again ? f.rows() : 0, a.features});
  if (again) {
    const Tensor h = l ? activated<Device>(f, l - 1, products[l - 1], kLayerRestore) : input;
    Device::multiply(p, h, transposed(f.weights[l]));
  }
  auto gate_of = [&](int layer) { return f.gates.empty() ? nullptr : &to.gates[layer]; };
  OutputArgs o = output_args(f, p, input);
  o.grad = data_of(grad);
  OwnGradients own(f, f.last(), o);
  Device::output(o, true, dtype);
  own.finish(f.last(), rows_of(grad, 0, a.samples), to.biases[l], gate_of(l));
  for (; l >= 0; --l) {
    Tensor h = input;
    if (l == 0) {
      Device::multiply(to.x, rows_of(grad, 0, a.samples), f.weights[0]);
      Device::multiply(to.weights[0], transposed(grad), h);
      return;
    }
    const FieldLayer& below = f.layers[l - 1];
    Tensor below_grad = empty(f.x, {f.rows(), below.out});
    h = empty(f.x, {f.rows(), below.out});
    Device::multiply(below_grad, grad, f.weights[l]);
    LayerArgs r = layer_args(f, l - 1, products[l - 1]);
    r.value_kept = has_value(a, l - 1);
    r.grad = data_of(below_grad);
    r.s = data_of(h);
    OwnGradients mine(f, below, r);
    Device::layer(r, kLayerBackward, dtype);
    mine.finish(below, rows_of(below_grad, 0, a.samples), to.biases[l - 1], gate_of(l - 1));
    Device::multiply(to.weights[l], transposed(grad), h);
    grad = below_grad;
  }
}

}  // namespace pfk
