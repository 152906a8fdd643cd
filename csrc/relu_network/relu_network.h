// SPDX-License-Identifier: Apache-2.0
// Networks of linear layers and ReLUs (conditioners of couplings) on the CPU.  A tile of samples
// goes through all layers before the next tile is loaded.
//
//   h = W0 x + b0 (+ context);   plain: h <- Wi r(h) + bi;   residual: h <- h + W(i+1) r(u) +
//   b(i+1) with u = Wi r(h) + bi;       out = W r(h) + b, or without the last r.
//
// The inputs of all layers but the first are kept for the backward pass.  It keeps the cotangents G
// of the outputs of layers in turn: the gradient of a weight is G^T times the input.
#pragma once

#include <stdlib.h>

#include "core/activations.h"
#include "core/gemm.h"

// Plain data is the same for every SIMD level.
namespace pfk {

struct NetworkLayer {
  int64_t in, out, in_stride, out_stride;  // of padded rows
  const void* weight;                      // [out, in]
  const void* bias;
  void* packed;       // forward: the transposed weight [in, out_stride]; backward: [out, in_stride]
  void* input;        // rows [samples, in_stride] that are kept; of the first layer a copy; or null
  void* grad_output;  // rows [wave, out_stride]
  void* grad_weight;
  void* grad_bias;
};

struct NetworkArgs {
  int64_t samples;
  int layers;
  bool residual, activate_last, backward, add;  // add: to the gradients of earlier waves
  NetworkLayer* layer;
  const void* x;
  const void* context;  // [samples, out of the first layer], or null
  void* out;
  const void* grad_out;
  void* grad_x;            // or null
  void* grad_context;      // or null
  int64_t wave, wave_end;  // backward: the samples whose rows grad_output holds
  int64_t tile;            // samples of a tile
};

constexpr int64_t kNetworkTile = 96;  // samples of a tile, at most
constexpr int64_t kWeightRows = 96;   // of the gradient of a weight, in a task

}  // namespace pfk

PFK_BEGIN

namespace {

// ---- rows of padded vectors --------------------------------------------------------------------
// Calls f(offset, column) for each vector of `rows` rows of `columns` columns.
template <class T, class F>
PFK_HD void each(int64_t rows, int64_t columns, int64_t stride, F f) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += Vec<T>::kLanes) f(r * stride + c, c);
  }
}

template <class T>
void relu_rows(const T* from, T* to, int64_t rows, int64_t stride) {  // padding included
  each<T>(rows, stride, stride,
          [&](int64_t i, int64_t) { relu_(Vec<T>::load(from + i)).store(to + i); });
}

// to = (add or 0) + (g where the input of the layer was above zero, else 0).
template <class T>
void mask_rows(const T* g, const T* input, const T* add, T* to, int64_t rows, int64_t columns,
               int64_t stride) {
  each<T>(rows, columns, stride, [&](int64_t i, int64_t) {
    const Vec<T> zero = T(0), more = add ? Vec<T>::load(add + i) : zero;
    const auto off = Vec<T>::load(input + i) <= T(0);
    (more + select(off, zero, Vec<T>::load(g + i))).store(to + i);
  });
}

// to = bias (+ what is there).
template <class T>
void bias_rows(const T* bias, int64_t columns, T* to, int64_t stride, int64_t rows, bool add) {
  if (!add) {
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(to + r * stride, bias, columns * sizeof(T));
      for (int64_t c = columns; c < stride; ++c) to[r * stride + c] = T(0);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[r * stride + c] += bias[c];
  }
}

// ---- weights -----------------------------------------------------------------------------------
template <class T>
void pack_layer(const NetworkLayer& y, bool backward) {
  const T* from = typed<T>(y.weight);
  T* to = typed<T>(y.packed);
  if (backward) {
    for (int64_t i = 0; i < y.out; ++i) {
      memcpy(to + i * y.in_stride, from + i * y.in, y.in * sizeof(T));
      for (int64_t j = y.in; j < y.in_stride; ++j) to[i * y.in_stride + j] = T(0);
    }
    return;
  }
  transpose_padded<T>({from, y.in}, y.out, y.in, {to, y.out_stride});
}

