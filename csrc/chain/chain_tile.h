// SPDX-License-Identifier: Apache-2.0
// A tile of samples through a chain, forward and backward.
#pragma once

#include "chain/chain_elements.h"
#include "chain/chain_network.h"
#include "chain/chain_walk.h"
#include "density/density.h"

PFK_BEGIN

namespace {

// What a thread needs for a tile.  The log-dets come first, as they are doubles.
template <class T>
struct ChainTileWork {
  double* log_det;  // [width]
  T *state, *other, *context, *grad_context, *grad_log;
  ChainRows<T> rows;

  static int64_t bytes(const ChainArgs& a) {
    const int64_t numbers =
        (2 * a.features + 2 * a.context + 1 + a.rows) * a.width + a.tile * a.widest;
    return a.width * static_cast<int64_t>(sizeof(double)) +
           numbers * static_cast<int64_t>(sizeof(T));
  }
  ChainTileWork(const ChainArgs& a, void* memory) {
    log_det = static_cast<double*>(memory);
    T* p = reinterpret_cast<T*>(log_det + a.width);
    auto take = [&](int64_t n) { return p += n * a.width, p - n * a.width; };
    state = take(a.features), other = take(a.features);
    context = take(a.context), grad_context = take(a.context), grad_log = take(1);
    T* base = take(a.rows);
    rows = {base, a.width, 0, 0, p, true};
  }
};

// Samples [first, first + count) of a matrix of `columns` as rows; what pads them is zero.
template <class T>
void load_rows(const void* from, int64_t first, int64_t columns, const ChainRows<T>& w, T* to) {
  const T* p = typed<T>(from) + first * columns;
  for (int64_t d = 0; d < columns; ++d) {
    T* row = to + d * w.width;
    for (int64_t i = 0; i < w.count; ++i) row[i] = p[i * columns + d];
    for (int64_t i = w.count; i < w.columns; ++i) row[i] = T(0);
  }
}
template <class T>
void store_rows(const T* from, int64_t first, int64_t columns, const ChainRows<T>& w, void* to) {
  T* p = typed<T>(to) + first * columns;
  for (int64_t i = 0; i < w.count; ++i) {
    for (int64_t d = 0; d < columns; ++d) p[i * columns + d] = from[d * w.width + i];
  }
}

// The tile that begins at sample `first`, in what is kept, and the step between its rows.
template <class T>
Rows<T> kept_block(const ChainArgs& a, int64_t first, int64_t count, int64_t block) {
  const int64_t columns = chain_columns(count), size = a.features * columns;
  return {typed<T>(a.kept) + a.blocks * a.features * first + block * size, columns};
}

// Columns beyond the vectors of this level are zeros: a result holds no number of earlier memory.
template <class T>
void keep_rows(const ChainArgs& a, const ChainTileWork<T>& w, int64_t first, int64_t block) {
  const Rows<T> to = kept_block<T>(a, first, w.rows.count, block);
  const int64_t columns = w.rows.columns;
  for (int64_t d = 0; d < a.features; ++d) {
    T* row = to.p + d * to.stride;
    memcpy(row, w.state + d * w.rows.width, columns * sizeof(T));
    memset(row + columns, 0, (to.stride - columns) * sizeof(T));
  }
}

template <class T>
void swap_states(ChainTileWork<T>& w) {
  T* held = w.state;
  w.state = w.other, w.other = held;
}

// ---- steps forward -----------------------------------------------------------------------------
// Calls f(place, d) for every vector of the features.
template <class T, class F>
void each_state(const ChainArgs& a, const ChainRows<T>& w, F f) {
  for (int64_t d = 0; d < a.features; ++d) {
    for (int64_t i = d * w.width; i < d * w.width + w.columns; i += Vec<T>::kLanes) f(i, d);
  }
}

// Row d becomes row index[d], or (back) the other way.
template <class T>
void permute_rows(const ChainArgs& a, const ChainStep& s, ChainTileWork<T>& w, bool back) {
  for (int64_t d = 0; d < a.features; ++d) {
    const int64_t to = back ? s.index[d] : d, from = back ? d : s.index[d];
    memcpy(w.other + to * w.rows.width, w.state + from * w.rows.width, w.rows.columns * sizeof(T));
  }
  swap_states(w);
}

// to = from + bias, or, in the inverse, - bias.
template <class T>
void add_bias(const ChainArgs& a, const ChainStep& s, const ChainRows<T>& w, const T* from, T* to) {
  const T* bias = typed<T>(s.second);
  each_state(a, w, [&](int64_t i, int64_t d) {
    (Vec<T>::load(from + i) + Vec<T>(a.inverse ? -bias[d] : bias[d])).store(to + i);
  });
}

template <class T>
void multiply_rows(const ChainArgs& a, const ChainStep& s, ChainTileWork<T>& w) {
  gemm<T>({typed<T>(s.first), a.features, 1}, {w.state, w.rows.width}, a.features, w.rows.columns,
          a.features, {w.other, w.rows.width}, false);
  swap_states(w);
}

template <class T>
void step_forward(const ChainArgs& a, const ChainStep& s, ChainTileWork<T>& w) {
  using V = Vec<T>;
  T* x = w.state;
  switch (s.kind) {
    case kPermuteStep:
      return permute_rows(a, s, w, a.inverse);
    case kActNormStep: {
      const T *scale = typed<T>(s.first), *bias = typed<T>(s.second);
      return each_state(a, w.rows, [&](int64_t i, int64_t d) {
        actnorm_apply(V::load(x + i), V(scale[d]), V(bias[d]), a.inverse).store(x + i);
      });
    }
    case kLinearStep:
    case kPluStep:
      return multiply_rows(a, s, w);
    case kLuStep:
      if (a.inverse) add_bias(a, s, w.rows, x, x);
      multiply_rows(a, s, w);
      if (!a.inverse) add_bias<T>(a, s, w.rows, w.state, w.state);
      return;
    case kShiftStep: {
      const T* shift = typed<T>(s.first);
      const T bound = static_cast<T>(s.bound);
      return each_state(a, w.rows, [&](int64_t i, int64_t d) {
        const V by = a.inverse ? -shift[d] : shift[d];
        on_circle(V::load(x + i) + by, bound).store(x + i);
      });
    }
    default: {
      const ChainElements& e = s.elements;
      const SplineMap<T> map = spline_of<T>(e);
      if (e.walks) {
        return ChainWalk<T>(e, w.rows, w.context, a.context, false).forward(map, x, w.log_det);
      }
      gather_reads(e, w.rows, x, w.rows.width);
      network_forward(e, w.rows, w.context, a.context);
      elements_forward(e, map, 0, e.moves, w.rows.width, w.rows.columns, x, w.rows.row(e.params),
                       w.log_det);
    }
  }
}

// log_det += log N(z; 0, 1).
template <class T>
void add_normal(const ChainArgs& a, const ChainTileWork<T>& w) {
  using V = Vec<T>;
  for (int64_t i = 0; i < w.rows.columns; i += V::kLanes) {
    V sum = T(0);
    for (int64_t d = 0; d < a.features; ++d) {
      sum += normal_term(V::load(w.state + d * w.rows.width + i));
    }
    add_lanes(sum, w.log_det + i);
  }
  const double constant = -kHalfLog2Pi * static_cast<double>(a.features);
  for (int64_t i = 0; i < w.rows.count; ++i) w.log_det[i] += constant;
}

template <class T>
void start_tile(const ChainArgs& a, ChainTileWork<T>& w, int64_t first) {
  constexpr int64_t lanes = Vec<T>::kLanes;
  w.rows.count = a.samples - first < a.tile ? a.samples - first : a.tile;
  w.rows.columns = (w.rows.count + lanes - 1) / lanes * lanes;
  if (a.context > 0) load_rows(a.c, first, a.context, w.rows, w.context);
}

template <class T>
void chain_forward_tile(const ChainArgs& a, ChainTileWork<T>& w, int64_t first) {
  start_tile(a, w, first);
  load_rows(a.x, first, a.features, w.rows, w.state);
  for (int64_t i = 0; i < w.rows.columns; ++i) w.log_det[i] = a.log_det_of_all;
  for (int64_t i = 0; i < a.steps; ++i) {
    const ChainStep& s = a.step[a.inverse ? a.steps - 1 - i : i];
    if (a.kept != nullptr && s.block >= 0) keep_rows(a, w, first, s.block);
    step_forward(a, s, w);
  }
  if (a.kept != nullptr) keep_rows(a, w, first, a.blocks - 1);
  if (a.normal) add_normal(a, w);
  store_rows(w.state, first, a.features, w.rows, a.z);
  for (int64_t i = 0; i < w.rows.count; ++i) {
    typed<T>(a.log_det)[first + i] = static_cast<T>(w.log_det[i]);
  }
}

// ---- steps backward ----------------------------------------------------------------------------
// The state is the gradient of a step's output, and becomes that of its input.
// The sums are those that actnorm_finish() turns into gradients.
template <class T>
void actnorm_backward(const ChainArgs& a, const ChainStep& s, const ChainTileWork<T>& w, Rows<T> x,
                      T* grads) {
  using V = Vec<T>;
  const T *scale = typed<T>(s.first), *bias = typed<T>(s.second);
  for (int64_t d = 0; d < a.features; ++d) {
    T *g = w.state + d * w.rows.width, *weighted = w.other;
    if (grads != nullptr) add_row_sums(w.rows, g, 1, grads + s.grad_second + d);
    for (int64_t i = 0; i < w.rows.columns; i += V::kLanes) {
      const V grad = V::load(g + i), v = V::load(x.p + d * x.stride + i);
      (grad * actnorm_shifted(v, V(bias[d]), a.inverse)).store(weighted + i);
      (grad * V(scale[d])).store(g + i);
    }
    if (grads != nullptr) add_row_sums(w.rows, weighted, 1, grads + s.grad + d);
  }
}

template <class T>
void matrix_backward(const ChainArgs& a, const ChainStep& s, ChainTileWork<T>& w, Rows<T> x,
                     T* grads) {
  const int64_t n = a.features, width = w.rows.width, stride = s.stride;
  if (grads != nullptr) {
    const Rows<const T> right = turn(w.rows, x.p, x.stride, n, stride);
    gemm<T>({w.state, width, 1}, right, n, n, w.rows.count, {grads + s.grad, stride},
            !w.rows.first);
  }
  gemm<T>({typed<T>(s.first), 1, n}, {w.state, width}, n, w.rows.columns, n, {w.other, width},
          false);
  swap_states(w);
}

// z = W x + b, or x = W^-1 (z - b), of which W^-1 is the matrix and z - b what it multiplies.
template <class T>
void lu_backward(const ChainArgs& a, const ChainStep& s, ChainTileWork<T>& w, Rows<T> x, T* grads) {
  const int64_t n = a.features;
  if (!a.inverse) {
    if (grads != nullptr) add_row_sums(w.rows, w.state, n, grads + s.grad_second);
    return matrix_backward(a, s, w, x, grads);
  }
  copy_rows<T>(x.p, x.stride, w.other, w.rows.width, n, w.rows.columns);
  add_bias<T>(a, s, w.rows, w.other, w.other);
  matrix_backward(a, s, w, Rows<T>{w.other, w.rows.width}, grads);
  if (grads != nullptr) add_row_sums(w.rows, w.state, n, grads + s.grad_second);
}

// An autoregressive inverse: it is computed again, as nothing but its argument x is kept.
template <class T>
void walk_backward(const ChainArgs& a, const ChainElements& e, const ChainTileWork<T>& w, Rows<T> x,
                   T* grads) {
  const SplineMap<T> map = spline_of<T>(e);
  ChainWalk<T> walk(e, w.rows, w.context, a.context, true);
  copy_rows<T>(x.p, x.stride, w.other, w.rows.width, a.features, w.rows.columns);
  walk.forward(map, w.other, w.log_det);
  walk.backward(map, {x.p, x.stride}, w.state, w.grad_log);
  T* of_context = a.grad_c == nullptr ? nullptr : w.grad_context;
  for (int l = 0; l < e.layers; ++l) {
    const T* grad = walk.gradient(l);
    if (grads != nullptr) add_layer_gradients(e.layer[l], w.rows, grad, walk.input(l), grads);
    layer_context_backward<T>(e, l, w.rows, w.context, of_context, a.context, grad, grads);
  }
}

template <class T>
void elements_step_backward(const ChainArgs& a, const ChainElements& e, const ChainTileWork<T>& w,
                            Rows<T> x, T* grads) {
  if (e.walks) return walk_backward(a, e, w, x, grads);
  const int64_t width = w.rows.width;
  gather_reads(e, w.rows, x.p, x.stride);
  network_forward(e, w.rows, w.context, a.context);
  elements_backward<T>(e, spline_of<T>(e), 0, e.moves, width, w.rows.columns, x.p, x.stride,
                       w.rows.row(e.params), w.state, w.grad_log);
  T* of_context = a.grad_c == nullptr ? nullptr : w.grad_context;
  const T* more = network_backward(e, w.rows, w.context, of_context, a.context, grads);
  for (int64_t r = 0; r < (more == nullptr ? 0 : e.reads); ++r) {
    add_read_gradient(e, w.rows, r, more + first_input(e, r) * width, w.state + e.read[r] * width);
  }
}

template <class T>
void step_backward(const ChainArgs& a, const ChainStep& s, ChainTileWork<T>& w, int64_t first,
                   T* grads) {
  if (s.kind == kPermuteStep) return permute_rows(a, s, w, !a.inverse);
  const Rows<T> x = kept_block<T>(a, first, w.rows.count, s.block);
  switch (s.kind) {
    case kActNormStep:
      return actnorm_backward(a, s, w, x, grads);
    case kLinearStep:
    case kPluStep:
      return matrix_backward(a, s, w, x, grads);
    case kLuStep:
      return lu_backward(a, s, w, x, grads);
    case kShiftStep:
      if (grads != nullptr) add_row_sums(w.rows, w.state, a.features, grads + s.grad);
      return;
    default:
      return elements_step_backward(a, s.elements, w, x, grads);
  }
}

template <class T>
void chain_backward_tile(const ChainArgs& a, ChainTileWork<T>& w, int64_t first, T* grads) {
  using V = Vec<T>;
  start_tile(a, w, first);
  const int64_t count = w.rows.count, columns = w.rows.columns, width = w.rows.width;
  for (int64_t i = 0; i < columns; ++i) {
    w.grad_log[i] =
        a.grad_log_det == nullptr || i >= count ? T(0) : typed<T>(a.grad_log_det)[first + i];
  }
  if (grads != nullptr) add_row_sums(w.rows, w.grad_log, 1, grads);
  if (a.grad_z != nullptr) {
    load_rows(a.grad_z, first, a.features, w.rows, w.state);
  } else {
    memset(w.state, 0, a.features * width * sizeof(T));
  }
  if (a.normal) {
    const Rows<T> z = kept_block<T>(a, first, count, a.blocks - 1);
    for (int64_t d = 0; d < a.features; ++d) {
      for (int64_t i = 0; i < columns; i += V::kLanes) {
        T* g = w.state + d * width + i;
        const V at = V::load(z.p + d * z.stride + i);
        (V::load(g) + normal_vjp(at, V(T(1)), V::load(w.grad_log + i)).z).store(g);
      }
    }
  }
  if (a.grad_c != nullptr) memset(w.grad_context, 0, a.context * width * sizeof(T));
  for (int64_t i = a.steps - 1; i >= 0; --i) {
    step_backward(a, a.step[a.inverse ? a.steps - 1 - i : i], w, first, grads);
  }
  if (a.grad_x != nullptr) store_rows(w.state, first, a.features, w.rows, a.grad_x);
  if (a.grad_c != nullptr) store_rows(w.grad_context, first, a.context, w.rows, a.grad_c);
}

}  // namespace

PFK_END
