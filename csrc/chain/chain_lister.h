// SPDX-License-Identifier: Apache-2.0
// The instructions of each step of a chain.
#pragma once

#include "chain/chain_listing.h"

PFK_BEGIN

class ChainLister : ChainNetworks {
 public:
  ChainLister(ChainListing& l, const ChainTensors& t, const std::vector<Tensor>& tensors)
      : ChainNetworks(l), a_(t.args), tensors_(tensors) {
    l.features = static_cast<int>(a_.features), l.context = static_cast<int>(a_.context);
    l.normal = a_.normal, l.inverse = a_.inverse, l.blocks = a_.blocks;
    l.rows = l.work();
    l.grads.resize(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      l.grads[i].columns = static_cast<int>(tensors[i].numel());
    }
    list(l.forward, [&](const ChainStep& s) { forward(s); }, false);
    l.forward_state = state_;
    if (l.normal) op(kNormalOp, n(), state_, -1);
    state_ = 0;
    into_ = &l.backward;
    if (l.normal) {
      op(kLoadOp, n(), -1, l.kept()).block = static_cast<int>(l.blocks) - 1;
      op(kNormalVjpOp, n(), l.kept(), state_);
    }
    list(l.backward, [&](const ChainStep& s) { backward(s); }, true);
    l.backward_state = state_;
    for (ChainGradCode& g : l.grads) {
      g.first_block = l.grad_blocks;
      l.grad_blocks += (static_cast<int64_t>(g.rows) * g.columns + 255) / 256;
    }
  }

 private:
  int other() const { return n() - state_; }

  template <class F>
  void list(std::vector<ChainOp>& into, F f, bool backwards) {
    into_ = &into;
    for (int64_t i = 0; i < a_.steps; ++i) {
      const ChainStep& s = a_.step[backwards != a_.inverse ? a_.steps - 1 - i : i];
      if (s.block >= 0) {  // what is kept is written, or read, before the step
        ChainOp& o = backwards ? op(kLoadOp, n(), -1, l_.kept()) : op(kKeepOp, n(), state_, -1);
        o.block = s.block;
      }
      f(s);
    }
    if (!backwards) op(kKeepOp, n(), state_, -1).block = static_cast<int>(l_.blocks) - 1;
  }

  void log_of(int tensor, int count) {
    op(kLogOp, count, -1, -1, l_.inverse ? kBackwards : 0).tensor = tensor;
  }
  // The result stands where the state was not.
  void turn_state() { state_ = other(); }

  // ---- steps that change all features ----------------------------------------------------------
  void permute(const ChainStep& s, bool backwards) {
    ChainOp& o = op(kMoveOp, n(), state_, other());
    const int order = ints(s.index, n());
    (backwards ? o.out_order : o.in_order) = order;
    turn_state();
  }

  void elementwise(ChainOpKind kind, const ChainStep& s) {
    ChainOp& o = op(kind, n(), state_, state_, l_.inverse ? kBackwards : 0);
    o.tensor = s.first_tensor, o.second = s.first_tensor + 1;
    if (kind == kShiftOp) {
      ChainMapNumbers numbers;
      numbers.bound = s.bound;
      o.map = map(numbers);
    }
  }

  // ---- matrices --------------------------------------------------------------------------------
  ChainOp& product(int in, int out, int tensor, int flags = 0) {
    ChainOp& o = op(kProductOp, n(), in, out, flags);
    o.depth = o.stride = n();
    return set_triangle(o, tensor, flags);
  }
  // The triangles of a PLU step: the lower one is its second tensor, the upper one, with its
  // diagonal, the next ones.
  ChainOp& set_triangle(ChainOp& o, int tensor, int flags) {
    o.tensor = tensor, o.stride = n(), o.flags |= flags;
    if (flags & kUpper) o.second = tensor + 1, o.third = tensor + 2;
    return o;
  }
  void order(ChainOpKind kind, int in, int out, int tensor) {
    ChainOp& o = op(kind, n(), in, out);
    const ScalarType type = tensors_[tensor].scalar_type();
    o.tensor = tensor;
    o.scale_kind = type == ScalarType::Long ? 0 : type == ScalarType::Float ? 1 : 2;
  }
  void solve(int in, int out, int tensor, int flags) {
    set_triangle(op(kSolveOp, n(), in, out), tensor, flags);
  }