// ---- a tile ------------------------------------------------------------------------------------
template <class T>
struct NetworkTile {
  T *h, *a, *b, *memory;
  explicit NetworkTile(const NetworkArgs& n) {
    int64_t widest = 0;
    for (int l = 0; l < n.layers; ++l) {
      const NetworkLayer& y = n.layer[l];
      widest = y.in_stride > widest ? y.in_stride : widest;
      widest = y.out_stride > widest ? y.out_stride : widest;
    }
    const int64_t size = n.tile * widest;
    memory = static_cast<T*>(aligned_alloc(64, (3 * size * sizeof(T) + 63) / 64 * 64));
    h = memory, a = h + size, b = a + size;
  }
  ~NetworkTile() { free(memory); }
  NetworkTile(const NetworkTile&) = delete;
};

// out += rows W^T for the samples of a tile.
template <class T>
void add_product(const NetworkLayer& y, const T* rows, int64_t stride, int64_t n, T* out) {
  gemm<T>({rows, stride, 1}, {typed<T>(y.packed), y.out_stride}, n, y.out, y.in,
          {out, y.out_stride}, true);
}

template <class T>
void network_forward_tile(const NetworkArgs& a, NetworkTile<T>& w, int64_t first, int64_t n) {
  const int last = a.layers - 1;
  const NetworkLayer& y0 = a.layer[0];
  auto input = [&](int l, T* own) {
    const NetworkLayer& y = a.layer[l];
    return y.input ? typed<T>(y.input) + first * y.in_stride : own;
  };
  T* h = w.h;
  bias_rows(typed<T>(y0.bias), y0.out, h, y0.out_stride, n, false);
  if (a.context) {
    for (int64_t r = 0; r < n; ++r) {
      const T* c = typed<T>(a.context) + (first + r) * y0.out;
      for (int64_t j = 0; j < y0.out; ++j) h[r * y0.out_stride + j] += c[j];
    }
  }
  add_product(y0, typed<T>(a.x) + first * y0.in, y0.in, n, h);
  for (int l = 1; l < last; l += a.residual ? 2 : 1) {
    const NetworkLayer& y = a.layer[l];
    T* r = input(l, w.a);
    relu_rows(h, r, n, y.in_stride);
    T* u = a.residual ? input(l + 1, w.b) : h;
    bias_rows(typed<T>(y.bias), y.out, u, y.out_stride, n, false);
    add_product<T>(y, r, y.in_stride, n, u);
    if (!a.residual) continue;
    const NetworkLayer& second = a.layer[l + 1];
    relu_rows(u, u, n, second.in_stride);
    bias_rows(typed<T>(second.bias), second.out, h, second.out_stride, n, true);
    add_product<T>(second, u, second.in_stride, n, h);
  }
  const NetworkLayer& y = a.layer[last];
  T* r = input(last, w.a);
  if (a.activate_last) {
    relu_rows(h, r, n, y.in_stride);
  } else {
    memcpy(r, h, n * y.in_stride * sizeof(T));
  }
  bias_rows(typed<T>(y.bias), y.out, w.b, y.out_stride, n, false);
  add_product<T>(y, r, y.in_stride, n, w.b);
  copy_rows(w.b, y.out_stride, typed<T>(a.out) + first * y.out, y.out, n, y.out);
}

// The cotangents of a layer's input, behind its ReLU.
template <class T>
void back_product(const NetworkLayer& y, const T* grad, int64_t n, T* to) {
  gemm<T>({grad, y.out_stride, 1}, {typed<T>(y.packed), y.in_stride}, n, y.in, y.out,
          {to, y.in_stride}, false);
}

