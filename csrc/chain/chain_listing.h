// SPDX-License-Identifier: Apache-2.0
// From a program to the instructions of a chain (chain_code.h).
//
// Rows of a tile: twice the state, which steps that cannot work in place move from one place to the
// other; the context; its gradient; grad_log_det; the input of a step, in the backward pass; then
// what a step needs.
#pragma once

#include <algorithm>

#include "chain/chain_code.h"
#include "chain/chain_host.h"

PFK_BEGIN

// A scale map, a spline or the bound of a shift, before it has a type.
struct ChainMapNumbers {
  bool affine = false;
  ScaleNumbers scale{};
  int flags = 0;
  SplineNumbers spline{};
  SplineForm form{};
  bool has_spline = false;
  double bound = 0;
};

struct ChainListing {
  std::vector<ChainOp> forward, backward;
  std::vector<ChainGradCode> grads;  // one for each tensor
  std::vector<ChainMapNumbers> maps;
  std::vector<int32_t> ints;
  int features = 0, context = 0, rows = 0;
  int forward_state = 0, backward_state = 0;
  bool normal = false, inverse = false;
  int64_t blocks = 0, size = 1, grad_blocks = 0;
  int grad_context() const { return 2 * features + context; }
  int grad_log() const { return grad_context() + context; }
  int kept() const { return grad_log() + 1; }
  int work() const { return kept() + features; }
};

// Writes instructions to one of the lists.
class ChainWriter {
 protected:
  explicit ChainWriter(ChainListing& l) : l_(l) {}

  int n() const { return l_.features; }
  ChainOp& op(ChainOpKind kind, int rows, int in, int out, int flags = 0) {
    ChainOp o;
    o.kind = kind, o.rows = rows, o.in = in, o.out = out, o.flags = flags;
    into_->push_back(o);
    return into_->back();
  }
  int ints(const int32_t* p, int64_t count) {
    const int at = static_cast<int>(l_.ints.size());
    l_.ints.insert(l_.ints.end(), p, p + count);
    return at;
  }
  // Room in the gradients of a task, and what becomes of it.
  int64_t place(int64_t count) { return (l_.size += count) - count; }
  ChainGradCode& grad(int tensor, int rows, int columns, int64_t at, int flags = 0) {
    ChainGradCode& g = l_.grads[tensor];
    g.flags = flags, g.rows = rows, g.columns = columns, g.at = at;
    return g;
  }
  int map(const ChainMapNumbers& numbers) {
    l_.maps.push_back(numbers);
    return static_cast<int>(l_.maps.size()) - 1;
  }
  // gradients += grad in^T.
  ChainOp& outer(int grad, int in, int rows, int depth, int64_t at) {
    ChainOp& o = op(kOuterOp, rows, grad, -1, kForTensors);
    o.add = in, o.depth = depth, o.grad = at;
    return o;
  }
  void reserve(int rows) {
    if (l_.work() + rows > l_.rows) l_.rows = l_.work() + rows;
  }

  ChainListing& l_;
  std::vector<ChainOp>* into_ = nullptr;
  int state_ = 0;  // where the features stand
};

// Elements, and the networks that give their parameters.
class ChainNetworks : protected ChainWriter {
 protected:
  using ChainWriter::ChainWriter;

  // Where a network has its numbers and its tensors.
  struct Network {
    const ChainElements& e;
    std::vector<int> output, weight, bias;  // of each layer
    int all;                                // the tensor of a network without layers
    int context;                            // or -1
    int params, scratch, gradient[2];       // rows
    int last() const { return e.layers - 1; }
  };

  Network network_of(const ChainStep& s, bool backwards) {
    const ChainElements& e = s.elements;
    Network w{e, {}, {}, {}, s.first_tensor, -1, 0, 0, {}};
    int at = l_.work(), tensor = s.first_tensor, widest = 0;
    for (int l = 0; l < e.layers; ++l) {
      const ChainLayer& y = e.layer[l];
      w.output.push_back(at), at += static_cast<int>(y.out);
      w.weight.push_back(tensor++), w.bias.push_back(y.bias == nullptr ? -1 : tensor++);
      if (l > 0 && y.in > widest) widest = static_cast<int>(y.in);
    }
    if (e.context_weight != nullptr) w.context = tensor;
    if (e.layers == 0) w.output.push_back(at), at += static_cast<int>(e.params_count);
    w.params = w.output.back(), w.scratch = at;
    int scratch = 0;
    for (int i = 0; i < e.groups; ++i) {
      const ChainGroup& g = e.group[i];
      if (g.family != kSplineElements) continue;
      const int64_t size = (g.end - g.begin) * spline_map<float>(g.spline, g.form, false).scratch;
      scratch = std::max(scratch, static_cast<int>(size));
    }
    at += scratch;
    for (int i = 0; i < 2; ++i) w.gradient[i] = at, at += backwards ? widest : 0;
    reserve(at - l_.work());
    return w;
  }

  static int seen_through(const ChainElements& e, int l) {
    const bool last = l == e.layers - 1, opens = e.residual && !last && l % 2 == 1;
    const bool plain = l == 0 || (last && !e.activate_last) || (opens && !e.activate_blocks);
    return static_cast<int>(plain ? Activation::kIdentity : e.activation);
  }

  // The matrix of a layer; what it reads is `in`, of the first layer the features.
  void set_matrix(ChainOp& o, const Network& w, int l) {
    const ChainLayer& y = w.e.layer[l];
    o.tensor = w.weight[l], o.stride = static_cast<int>(y.in);
    if (y.prefix == nullptr) return;
    o.prefix = ints(y.prefix, y.out);
    if (y.columns != nullptr) o.column_order = ints(y.columns, y.in);
    if (y.rows != nullptr) o.row_order = ints(y.rows, y.out);
  }

