// SPDX-License-Identifier: Apache-2.0
// The squared error of a field and its gradients in one pass, on the CPU.  A tile of samples goes
// forward and backward through all layers before the next tile is loaded, so that nothing is kept
// in memory between the two.
//
//   h' = f(W h + R^T c + b),   loss = mean of  w (s y - u)^2
//
// with y of the last layer, which has no f; c are inputs that enter every layer, such as the time
// of a sample.  They and a one stand behind h in its rows, R and b below W in a packed copy: a
// layer is one product, and so are the gradients of all its parameters.
#pragma once

#include "core/activations.h"
#include "core/codes.h"
#include "core/gemm.h"
#include "core/rows.h"
#include "core/workspace.h"

// Plain data is the same for every SIMD level.
namespace pfk {

struct LossLayer {
  int64_t in, out;                // without what is joined
  int64_t in_stride, out_stride;  // of rows of inputs and of outputs, padded
  const void* weight;             // [out, in]
  const void* bias;               // [out]
  const void* rows;               // [joined, out]
  int64_t forward, back, sums;    // where it begins in `packed`, and in the sums of a task
  int64_t input, slope;           // where its inputs and slopes begin in the memory of a tile
  bool transposed;                // the sums are [inputs, out], which takes fewer whole vectors
  void* grad_weight;
  void* grad_bias;
  void* grad_rows;
};

struct LossArgs {
  int64_t samples, features, outputs, joined;
  int layers;
  Activation activation;
  bool keep, inputs;  // gradients of parameters; also of x, joined and target
  const LossLayer* layer;
  const void* x;
  const void* target;
  const void* c;       // [samples, joined]
  const void* scale;   // [samples] or null
  const void* weight;  // [samples] or null
  void* grad_x;
  void* grad_c;
  void* grad_target;
  void* packed;
  void* sums;    // [tasks, sums_size]
  double* loss;  // [tasks]
  int64_t sums_size, task, tile, tile_size, widest;
};

// All that a layer multiplies: h, what is joined, and a one.
inline int64_t loss_inputs(const LossArgs& a, const LossLayer& y) { return y.in + a.joined + 1; }
inline int64_t loss_sums(const LossArgs& a, const LossLayer& y) {
  return y.transposed ? loss_inputs(a, y) * y.out_stride : y.out * y.in_stride;
}

}  // namespace pfk

PFK_BEGIN

namespace {

// ---- weights -----------------------------------------------------------------------------------
// Of layers [begin, end): the transposed weight with rows and bias below, [inputs, out_stride], and
// the weight with the rows' columns behind, [out, in_stride].
template <class T>
void loss_pack(const LossArgs& a, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; ++l) {
    const LossLayer& y = a.layer[l];
    const T *w = typed<T>(y.weight), *r = typed<T>(y.rows);
    T* to = typed<T>(a.packed) + y.forward;
    transpose_padded<T>({w, y.in}, y.out, y.in, {to, y.out_stride});
    for (int64_t k = 0; k <= a.joined; ++k) {
      T* row = to + (y.in + k) * y.out_stride;
      memcpy(row, k < a.joined ? r + k * y.out : typed<T>(y.bias), y.out * sizeof(T));
      for (int64_t j = y.out; j < y.out_stride; ++j) row[j] = T(0);
    }
    if (!a.keep) continue;
    to = typed<T>(a.packed) + y.back;
    copy_rows(w, y.in, to, y.in_stride, y.out, y.in);
    for (int64_t i = 0; a.inputs && i < y.out; ++i) {
      for (int64_t k = 0; k < a.joined; ++k) to[i * y.in_stride + y.in + k] = r[k * y.out + i];
    }
  }
}

// ---- a tile ------------------------------------------------------------------------------------
// Rows end at a multiple of 16 numbers.  What is there before is whatever it happens to be, and
// only ever multiplied into what is not read.
template <class T>
struct LossTile {
  Workspace memory;
  T *data, *output, *grad, *other;
  explicit LossTile(const LossArgs& a) : memory(a.tile_size * sizeof(T)) {
    data = static_cast<T*>(memory.memory());
    const int64_t size = a.tile * a.widest;
    output = data, grad = data + size, other = data + 2 * size;
  }
  T* input(const LossLayer& y) const { return data + y.input; }
  T* slope(const LossLayer& y) const { return data + y.slope; }
};

