// SPDX-License-Identifier: Apache-2.0
// The inverse of an autoregressive step on a tile, and its backward pass.
//
// Features are found one after the other: the parameters of a feature need some units of each
// layer, which are computed when the first feature needs them.  So each unit is computed once.
//
// Few units at a time would leave most of a product's accumulators empty.  Therefore rows are taken
// in blocks: when the first row of a block is needed, the inputs that this row reads, which are
// known then, are multiplied for all rows of the block; what other rows read beyond them is added
// when they are needed themselves.  The backward pass goes the other way: from the last feature to
// the first, and each unit sums over the rows that read it, whose gradients are complete.
#pragma once

#include <algorithm>

#include "chain/chain_elements.h"
#include "chain/chain_network.h"

PFK_BEGIN

namespace {

// How many inputs row r of a layer reads, and the first row that reads an input.
inline int64_t inputs_of(const ChainLayer& y, int64_t r) {
  return y.prefix == nullptr ? y.in : y.prefix[r];
}
inline int64_t first_reader(const ChainLayer& y, int64_t input) {
  if (y.prefix == nullptr) return 0;
  return std::upper_bound(y.prefix, y.prefix + y.out, static_cast<int32_t>(input)) - y.prefix;
}

template <class T>
class ChainWalk {
 public:
  // `keeps`: values before activations too, which the backward pass needs.
  ChainWalk(const ChainElements& e, const ChainRows<T>& w, const T* c, int64_t context, bool keeps)
      : e_(e), w_(w), c_(c), context_(context), last_(e.layers - 1), keeps_(keeps || e.residual) {}

  // Replaces the moved features of x, which has rows as far apart as the tile's, by their inverses.
  void forward(const SplineMap<T>& map, T* x, double* log_det) {
    gather_reads(e_, w_, x, w_.width);
    for (int64_t j = 0; j < e_.moves; ++j) {
      for (int l = 0; l < last_; ++l) find_units(l, units(j - 1, l), units(j, l));
      find_params(j);
      elements_forward(e_, map, j, j + 1, w_.width, w_.columns, x, output(last_), log_det);
      if (e_.places[j] < 0) continue;
      gather_read(e_, w_, e_.places[j], x + e_.moved[j] * w_.width);
    }
    if (!keeps_) return;
    // the gradients of weights are sums over all units
    for (int l = 0; l < last_; ++l) find_units(l, units(e_.moves - 1, l), e_.layer[l].out);
  }

  // After forward(): from the gradients of the results, which stand in `state`, to those of the
  // arguments x.  Gradients of units and parameters stay in their rows.
  void backward(const SplineMap<T>& map, Rows<const T> x, T* state, const T* grad_log) {
    for (int l = 0; l < last_; ++l) {  // nothing needs the units that are left
      const ChainLayer& y = e_.layer[l];
      for (int64_t r = units(e_.moves - 1, l); r < y.out; ++r) {
        T* rows[] = {w_.row(y.adjoint + r), w_.row(y.gate + r), w_.row(y.ungated + r)};
        for (int i = 0; i < (y.gated ? 3 : 1); ++i) memset(rows[i], 0, w_.columns * sizeof(T));
      }
    }
    for (int64_t j = e_.moves; j-- > 0;) {
      T* of_feature = state + e_.moved[j] * w_.width;
      if (e_.places[j] >= 0) pull_read(e_.places[j], of_feature);
      elements_backward(e_, map, j, j + 1, w_.width, w_.columns, x.p, x.stride, output(last_),
                        state, grad_log);
      for (int l = last_ - 1; l >= 0; --l) pull_units(l, units(j - 1, l), units(j, l));
    }
    for (int64_t i = 0; i < e_.passes; ++i) {
      const int32_t r = e_.passing[i];
      pull_read(r, state + e_.read[r] * w_.width);
    }
  }

  const T* input(int l) const { return w_.row(l == 0 ? 0 : e_.layer[l].after); }
  // The gradient of a layer's sums.
  T* gradient(int l) const {
    const ChainLayer& y = e_.layer[l];
    return l == last_ ? output(l) : w_.row(y.gated ? y.gate : y.adjoint);
  }

 private:
  static constexpr int64_t kBlock = kMostRows<T>;

  // How many units of a hidden layer the parameters of features up to j need.
  int64_t units(int64_t j, int l) const { return j < 0 ? 0 : e_.needs[j * last_ + l]; }
  T* output(int l) const {
    if (l == last_) return w_.row(e_.params);
    return w_.row(keeps_ ? e_.layer[l + 1].before : e_.layer[l + 1].after);
  }

  T* sums(int l) const { return e_.layer[l].gated ? w_.row(e_.layer[l].ungated) : output(l); }

  // The first terms of the sums of rows [begin, end): biases, and what the context adds.
  void start_rows(int l, int64_t begin, int64_t end) {
    const ChainLayer& y = e_.layer[l];
    T* out = sums(l) + begin * w_.width;
    for (int64_t r = begin; r < end; ++r) {
      const Vec<T> b = y.bias == nullptr ? T(0) : typed<T>(y.bias)[r];
      T* row = out + (r - begin) * w_.width;
      for (int64_t i = 0; i < w_.columns; i += Vec<T>::kLanes) b.store(row + i);
    }
    if (y.gated) return compute_gates(y, w_, c_, context_, begin, end);
    add_contexts(e_, l, w_, c_, context_, begin, end, sums(l));
  }