  // The parameters, from features in rows from x on.
  void network(const Network& w, int x) {
    const ChainElements& e = w.e;
    if (e.layers == 0) {
      op(kSpreadOp, static_cast<int>(e.params_count), -1, w.params).tensor = w.all;
      return;
    }
    for (int l = 0; l < e.layers; ++l) {
      const ChainLayer& y = e.layer[l];
      ChainOp& o =
          op(kProductOp, static_cast<int>(y.out), l == 0 ? x : w.output[l - 1], w.output[l]);
      o.depth = static_cast<int>(y.in), o.bias = w.bias[l], o.activation = seen_through(e, l);
      set_matrix(o, w, l);
      if (l == 0) o.in_order = ints(e.read, e.reads);
      if (e.residual && l > 0 && l < w.last() && l % 2 == 0) o.add = w.output[l - 2];
      if (l == 0 && w.context >= 0) {
        ChainOp& c = op(kProductOp, static_cast<int>(y.out), 2 * n(), w.output[0], kAdds);
        c.tensor = w.context, c.depth = c.stride = l_.context;
      }
    }
  }

  // Moves features by parameters; the gradients of both in the backward pass.
  void elements(const Network& w, ChainOpKind kind, int in) {
    for (int i = 0; i < w.e.groups; ++i) {
      const ChainGroup& g = w.e.group[i];
      const int count = static_cast<int>(g.end - g.begin);
      ChainOp& o = op(kind, count, in, state_);
      o.in_order = ints(w.e.moved + g.begin, count);
      o.feature_step = static_cast<int>(g.feature_step);
      o.param_step = static_cast<int>(g.param_step);
      o.params = w.params + static_cast<int>(g.first), o.scratch = w.scratch;
      ChainMapNumbers numbers;
      if (g.family == kAffineElements) {
        o.flags |= kAffine, o.scale_kind = g.kind;
        numbers.affine = true, numbers.scale = g.scale, numbers.flags = g.flags;
      } else {
        numbers.has_spline = true, numbers.spline = g.spline, numbers.form = g.form;
      }
      o.map = map(numbers);
    }
  }

  void elements_forward(const Network& w) {
    network(w, state_);
    elements(w, kElementsOp, state_);
  }

  void elements_backward(const Network& w) {
    const ChainElements& e = w.e;
    network(w, l_.kept());
    elements(w, kElementsVjpOp, l_.kept());
    if (e.layers == 0) {
      const int count = static_cast<int>(e.params_count);
      ChainOp& o = op(kRowSumsOp, count, w.params, -1, kForTensors);
      o.grad = place(count);
      grad(w.all, 1, count, o.grad);
      return;
    }
    int of_output = w.params, of_sum = -1;  // gradients; of the sum that a residual block adds to
    for (int l = w.last(); l > 0; --l) {
      const bool inside = e.residual && l < w.last();
      layer_gradients(w, l, of_output, w.output[l - 1], -1);
      if (inside && l % 2 == 0) of_sum = of_output;  // the second of a pair
      const bool opens = inside && l % 2 == 1;
      // the sum's own gradient is changed in place, any other one is read until the end
      const int to = opens ? of_sum : of_output == w.gradient[0] ? w.gradient[1] : w.gradient[0];
      ChainOp& o = op(kProductOp, static_cast<int>(e.layer[l].in), of_output, to, kTurned);
      o.depth = static_cast<int>(e.layer[l].out);
      set_matrix(o, w, l);
      o.before = w.output[l - 1], o.slope = seen_through(e, l);
      if (opens) o.add = of_sum;
      of_output = to;
    }
    layer_gradients(w, 0, of_output, l_.kept(), ints(e.read, e.reads));
    context_gradients(w, of_output);
    ChainOp& o = op(kProductOp, static_cast<int>(e.reads), of_output, state_, kTurned | kAdds);
    o.depth = static_cast<int>(e.layer[0].out), o.out_order = ints(e.read, e.reads);
    set_matrix(o, w, 0);
  }

 private:
  // Of the weight and the bias of a layer that reads rows from `in` on.
  void layer_gradients(const Network& w, int l, int of_output, int in, int in_order) {
    const ChainLayer& y = w.e.layer[l];
    const int rows = static_cast<int>(y.out), columns = static_cast<int>(y.in);
    const int64_t at = place(y.out * y.in);
    ChainOp& o = outer(of_output, in, rows, columns, at);
    o.in_order = in_order, o.activation = seen_through(w.e, l);
    set_matrix(o, w, l);
    ChainGradCode& g = grad(w.weight[l], rows, columns, at);
    g.prefix = o.prefix, g.row_order = o.row_order, g.column_order = o.column_order;
    if (w.bias[l] < 0) return;
    o.grad_bias = place(rows);
    grad(w.bias[l], 1, rows, o.grad_bias).column_order = o.row_order;
  }

  void context_gradients(const Network& w, int of_output) {
    if (w.context < 0) return;
    const int rows = static_cast<int>(w.e.layer[0].out);
    const int64_t at = place(static_cast<int64_t>(rows) * l_.context);
    outer(of_output, 2 * n(), rows, l_.context, at);
    grad(w.context, rows, l_.context, at);
    ChainOp& o =
        op(kProductOp, l_.context, of_output, l_.grad_context(), kTurned | kAdds | kForContext);
    o.tensor = w.context, o.depth = rows, o.stride = l_.context;
  }
};

PFK_END