// Writes what is joined, and the one, behind the inputs of a layer.
template <class T>
void join(const LossArgs& a, const LossLayer& y, int64_t first, int64_t n, T* h) {
  const T* c = typed<T>(a.c) + first * a.joined;
  for (int64_t i = 0; i < n; ++i) {
    T* to = h + i * y.in_stride + y.in;
    for (int64_t k = 0; k < a.joined; ++k) to[k] = c[i * a.joined + k];
    to[a.joined] = T(1);
  }
}

template <class T>
void activate(const LossArgs& a, int64_t n, int64_t columns, int64_t stride, T* h, T* slope) {
  with_activation(a.activation, [&](auto kind) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i * stride; j < i * stride + columns; j += Vec<T>::kLanes) {
        const auto curve = activation_curve<decltype(kind)::value>(Vec<T>::load(h + j));
        curve.value.store(h + j);
        curve.slope.store(slope + j);
      }
    }
  });
}

template <class T>
void loss_forward(const LossArgs& a, const LossTile<T>& w, int64_t first, int64_t n) {
  const LossLayer& y0 = a.layer[0];
  copy_rows(typed<T>(a.x) + first * y0.in, y0.in, w.input(y0), y0.in_stride, n, y0.in);
  for (int l = 0; l < a.layers; ++l) {
    const LossLayer& y = a.layer[l];
    const bool last = l == a.layers - 1;
    T* const h = w.input(y);
    T* const to = last ? w.output : w.input(a.layer[l + 1]);
    join(a, y, first, n, h);
    gemm<T>({h, y.in_stride, 1}, {typed<T>(a.packed) + y.forward, y.out_stride}, n, y.out,
            loss_inputs(a, y), {to, y.out_stride}, false);
    if (!last) activate(a, n, y.out, y.out_stride, to, w.slope(y));
  }
}

// The sum of errors over a tile; their cotangents replace the output.
template <class T>
double loss_errors(const LossArgs& a, const LossTile<T>& w, int64_t first, int64_t n) {
  using V = Vec<T>;
  const int64_t d = a.outputs, stride = a.layer[a.layers - 1].out_stride;
  const T mean = T(1) / static_cast<T>(a.samples * d);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const V s = a.scale ? typed<T>(a.scale)[first + i] : T(1);
    const V weight = a.weight ? typed<T>(a.weight)[first + i] : T(1);
    const T* u = typed<T>(a.target) + (first + i) * d;
    T* const y = w.output + i * stride;
    V sum = T(0);
    each_vector<T>(d, [&](int64_t j, auto part) {
      const V error = s * load(y + j, part) - load(u + j, part);
      const V grad = V(T(2) * mean) * weight * error;
      sum += weight * error * error;
      store(s * grad, y + j, part);
      if (a.inputs) store(-grad, typed<T>(a.grad_target) + (first + i) * d + j, part);
    });
    total += sum_lanes(sum);
  }
  return total;
}

template <class T>
void multiply_slopes(int64_t n, int64_t columns, int64_t stride, const T* slope, T* grad) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i * stride; j < i * stride + columns; j += Vec<T>::kLanes) {
      (Vec<T>::load(grad + j) * Vec<T>::load(slope + j)).store(grad + j);
    }
  }
}