  // Adds the products of rows [begin, end) with inputs [from, to).
  void multiply(int l, int64_t begin, int64_t end, int64_t from, int64_t to) {
    if (from >= to) return;
    const ChainLayer& y = e_.layer[l];
    gemm<T>({typed<T>(y.weight) + begin * y.stride + from, y.stride, 1},
            {input(l) + from * w_.width, w_.width}, end - begin, w_.columns, to - from,
            {sums(l) + begin * w_.width, w_.width}, true);
  }

  // Sums of rows [begin, end), of which those before `begin` have been computed.
  void sum_rows(int l, int64_t begin, int64_t end) {
    const ChainLayer& y = e_.layer[l];
    for (int64_t r = begin; r < end;) {
      const int64_t block = r / kBlock * kBlock, block_end = std::min(block + kBlock, y.out);
      const int64_t to = std::min(block_end, end), first = inputs_of(y, block);
      if (r == block) {
        start_rows(l, block, block_end);
        multiply(l, block, block_end, 0, first);
      }
      multiply(l, r, to, first, inputs_of(y, to - 1));
      r = to;
    }
  }

  void find_units(int l, int64_t begin, int64_t end) {
    if (begin >= end) return;
    sum_rows(l, begin, end);
    T* out = output(l) + begin * w_.width;
    const bool closes = e_.residual && l > 0 && l % 2 == 0;  // the second of a pair
    if (e_.layer[l].gated) {
      apply_gates<T>(e_.layer[l], w_, begin, end, closes ? output(l - 2) : nullptr, output(l));
    } else if (closes) {
      add_rows(output(l - 2) + begin * w_.width, end - begin, out);
    }
    activate(seen_through(e_, l + 1), w_, end - begin, out, w_.row(e_.layer[l + 1].after + begin));
  }

  // Parameters of a feature: rows that follow each other, or some of all parts of the output.
  void find_params(int64_t j) {
    const ChainGroup& g = group_of(e_, j);
    const int64_t first = g.row(j);
    if (g.param_step == 1 || g.per_feature == 1) {
      return sum_rows(last_, first, first + g.per_feature);
    }
    for (int64_t k = 0; k < g.per_feature; ++k) {
      const int64_t r = first + k * g.param_step;
      start_rows(last_, r, r + 1);
      multiply(last_, r, r + 1, 0, inputs_of(e_.layer[last_], r));
    }
  }

  void add_rows(const T* from, int64_t n, T* to) {
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = r * w_.width; i < r * w_.width + w_.columns; i += Vec<T>::kLanes) {
        (Vec<T>::load(to + i) + Vec<T>::load(from + i)).store(to + i);
      }
    }
  }

  // Sums over rows [from, to) of a layer's gradients, times their weights of inputs [begin, end).
  void pull(int l, int64_t begin, int64_t end, int64_t from, int64_t to, T* out, bool add) {
    const ChainLayer& y = e_.layer[l];
    gemm<T>({typed<T>(y.weight) + from * y.stride + begin, 1, y.stride},
            {gradient(l) + from * w_.width, w_.width}, end - begin, w_.columns, to - from,
            {out, w_.width}, add);
  }

  void pull_input(int64_t place, T* to) {
    const ChainLayer& y = e_.layer[0];
    pull(0, place, place + 1, first_reader(y, place), y.out, to, true);
  }

  // Adds the gradient of a feature that the network reads.
  void pull_read(int64_t r, T* to) {
    const int64_t first = first_input(e_, r), count = input_count(e_, r);
    if (count == 1) return pull_input(first, to);
    T* pulled = w_.row(e_.pulled);
    memset(pulled, 0, 2 * w_.width * sizeof(T));
    for (int64_t i = 0; i < count; ++i) pull_input(first + i, pulled + i * w_.width);
    add_read_gradient(e_, w_, r, pulled, to);
  }

  // The gradients of units [begin, end) before their activation; those of later ones are known.
  void pull_units(int l, int64_t begin, int64_t end) {
    const ChainLayer& above = e_.layer[l + 1];
    const int64_t needed = units(e_.moves - 1, l);
    const bool adds = e_.residual && l % 2 == 0 && l + 2 < last_;  // the input of a block
    T* to = w_.row(e_.layer[l].adjoint);
    for (int64_t r = end; r > begin;) {
      const int64_t block = (r - 1) / kBlock * kBlock;
      const int64_t block_end = std::min(block + kBlock, needed), low = std::max(block, begin);
      const int64_t whole = first_reader(above, block_end - 1);  // from here on all are read
      if (r == block_end) {
        pull(l + 1, block, block_end, whole, above.out, to + block * w_.width, false);
      }
      T* rows = to + low * w_.width;
      const int64_t first = first_reader(above, low);
      if (first < whole) pull(l + 1, low, r, first, whole, rows, true);
      deactivate(seen_through(e_, l + 1), w_, r - low, w_.row(above.before + low), rows,
                 adds ? w_.row(e_.layer[l + 2].adjoint + low) : nullptr, rows);
      if (e_.layer[l].gated) gates_backward<T>(e_.layer[l], w_, low, r, to);
      r = low;
    }
  }

  const ChainElements& e_;
  const ChainRows<T>& w_;
  const T* c_;
  int64_t context_;
  int last_;
  bool keeps_;
};

}  // namespace

PFK_END
