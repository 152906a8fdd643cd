// SPDX-License-Identifier: Apache-2.0
// The ops of the family on the host, for any Device (see divergence_host.h).
//
// The exact trace of shallow fields: with slopes s = g f'(a),
//   one hidden layer:  tr J = sum_j s_j M_j,      M_j = sum_i W2[i, j] g2[i] W1[j, i]
//   two:               tr J = s2 . (M s1),        M = W2 o (W1 diag(g3) W3)^T
// The slopes are what a layer makes of tangents that are one everywhere, so the same elementwise
// kernels serve.
#pragma once

#include "divergence/divergence_host.h"

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
  Device::row_dot(r, false, dtype_of(a));
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
  Device::row_dot(r, true, dtype_of(a));
  return {grad_a, grad_b};
}

// ---- the exact trace of shallow fields ---------------------------------------------------------
// A field with one "tangent", which is made of ones; what is kept is [samples, out] of each hidden
// layer and, of two, the product M s1.
struct Exact : Field {
  Tensor ones;
  int64_t n, hidden;

  Exact(const Tensor& x_, const Tensor& ones_, const Tensors& w, const Tensors& b, const Tensors& g,
        int64_t activation)
      : Field(x_, x_, 0, w, b, g, activation, 0),
        ones(dense(ones_)),
        n(args.samples),
        hidden(args.layers - 1) {
    args.probe = {};
    kept_size = 0;
    for (FieldLayer& y : layers) {
      y.kept = kept_size;
      kept_size += &y == &layers.back() ? 0 : n * y.out;
    }
  }

  Tensor block(const Tensor& kept, int64_t at, int64_t columns) const {
    Tensor flat = kept;
    return torch::stable::view(torch::stable::narrow(flat, 0, at, n * columns), {n, columns});
  }
  Tensor product(const Tensor& kept, int l) const {
    return block(kept, layers[l].kept, layers[l].out);
  }
  Tensor mixed(const Tensor& kept) const { return block(kept, kept_size, layers[1].out); }
  int64_t size() const { return kept_size + (hidden == 2 ? n * layers[1].out : 0); }

  // [h'; s] of a hidden layer.
  LayerArgs arguments(int l, const Tensor& p, const Tensor& s) const {
    LayerArgs r = layer_args(*this, l, p);
    r.probes = 1;
    r.tangents = data_of(ones);
    r.tangent_step = 0;
    r.s = data_of(s);
    return r;
  }
  Tensor top(const Tensor& s) const { return rows_of(s, 0, n); }
  Tensor below(const Tensor& s) const { return rows_of(s, n, n); }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor> exact_forward(const Tensor& x, const Tensor& coupling,
                                                 const Tensor& ones, Tensors weights,
                                                 Tensors biases, Tensors gates,
                                                 int64_t activation) {
  Exact f(x, ones, weights, biases, gates, activation);
  const Tensor m = dense(coupling);
  Tensor y = empty(f.x, f.x.sizes()), trace = empty(f.x, {f.n}), kept = empty(f.x, {f.size()});
  const DType dtype = dtype_of(f.x);
  Tensor h = f.x, slopes = f.x;
  for (int l = 0; l < f.hidden; ++l) {
    Tensor p = f.product(kept, l), s = empty(f.x, {2 * f.n, f.layers[l].out});
    Device::multiply(p, h, turned(f.weights[l]));
    Device::layer(f.arguments(l, p, s), kLayerForward, dtype);
    if (l == 1) {
      Tensor q = f.mixed(kept);
      Device::multiply(q, slopes, turned(m));
      RowDotArgs r = row_args(f.below(s), q);
      r.trace = data_of(trace);
      Device::row_dot(r, false, dtype);
    }
    h = f.top(s);
    slopes = f.below(s);
  }
  if (f.hidden == 1) {
    Tensor column = torch::stable::view(trace, {f.n, 1});
    Device::multiply(column, slopes, torch::stable::view(m, {f.layers[0].out, 1}));
  }
  Tensor p = empty(f.x, f.x.sizes());
  Device::multiply(p, h, turned(f.weights[f.hidden]));
  f.args.y = data_of(y);
  Device::output(output_args(f, p, f.x), false, dtype);
  return {y, trace, kept};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors> exact_backward(
    const Tensor& grad_y, const Tensor& grad_trace, const Tensor& x, const Tensor& coupling,
    const Tensor& ones, Tensors weights, Tensors biases, Tensors gates, const Tensor& kept,
    int64_t activation) {
  Exact f(x, ones, weights, biases, gates, activation);
  FieldGradients to(f);
  const Tensor m = dense(coupling), gy = dense(grad_y), t = dense(grad_trace);
  const DType dtype = dtype_of(f.x);
  auto gate_of = [&](int l) { return f.gates.empty() ? nullptr : &to.gates[l]; };
  // from the velocity to the cotangents of the last product
  int l = static_cast<int>(f.hidden);
  Tensor grad = empty(f.x, f.x.sizes()), s = empty(f.x, {2 * f.n, f.layers[l - 1].out});
  if (f.last().gate || l == 2) {
    Device::layer(f.arguments(l - 1, f.product(kept, l - 1), s), kLayerRestore, dtype);
  }
  Tensor p = empty(f.x, {f.last().gate ? f.n : 0, f.args.features});
  if (f.last().gate) Device::multiply(p, f.top(s), turned(f.weights[l]));
  OutputArgs o = output_args(f, p, f.x);
  o.grad_y = data_of(gy);
  o.grad = data_of(grad);
  OwnGradients own(f, f.last(), o);
  Device::output(o, true, dtype);
  own.finish(f.last(), grad, to.biases[l], gate_of(l));
  Tensor grad_m = empty(f.x, m.sizes()), mixed;
  for (; l > 0; --l) {
    const FieldLayer& y = f.layers[l - 1];
    // cotangents of h' above, of s below
    Tensor both = empty(f.x, {2 * f.n, y.out}), high = f.top(both), low = f.below(both);
    Device::multiply(high, grad, f.weights[l]);
    if (l == 2) {
      mixed = empty(f.x, {f.n, y.out});
      RowDotArgs r = row_args(f.below(s), f.mixed(kept));
      r.grad_trace = data_of(t);
      r.grad_a = data_of(low);
      r.grad_b = data_of(mixed);
      Device::row_dot(r, true, dtype);
    } else if (f.hidden == 2) {
      s = empty(f.x, {2 * f.n, y.out});
      Device::multiply(low, mixed, m);
    } else {
      mixed = torch::stable::view(t, {f.n, 1});
      Device::multiply(low, mixed, torch::stable::view(m, {1, y.out}));
    }
    LayerArgs r = f.arguments(l - 1, f.product(kept, l - 1), s);
    r.grad = data_of(both);
    OwnGradients mine(f, y, r);
    Device::layer(r, kLayerBackward, dtype);
    mine.finish(y, high, to.biases[l - 1], gate_of(l - 1));
    Device::multiply(to.weights[l], turned(grad), f.top(s));
    grad = high;
  }
  const FieldLayer& first = f.layers[0];
  Tensor flat = torch::stable::view(grad_m, {grad_m.numel() / first.out, first.out});
  Device::multiply(flat, turned(mixed), f.below(s));
  Device::multiply(to.x, grad, f.weights[0]);
  Device::multiply(to.weights[0], turned(grad), f.x);
  return {to.x, grad_m, to.weights, to.biases, to.gates};
}

}  // namespace pfk