template <class T>
void loss_backward(const LossArgs& a, const LossTile<T>& w, int64_t first, int64_t n, T* sums,
                   bool fresh) {
  T *grad = w.output, *below = w.grad;
  for (int l = a.layers - 1; l >= 0; --l) {
    const LossLayer& y = a.layer[l];
    const T* h = w.input(y);
    T* const sum = sums + y.sums;
    if (y.transposed) {
      gemm<T>({h, 1, y.in_stride}, {grad, y.out_stride}, loss_inputs(a, y), y.out, n,
              {sum, y.out_stride}, !fresh);
    } else {
      gemm<T>({grad, 1, y.out_stride}, {h, y.in_stride}, y.out, loss_inputs(a, y), n,
              {sum, y.in_stride}, !fresh);
    }
    if (l == 0 && !a.inputs) return;
    gemm<T>({grad, y.out_stride, 1}, {typed<T>(a.packed) + y.back, y.in_stride}, n,
            y.in + (a.inputs ? a.joined : 0), y.out, {below, y.in_stride}, false);
    for (int64_t i = 0; a.inputs && i < n; ++i) {
      T* to = typed<T>(a.grad_c) + (first + i) * a.joined;
      const T* from = below + i * y.in_stride + y.in;
      for (int64_t k = 0; k < a.joined; ++k) to[k] = (l == a.layers - 1 ? T(0) : to[k]) + from[k];
    }
    if (l == 0) {
      copy_rows(below, y.in_stride, typed<T>(a.grad_x) + first * y.in, y.in, n, y.in);
    } else {
      multiply_slopes(n, y.in, y.in_stride, w.slope(a.layer[l - 1]), below);
    }
    T* const used = grad;
    grad = below;
    below = used == w.output ? w.other : used;
  }
}

template <class T>
void loss_tasks(const LossArgs& a, int64_t begin, int64_t end) {
  const LossTile<T> w(a);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t start = task * a.task;
    const int64_t stop = start + a.task < a.samples ? start + a.task : a.samples;
    T* const sums = typed<T>(a.sums) + task * a.sums_size;
    a.loss[task] = 0;
    for (int64_t first = start; first < stop; first += a.tile) {
      const int64_t n = stop - first < a.tile ? stop - first : a.tile;
      loss_forward(a, w, first, n);
      a.loss[task] += loss_errors(a, w, first, n);
      if (a.keep) loss_backward(a, w, first, n, sums, first == start);
    }
  }
}

// ---- gradients of parameters -------------------------------------------------------------------
// Adds up the sums of all tasks, in order and in double; those of the first task are replaced.
template <class T>
void add_sums(T* sums, int64_t size, int64_t step, int64_t tasks) {
  constexpr int64_t kRun = 64;
  for (int64_t at = 0; at < size; at += kRun) {
    const int64_t n = size - at < kRun ? size - at : kRun;
    double total[kRun] = {};
    for (int64_t task = 0; task < tasks; ++task) {
      const T* from = sums + task * step + at;
      for (int64_t i = 0; i < n; ++i) total[i] += static_cast<double>(from[i]);
    }
    for (int64_t i = 0; i < n; ++i) sums[at + i] = static_cast<T>(total[i]);
  }
}

template <class T>
void write_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t w = Vec<T>::kLanes;
  if (rows % w == 0 && columns % w == 0) {
    transpose<T>({from, stride}, rows, columns, {to, rows});
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * rows + r] = from[r * stride + c];
  }
}

template <class T>
void loss_gradients(const LossArgs& a, int64_t tasks, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; ++l) {
    const LossLayer& y = a.layer[l];
    T* const sums = typed<T>(a.sums) + y.sums;
    add_sums(sums, loss_sums(a, y), a.sums_size, tasks);
    const T* rest = sums + y.in * (y.transposed ? y.out_stride : 1);  // rows, then the bias
    T *rows = typed<T>(y.grad_rows), *bias = typed<T>(y.grad_bias);
    if (y.transposed) {
      write_transposed(sums, y.out_stride, y.in, y.out, typed<T>(y.grad_weight));
      copy_rows(rest, y.out_stride, rows, y.out, a.joined, y.out);
      copy_rows(rest + a.joined * y.out_stride, y.out_stride, bias, y.out, 1, y.out);
    } else {
      copy_rows(sums, y.in_stride, typed<T>(y.grad_weight), y.in, y.out, y.in);
      for (int64_t i = 0; i < y.out; ++i) {
        for (int64_t k = 0; k < a.joined; ++k) rows[k * y.out + i] = rest[i * y.in_stride + k];
        bias[i] = rest[i * y.in_stride + a.joined];
      }
    }
  }
}

}  // namespace

PFK_END
