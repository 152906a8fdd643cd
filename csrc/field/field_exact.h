// SPDX-License-Identifier: Apache-2.0
// The exact trace of shallow fields on the host, for any Device (see field_host.h).
//
// With slopes s = g f'(a),
//   one hidden layer:  tr J = M s1,               M_j = sum_i W2[i, j] g2[i] W1[j, i]
//   two:               tr J = s2 . (M s1),        M = W2 o (W1 diag(g3) W3)^T
// A layer turns a tangent of ones into its slopes, so that the same elementwise kernels compute
// them.  M is like one more layer, without bias and activation.
#pragma once

#include "field/field_ops.h"

namespace pfk {

inline Tensor product_of(const Tensor& a, const Tensor& b) {
  StableIValue stack[2] = {torch::stable::detail::from(a), torch::stable::detail::from(b)};
  call_torch("aten::mul", "Tensor", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}
inline Tensor sum_of(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);
}
inline Tensor sum_columns(const Tensor& t) {
  const int64_t columns = 1;
  return torch::stable::sum(t, Sizes(&columns, 1));
}
inline Tensor column_of(const Tensor& t) { return torch::stable::view(t, {t.numel(), 1}); }

// A field with one "tangent", which consists of ones.  Kept are the products [samples, out] of each
// hidden layer and, of two, q = M s1.
struct Exact : Field {
  int64_t n, hidden;
  Tensor last_weight;  // with the gate of the output
  Tensor paired;       // of two hidden layers: (W1 diag(g3) W3)^T
  Tensor m;            // [out of the last hidden layer or 1, out of the first]
  FieldLayer coupling{};

  Exact(const Tensor& x_, const Tensors& w, const Tensors& b, const Tensors& g, int64_t activation,
        int64_t flags)
      : Field(x_, x_, 0, w, b, g, activation, flags),
        n(args.samples),
        hidden(args.layers - 1),
        last_weight(weights.back()) {
    args.probe = {};
    kept_size = 0;
    for (FieldLayer& y : layers) {
      y.kept = kept_size;
      kept_size += &y == &layers.back() ? 0 : n * y.out;
    }
    coupling.in = layers[0].out;
    coupling.out = hidden == 2 ? layers[1].out : 1;
    coupling.kept = hidden == 2 ? kept_size : -1;
    place(coupling);
  }

  template <class Device>
  void couple() {
    if (!gates.empty()) last_weight = product_of(column_of(gates.back()), last_weight);
    const Tensor &first = weights[0], &last = last_weight;
    if (hidden == 1) {
      m = torch::stable::view(sum_columns(product_of(transposed(last), first)), {1, coupling.in});
    } else {
      paired = empty(x, {coupling.out, coupling.in});
      Device::multiply(paired, transposed(last), transposed(first));
      m = product_of(weights[1], paired);
    }
    coupling.weight = data_of(m);
  }

  // Adds the gradients through M to those of the weights and of the output's gate.
  template <class Device>
  void uncouple(const Tensor& grad_m, FieldGradients& to) const {
    Tensor& of_last = to.weights[hidden];
    Tensor of_gated_weight = of_last;  // with the gate of the output
    if (!gates.empty()) {
      of_gated_weight = empty(x, of_last.sizes());
      torch::stable::fill_(of_gated_weight, 0.0);
    }
    const Tensor last_transposed = transposed(last_weight),
                 first_transposed = transposed(weights[0]);
    if (hidden == 1) {
      const Tensor grad = column_of(grad_m);
      to.weights[0] = sum_of(to.weights[0], product_of(grad, last_transposed));
      of_gated_weight = sum_of(of_gated_weight, transposed(product_of(grad, weights[0])));
    } else {
      to.weights[1] = sum_of(to.weights[1], product_of(grad_m, paired));
      const Tensor grad = transposed(product_of(grad_m, weights[1]));
      Device::multiply_add(to.weights[0], grad, last_transposed);
      Device::multiply_add(of_gated_weight, first_transposed, grad);
    }
    if (gates.empty()) {
      of_last = of_gated_weight;
      return;
    }
    const Tensor of_gate = sum_columns(product_of(of_gated_weight, weights.back()));
    to.gates[hidden] = sum_of(to.gates[hidden], of_gate);
    of_last = sum_of(of_last, product_of(column_of(gates.back()), of_gated_weight));
  }

  int64_t size() const { return kept_size + (hidden == 2 ? n * coupling.out : 0); }
  Tensor block(const Tensor& kept, int64_t at, int64_t columns) const {
    Tensor flat = kept;
    return torch::stable::view(torch::stable::narrow(flat, 0, at, n * columns), {n, columns});
  }
  Tensor product(const Tensor& kept, int l) const {
    return block(kept, layers[l].kept, layers[l].out);
  }
  Tensor mixed(const Tensor& kept) const { return block(kept, coupling.kept, coupling.out); }

