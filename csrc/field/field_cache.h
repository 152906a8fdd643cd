// SPDX-License-Identifier: Apache-2.0
// A whole field on the CPU.  A tile of stacked rows goes through all layers before the next tile is
// loaded, so that activations and weights stay in L1 and L2.  Only inputs, outputs and what is kept
// for the backward pass go through memory.
#pragma once

#include <stdlib.h>

#include "field/field_packed.h"

PFK_BEGIN

namespace {

constexpr int64_t kTileRows = 48;  // stacked rows of a tile: a buffer takes 12 KiB at 64 columns

// The buffers of a thread.
template <class T>
struct Tile {
  int64_t samples, rows;  // of a whole tile
  T *input, *s, *grad, *other;
  T* products;                             // of every layer
  T *bias, *gate, *grad_bias, *grad_gate;  // parameters of each sample, padded
  T* memory;

  explicit Tile(const FieldArgs& a) {
    samples = kTileRows / (1 + a.probes);
    samples = samples < 1 ? 1 : samples;
    int64_t widest = 0, all = 0;
    bool own = false;
    for (int l = 0; l < a.layers; ++l) {
      const FieldLayer& y = a.layer[l];
      widest = y.out_stride > widest ? y.out_stride : widest;
      widest = y.in_stride > widest ? y.in_stride : widest;
      own = own || y.bias_step || y.gate_step;
      all += y.out_stride;
    }
    if (a.coupling) all += a.coupling->out_stride;
    rows = samples * (1 + a.probes);
    const int64_t size = rows * widest, extra = own ? samples * widest : 0;
    const int64_t total = 4 * size + 4 * extra + rows * all;
    memory = static_cast<T*>(aligned_alloc(64, (total * sizeof(T) + 63) / 64 * 64));
    memset(memory, 0, total * sizeof(T));
    T* at = memory;
    T** const buffers[] = {&input, &s, &grad, &other};
    T** const own_buffers[] = {&bias, &gate, &grad_bias, &grad_gate};
    for (T** buffer : buffers) *buffer = at, at += size;
    for (T** buffer : own_buffers) *buffer = at, at += extra;
    products = at;
  }
  ~Tile() { free(memory); }
  T* product(const FieldLayer& y) const { return products + y.column * rows; }
  Tile(const Tile&) = delete;
};

// ---- moving rows -------------------------------------------------------------------------------
// Copies rows into a buffer that layers of other widths use, too, and clears their padding: it may
// hold a NaN of another sample, and sums of whole vectors read it.
template <class T>
void copy_padded(const void* from, int64_t first, const FieldLayer& y, T* to, int64_t n) {
  copy_rows(typed<T>(from) + first * y.out, y.out, to, y.out_stride, n, y.out);
  for (int64_t i = 0; i < n; ++i) {
    memset(to + i * y.out_stride + y.out, 0, (y.out_stride - y.out) * sizeof(T));
  }
}

// Copies a tile's rows of a layer to what is kept, or back.
template <class T>
void move_kept(const FieldArgs& a, const FieldLayer& y, int64_t first, int64_t n, T* tile,
               bool load) {
  if (a.kept == nullptr || y.kept < 0) return;
  for (int64_t k = 0; k <= a.probes; ++k) {
    T* kept = typed<T>(a.kept) + y.kept + (k * a.samples + first) * y.out;
    T* rows = tile + k * n * y.out_stride;
    load ? copy_rows<T>(kept, y.out, rows, y.out_stride, n, y.out)
         : copy_rows<T>(rows, y.out_stride, kept, y.out, n, y.out);
  }
}

// Sets the bias and the gate of a tile, and where their gradients are written.
template <class T, class Args>
void set_parameters(const FieldArgs& a, const FieldLayer& y, int64_t first, int64_t n, Tile<T>& w,
                    Args& to, int64_t task) {
  const Packed<T> packed(a, y);
  to.bias = packed.bias;
  to.gate = y.gate ? packed.gate : nullptr;
  to.bias_step = y.bias_step ? y.out_stride : 0;
  to.gate_step = y.gate_step ? y.out_stride : 0;
  if (y.bias_step) {
    copy_padded(y.bias, first, y, w.bias, n);
    to.bias = w.bias;
  }
  if (y.gate_step) {
    copy_padded(y.gate, first, y, w.gate, n);
    to.gate = w.gate;
  }
  if (a.sums == nullptr) return;
  const Sums<T> sums(a, y, task);
  to.grad_bias = y.bias_step ? w.grad_bias : sums.bias;
  to.grad_gate = !y.gate ? nullptr : y.gate_step ? w.grad_gate : sums.gate;
  to.grad_bias_step = to.bias_step;
  to.grad_gate_step = to.gate_step;
}
template <class T>
void store_own_gradients(const FieldLayer& y, int64_t first, int64_t n, const Tile<T>& w) {
  if (y.bias_step) {
    copy_rows<T>(w.grad_bias, y.out_stride, typed<T>(y.grad_bias) + first * y.out, y.out, n, y.out);
  }
  if (y.gate_step) {
    copy_rows<T>(w.grad_gate, y.out_stride, typed<T>(y.grad_gate) + first * y.out, y.out, n, y.out);
  }
}

// ---- a tile ------------------------------------------------------------------------------------
template <class T>
LayerArgs layer_args(const FieldArgs& a, const FieldLayer& y, int64_t n, const Tile<T>& w) {
  LayerArgs r{};
  r.samples = n;
  r.probes = a.probes;
  r.columns = (y.out + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
  r.stride = y.out_stride;
  r.activation = a.activation;
  r.value_kept = y.value_kept;
  r.p = w.product(y);
  r.tangents = w.product(y) + n * y.out_stride;
  r.tangent_step = y.out_stride;
  r.s = w.s;
  return r;
}

template <class T>
OutputArgs output_args(const FieldArgs& a, const FieldLayer& y, int64_t first, int64_t n,
                       const Tile<T>& w) {
  auto at = [](const void* p, int64_t i) { return p ? const_cast<T*>(typed<T>(p)) + i : nullptr; };
  OutputArgs r{};
  r.samples = n;
  r.probes = a.probes;
  r.features = a.features;
  r.stride = y.out_stride;
  r.trace_step = a.samples;
  r.p = w.product(y);
  r.e = w.input;
  r.y = at(a.y, first * a.features);
  r.trace = at(a.trace, first);
  r.norm = at(a.norm, first);
  r.grad_y = at(a.grad_y, first * a.features);
  r.grad_trace = at(a.grad_trace, first);
  r.grad_norm = at(a.grad_norm, first);
  r.grad = w.grad;
  return r;
}

template <class T>
void multiply(const T* left, int64_t left_stride, const T* right, int64_t right_stride,
              int64_t rows, int64_t columns, int64_t depth, T* out, int64_t out_stride) {
  gemm<T>({left, left_stride, 1}, {right, right_stride}, rows, columns, depth, {out, out_stride},
          false);
}

// The products of layer l for all rows of a tile, from its input h.
template <class T>
void product_tile(const FieldArgs& a, Tile<T>& w, int l, const T* h, int64_t n) {
  const FieldLayer& y = a.layer[l];
  multiply<T>(h, y.in_stride, Packed<T>(a, y).transposed, y.out_stride, n * (1 + a.probes), y.out,
              y.in, w.product(y), y.out_stride);
}

// Activates the products of a layer; the result is w.s.
template <class T>
const T* activate_tile(const FieldArgs& a, Tile<T>& w, int l, int64_t first, int64_t n,
                       LayerPass pass) {
  const FieldLayer& y = a.layer[l];
  LayerArgs r = layer_args(a, y, n, w);
  if (pass == kRestored) r.value_kept = has_value(a, l);
  const bool reads_again = a.sums || (a.kept && y.kept >= 0);  // whether p is read again
  if (!reads_again) r.value_kept = false;
  set_parameters(a, y, first, n, w, r, 0);
  run_layer<T>(r, pass, 0, n);
  return w.s;
}

template <class T>
void forward_tile(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n) {
  stack_rows<T>(a.x, a.probe, a.probes, a.samples, a.features, first, first + n, w.input,
                a.layer[0].in_stride, n);
  const T* h = w.input;
  const int last = a.layers - 1;
  for (int l = 0; l < last; ++l) {
    product_tile(a, w, l, h, n);
    h = activate_tile(a, w, l, first, n, kForward);
    move_kept(a, a.layer[l], first, n, w.product(a.layer[l]), false);
  }
  product_tile(a, w, last, h, n);
  OutputArgs o = output_args(a, a.layer[last], first, n, w);
  set_parameters(a, a.layer[last], first, n, w, o, 0);
  output_forward<true, T>(o, 0, n);
}

// The products of all hidden layers: read where they were kept, computed again where not.
template <class T>
void products_of_tile(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n) {
  const T* h = w.input;
  for (int l = 0; l < a.layers - 1; ++l) {
    const FieldLayer& y = a.layer[l];
    if (y.kept < 0) {
      product_tile(a, w, l, h, n);
    } else {
      move_kept(a, y, first, n, w.product(y), true);
    }
    if (continues(a, l)) {
      h = activate_tile(a, w, l, first, n, y.kept < 0 ? kForward : kRestored);
    }
  }
}

// The cotangents of the last product, which is computed again where they depend on it.
template <class T>
void output_tile(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n, int64_t task, T* grad) {
  const FieldLayer& y = a.layer[a.layers - 1];
  OutputArgs o = output_args(a, y, first, n, w);
  o.grad = grad;
  if (a.grad_norm || y.gate) {
    const int l = a.layers - 1;
    product_tile(a, w, l, l ? activate_tile(a, w, l - 1, first, n, kRestored) : w.input, n);
  }
  set_parameters(a, y, first, n, w, o, task);
  output_backward<true, T>(o, 0, n);
  store_own_gradients(y, first, n, w);
}

// The sum of a layer's weight gradients over the rows of a tile.
template <class T>
void add_weight(const FieldArgs& a, const FieldLayer& y, const T* grad, const T* h, int64_t rows,
                int64_t task, bool fresh) {
  T* const to = Sums<T>(a, y, task).weight;
  if (y.sum_transposed) {
    gemm<T>({h, 1, y.in_stride}, {grad, y.out_stride}, y.in, y.out, rows, {to, y.out_stride},
            !fresh);
  } else {
    gemm<T>({grad, 1, y.out_stride}, {h, y.in_stride}, y.out, y.in, rows, {to, y.in_stride},
            !fresh);
  }
}

// Where the cotangents and the input of a layer lie: in one of two buffers of the tile, or, for
// wide layers, in the tile's rows of the stacks.
template <class T>
T* grad_of(const FieldArgs& a, const Tile<T>& w, int l, int64_t row) {
  const FieldLayer& y = a.layer[l];
  if (y.grad_rows) return typed<T>(y.grad_rows) + row * y.out_stride;
  return (a.layers - l) % 2 ? w.grad : w.other;
}
template <class T>
T* input_of(const FieldArgs& a, const Tile<T>& w, int l, int64_t row) {
  const FieldLayer& y = a.layer[l];
  return y.input_rows ? typed<T>(y.input_rows) + row * y.in_stride : l == 0 ? w.input : w.s;
}

template <class T>
void backward_tile(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n, int64_t task,
                   bool fresh) {
  const int64_t rows = n * (1 + a.probes);
  const int64_t row = (first - a.first_task * a.task) * (1 + a.probes);
  const int last = a.layers - 1;
  w.input = input_of(a, w, 0, row);
  stack_rows<T>(a.x, a.probe, a.probes, a.samples, a.features, first, first + n, w.input,
                a.layer[0].in_stride, n);
  products_of_tile(a, w, first, n);
  output_tile(a, w, first, n, task, grad_of(a, w, last, row));
  for (int l = last; l >= 0; --l) {
    const FieldLayer& y = a.layer[l];
    T* const grad = grad_of(a, w, l, row);
    T* const h = input_of(a, w, l, row);
    // cotangents of the layer below, or of the primal input
    T* const to = l > 0 ? grad_of(a, w, l - 1, row) : grad == w.other ? w.grad : w.other;
    multiply<T>(grad, y.out_stride, Packed<T>(a, y).weight, y.in_stride, l > 0 ? rows : n, y.in,
                y.out, to, y.in_stride);
    if (l > 0) {
      const FieldLayer& below = a.layer[l - 1];
      LayerArgs r = layer_args(a, below, n, w);
      r.grad = to;
      r.s = h;
      r.value_kept = has_value(a, l - 1);
      set_parameters(a, below, first, n, w, r, task);
      run_layer<T>(r, kBackward, 0, n);
      store_own_gradients(below, first, n, w);
    } else {
      copy_rows<T>(to, y.in_stride, typed<T>(a.grad_x) + first * a.features, a.features, n,
                   a.features);
    }
    if (!y.grad_rows) add_weight<T>(a, y, grad, h, rows, task, fresh);
  }
}

// Calls run(first sample, samples, task, first tile of the task?) for the tiles of tasks.  The
// first tile overwrites the sums of weights; those of biases and gates are set to zero here.
template <class T, class Run>
void each_tile(const FieldArgs& a, const Tile<T>& w, int64_t begin, int64_t end, Run run) {
  for (int64_t task = begin; task < end; ++task) {
    for (int l = 0; a.sums && l < a.layers; ++l) {
      const FieldLayer& y = a.layer[l];
      memset(Sums<T>(a, y, task).bias, 0, 2 * y.out_stride * sizeof(T));
    }
    const int64_t start = (a.first_task + task) * a.task;
    const int64_t last = start + a.task < a.samples ? start + a.task : a.samples;
    for (int64_t first = start; first < last; first += w.samples) {
      run(first, last - first < w.samples ? last - first : w.samples, task, first == start);
    }
  }
}

template <bool kBackward, class T>
void field_tasks(const FieldArgs& a, int64_t begin, int64_t end) {
  Tile<T> w(a);
  each_tile<T>(a, w, begin, end, [&](int64_t first, int64_t n, int64_t task, bool fresh) {
    if constexpr (kBackward) {
      backward_tile<T>(a, w, first, n, task, fresh);
    } else {
      forward_tile<T>(a, w, first, n);
    }
  });
}

}  // namespace

PFK_END