template <class T>
void network_backward_tile(const NetworkArgs& a, NetworkTile<T>& w, int64_t first, int64_t n) {
  const int last = a.layers - 1;
  auto input = [&](int l) { return typed<T>(a.layer[l].input) + first * a.layer[l].in_stride; };
  auto grad = [&](int l) {
    return typed<T>(a.layer[l].grad_output) + (first - a.wave) * a.layer[l].out_stride;
  };
  // from the cotangents of the output of layer l to those of its input, the output of layer `to`
  auto back = [&](int l, int to, bool masked, const T* add) {
    const NetworkLayer& y = a.layer[l];
    back_product<T>(y, grad(l), n, masked ? w.a : grad(to));
    if (masked) mask_rows<T>(w.a, input(l), add, grad(to), n, y.in, y.in_stride);
  };
  const NetworkLayer& y = a.layer[last];
  copy_rows(typed<T>(a.grad_out) + first * y.out, y.out, grad(last), y.out_stride, n, y.out);
  back(last, last - 1, a.activate_last, nullptr);
  for (int l = last - 1; l > 0; l -= a.residual ? 2 : 1) {
    back(l, l - 1, true, nullptr);
    if (a.residual) back(l - 1, l - 2, true, grad(l));
  }
  const NetworkLayer& y0 = a.layer[0];
  copy_rows(typed<T>(a.x) + first * y0.in, y0.in, input(0), y0.in_stride, n, y0.in);
  if (a.grad_context) {
    copy_rows<T>(grad(0), y0.out_stride, typed<T>(a.grad_context) + first * y0.out, y0.out, n,
                 y0.out);
  }
  if (a.grad_x) {
    back_product<T>(y0, grad(0), n, w.a);
    copy_rows(w.a, y0.in_stride, typed<T>(a.grad_x) + first * y0.in, y0.in, n, y0.in);
  }
}

template <class T>
void network_tasks(const NetworkArgs& a, int64_t begin, int64_t end) {
  NetworkTile<T> w(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = a.wave + t * a.tile;
    const int64_t n = a.wave_end - first < a.tile ? a.wave_end - first : a.tile;
    a.backward ? network_backward_tile<T>(a, w, first, n) : network_forward_tile<T>(a, w, first, n);
  }
}

// ---- gradients of the weights ------------------------------------------------------------------
// Rows [begin, end) of the gradients of a weight and of its bias over the samples of a wave.  Runs
// of samples, whose inputs fit into cache, are summed in T, and the sums of runs in double.
template <class T>
void weight_rows(const NetworkArgs& a, const NetworkLayer& y, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 512;
  const int64_t rows = end - begin, size = rows * y.in_stride, samples = a.wave_end - a.wave;
  const bool one = samples <= kRun;
  T* part = static_cast<T*>(calloc(size, sizeof(T)));
  double* total = one ? nullptr : static_cast<double*>(calloc(size, sizeof(double)));
  double bias[kWeightRows] = {};
  for (int64_t at = 0; at < samples; at += kRun) {
    const int64_t n = samples - at < kRun ? samples - at : kRun;
    const T* g = typed<T>(y.grad_output) + at * y.out_stride + begin;
    gemm<T>({g, 1, y.out_stride}, {typed<T>(y.input) + (a.wave + at) * y.in_stride, y.in_stride},
            rows, y.in, n, {part, y.in_stride}, false);
    T sum[kWeightRows] = {};
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < rows; ++i) sum[i] += g[r * y.out_stride + i];
    }
    for (int64_t i = 0; i < rows; ++i) bias[i] += static_cast<double>(sum[i]);
    for (int64_t i = 0; !one && i < size; ++i) total[i] += static_cast<double>(part[i]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* to = typed<T>(y.grad_weight) + (begin + i) * y.in;
    T* to_bias = typed<T>(y.grad_bias) + begin + i;
    *to_bias = (a.add ? *to_bias : T(0)) + static_cast<T>(bias[i]);
    for (int64_t j = 0; j < y.in; ++j) {
      const int64_t from = i * y.in_stride + j;
      const T value = one ? part[from] : static_cast<T>(total[from]);
      to[j] = a.add ? to[j] + value : value;
    }
  }
  free(part);
  free(total);
}

}  // namespace

PFK_END