  // [h'; s] of a hidden layer.
  LayerArgs arguments(int l, const Tensor& p, const Tensor& s, const Tensor& ones) const {
    LayerArgs r = layer_args(*this, l, p);
    r.probes = 1;
    r.tangents = data_of(ones);
    r.tangent_step = 0;
    r.s = data_of(s);
    return r;
  }
  Tensor ones() const {
    int64_t widest = 1;
    for (const FieldLayer& y : layers) widest = widest < y.out ? y.out : widest;
    Tensor row = empty(x, {widest});
    torch::stable::fill_(row, 1.0);
    return row;
  }
  Tensor top(const Tensor& s) const { return rows_of(s, 0, n); }
  Tensor below(const Tensor& s) const { return rows_of(s, n, n); }
};

struct ExactOutputs {
  Tensor y, trace, kept;
  explicit ExactOutputs(Exact& f)
      : y(empty(f.x, f.x.sizes())), trace(empty(f.x, {f.n})), kept(empty(f.x, {f.size()})) {
    f.args.y = data_of(y);
    f.args.trace = data_of(trace);
    f.args.kept = data_of(kept);
  }
};

template <class Device>
void wide_exact(Exact& f, ExactOutputs& to) {
  const DType dtype = full_dtype(f.x);
  const Tensor ones = f.ones();
  Tensor h = f.x, slopes = f.x;
  for (int l = 0; l < f.hidden; ++l) {
    Tensor p = f.product(to.kept, l), s = empty(f.x, {2 * f.n, f.layers[l].out});
    Device::multiply(p, h, transposed(f.weights[l]));
    Device::layer(f.arguments(l, p, s, ones), kLayerForward, dtype);
    if (l == 1) {
      Tensor q = f.mixed(to.kept);
      Device::multiply(q, slopes, transposed(f.m));
      RowDotArgs r = row_args(f.below(s), q);
      r.trace = data_of(to.trace);
      Device::row_dot(r, false, dtype);
    }
    h = f.top(s);
    slopes = f.below(s);
  }
  if (f.hidden == 1) {
    Tensor column = column_of(to.trace);
    Device::multiply(column, slopes, transposed(f.m));
  }
  Tensor p = empty(f.x, f.x.sizes());
  Device::multiply(p, h, transposed(f.weights[f.hidden]));
  Device::output(output_args(f, p, f.x), false, dtype);
}

template <class Device>
Tensor wide_exact_backward(Exact& f, const Tensor& grad_trace, const Tensor& kept,
                           FieldGradients& to) {
  const DType dtype = full_dtype(f.x);
  const Tensor ones = f.ones();
  auto gate_of = [&](int l) { return f.gates.empty() ? nullptr : &to.gates[l]; };
  // from the velocity to the cotangents of the last product
  int l = static_cast<int>(f.hidden);
  Tensor grad = empty(f.x, f.x.sizes()), s = empty(f.x, {2 * f.n, f.layers[l - 1].out});
  if (f.last().gate || l == 2) {
    Device::layer(f.arguments(l - 1, f.product(kept, l - 1), s, ones), kLayerRestore, dtype);
  }
  Tensor p = empty(f.x, {f.last().gate ? f.n : 0, f.args.features});
  if (f.last().gate) Device::multiply(p, f.top(s), transposed(f.weights[l]));
  OutputArgs o = output_args(f, p, f.x);
  o.grad = data_of(grad);
  OwnGradients own(f, f.last(), o);
  Device::output(o, true, dtype);
  own.finish(f.last(), grad, to.biases[l], gate_of(l));
  Tensor mixed;  // cotangents of q
  for (; l > 0; --l) {
    const FieldLayer& y = f.layers[l - 1];
    // cotangents of h' above, of s below
    Tensor both = empty(f.x, {2 * f.n, y.out}), high = f.top(both), low = f.below(both);
    Device::multiply(high, grad, f.weights[l]);
    if (l == 2) {
      mixed = empty(f.x, {f.n, y.out});
      RowDotArgs r = row_args(f.below(s), f.mixed(kept));
      r.grad_trace = data_of(grad_trace);
      r.grad_a = data_of(low);
      r.grad_b = data_of(mixed);
      Device::row_dot(r, true, dtype);
    } else {
      if (f.hidden == 1) mixed = column_of(grad_trace);
      s = empty(f.x, {2 * f.n, y.out});
      Device::multiply(low, mixed, f.m);
    }
    LayerArgs r = f.arguments(l - 1, f.product(kept, l - 1), s, ones);
    r.grad = data_of(both);
    OwnGradients mine(f, y, r);
    Device::layer(r, kLayerBackward, dtype);
    mine.finish(y, high, to.biases[l - 1], gate_of(l - 1));
    Device::multiply(to.weights[l], transposed(grad), f.top(s));
    grad = high;
  }
  Tensor grad_m = empty(f.x, f.m.sizes());
  Device::multiply(grad_m, transposed(mixed), f.below(s));
  Device::multiply(to.x, grad, f.weights[0]);
  Device::multiply(to.weights[0], transposed(grad), f.x);
  return grad_m;
}

// ---- ops ---------------------------------------------------------------------------------------
template <class Device>
std::tuple<Tensor, Tensor, Tensor> exact_forward(const Tensor& x, Tensors weights, Tensors biases,
                                                 Tensors gates, int64_t activation, int64_t flags) {
  Exact f(x, weights, biases, gates, activation, flags);
  f.couple<Device>();
  ExactOutputs to(f);
  Device::exact(f, to);
  return {to.y, to.trace, flags & kFieldKeep ? to.kept : empty(f.x, {0})};
}

template <class Device>
std::tuple<Tensor, Tensors, Tensors, Tensors> exact_backward(
    const Tensor& grad_y, const Tensor& grad_trace, const Tensor& x, Tensors weights,
    Tensors biases, Tensors gates, const Tensor& kept, int64_t activation, int64_t flags) {
  Exact f(x, weights, biases, gates, activation, flags);
  f.couple<Device>();
  FieldGradients to(f);
  const Tensor gy = dense(grad_y), t = dense(grad_trace);
  check_gradient(gy, x.numel(), x);
  check_gradient(t, f.n, x);
  f.args.grad_y = data_of(gy);
  f.args.grad_trace = data_of(t);
  f.args.kept = data_of(kept);
  f.uncouple<Device>(Device::exact_backward(f, t, kept, to), to);
  return {to.x, to.weights, to.biases, to.gates};
}

}  // namespace pfk