  // z = P L U x, or x = U^-1 L^-1 P^T z.
  void plu(const ChainStep& s) {
    const int p = s.first_tensor, work = l_.work();
    if (l_.inverse) {
      order(kScatterOp, state_, work, p);
      solve(work, other(), p + 1, kLower);
      solve(other(), work, p + 2, kUpper);
      op(kMoveOp, n(), work, state_);
    } else {
      product(state_, work, p + 2, kUpper);
      product(work, other(), p + 1, kLower);
      order(kGatherOp, other(), state_, p);
    }
    reserve(n());
    log_of(p + 3, n());
  }

  void plu_backward(const ChainStep& s) {
    const int p = s.first_tensor, x = l_.kept(), y = l_.work(), v = y + n(), w = v + n();
    const int64_t lower = place(n() * n()), upper = place(n() * n()), diagonal = place(n());
    int left = other(), right = state_;  // of the gradients of the triangles
    if (l_.inverse) {
      order(kScatterOp, x, v, p);
      solve(v, y, p + 1, kLower);
      solve(y, w, p + 2, kUpper);  // the output of the step
      solve(state_, left, p + 2, kUpper | kTurned);
      diagonal_sums(left, w, p, diagonal);
      outer(left, w, n(), n(), upper);
      solve(left, right, p + 1, kLower | kTurned);
      outer(right, y, n(), n(), lower);
      order(kGatherOp, right, left, p);
      turn_state();
    } else {
      order(kScatterOp, state_, left, p);
      product(x, y, p + 2, kUpper);
      outer(left, y, n(), n(), lower);
      product(left, right, p + 1, kLower | kTurned);
      outer(right, x, n(), n(), upper);
      diagonal_sums(right, x, p, diagonal);
      product(right, left, p + 2, kUpper | kTurned);
      turn_state();
    }
    reserve(3 * n());
    const int sign = l_.inverse ? kGradNegative : 0;
    grad(p + 1, n(), n(), lower, kGradLower | sign);
    grad(p + 2, n(), n(), upper, kGradUpper | sign);
    grad(p + 3, 1, n(), diagonal, kGradWithLog | sign);
  }
  void diagonal_sums(int of_result, int of_input, int p, int64_t at) {
    ChainOp& o = op(kRowDotsOp, n(), of_result, -1, kForTensors);
    o.add = of_input, o.grad = at;
    set_triangle(o, p + 2, kUpper);
  }

  void linear_backward(const ChainStep& s) {
    const int64_t at = place(n() * n());
    outer(state_, l_.kept(), n(), n(), at);
    product(state_, other(), s.first_tensor, kTurned);
    turn_state();
    grad(s.first_tensor, n(), n(), at);
    grad(s.first_tensor + 1, 1, 1, 0, kGradNoSum | kGradWithLog);
  }

  void actnorm_backward(const ChainStep& s) {
    elementwise(kActNormVjpOp, s);
    ChainOp& o = into_->back();
    o.in = l_.kept(), o.grad = place(n()), o.grad_bias = place(n());
    const int sign = l_.inverse ? kGradNegative : 0;
    grad(s.first_tensor, 1, n(), o.grad, kGradWithLog | sign);
    grad(s.first_tensor + 1, 1, n(), o.grad_bias, sign);
  }

  void shift_backward(const ChainStep& s) {
    ChainOp& o = op(kRowSumsOp, n(), state_, -1, kForTensors);
    o.grad = place(n());
    grad(s.first_tensor, 1, n(), o.grad, l_.inverse ? kGradNegative : 0);
  }

  // ---- either direction of a step --------------------------------------------------------------
  void forward(const ChainStep& s) {
    switch (s.kind) {
      case kPermuteStep:
        return permute(s, l_.inverse);
      case kActNormStep:
        elementwise(kActNormOp, s);
        return log_of(s.first_tensor, n());
      case kLinearStep:
        product(state_, other(), s.first_tensor);
        turn_state();
        return log_of(s.first_tensor + 1, 1);
      case kPluStep:
        return plu(s);
      case kShiftStep:
        return elementwise(kShiftOp, s);
      default:
        return elements_forward(network_of(s, false));
    }
  }
  void backward(const ChainStep& s) {
    switch (s.kind) {
      case kPermuteStep:
        return permute(s, !l_.inverse);
      case kActNormStep:
        return actnorm_backward(s);
      case kLinearStep:
        return linear_backward(s);
      case kPluStep:
        return plu_backward(s);
      case kShiftStep:
        return shift_backward(s);
      default:
        return elements_backward(network_of(s, true));
    }
  }

  const ChainArgs& a_;
  const std::vector<Tensor>& tensors_;
};

PFK_END
