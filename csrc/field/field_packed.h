// SPDX-License-Identifier: Apache-2.0
// The parameters of a field for tiles (field_cache.h): padded weights and their transposes,
// multiplied by gates that all samples share; and the sums of their gradients.
#pragma once

#include "core/gemm.h"
#include "field/field_rows.h"

PFK_BEGIN

namespace {

// Where a layer lies in `packed`: the transposed weight, the weight, bias and gate, all padded.
template <class T>
struct Packed {
  T *transposed, *weight, *bias, *gate;
  Packed(const FieldArgs& a, const FieldLayer& y) {
    transposed = static_cast<T*>(const_cast<void*>(a.packed)) + y.packed;
    weight = transposed + y.in * y.out_stride;
    bias = weight + y.out * y.in_stride;
    gate = bias + y.out_stride;
  }
};

template <class T>
struct Sums {
  T *weight, *bias, *gate;
  Sums(const FieldArgs& a, const FieldLayer& y, int64_t task) {
    weight = static_cast<T*>(a.sums) + task * a.sums_size + y.sums;
    bias = weight + weight_sum_size(y);
    gate = bias + y.out_stride;
  }
};

template <class T>
void pack_layer(const FieldArgs& a, const FieldLayer& y) {
  const Packed<T> to(a, y);
  const T* w = typed<T>(y.weight);
  copy_rows(w, y.in, to.weight, y.in_stride, y.out, y.in);
  transpose_padded<T>({w, y.in}, y.out, y.in, {to.transposed, y.out_stride});
  if (y.bias && !y.bias_step) memcpy(to.bias, y.bias, y.out * sizeof(T));
  if (y.gate && !y.gate_step) memcpy(to.gate, y.gate, y.out * sizeof(T));
  const T* const scale = typed<T>(y.scale);
  if (scale == nullptr) return;
  for (int64_t i = 0; i < y.out; ++i) {
    for (int64_t j = 0; j < y.in; ++j) to.weight[i * y.in_stride + j] *= scale[i];
  }
  for (int64_t j = 0; j < y.in; ++j) {
    for (int64_t i = 0; i < y.out; ++i) to.transposed[j * y.out_stride + i] *= scale[i];
  }
}

template <class T>
void pack_layers(const FieldArgs& a) {
  for (int l = 0; l < a.layers; ++l) pack_layer<T>(a, a.layer[l]);
  if (a.coupling) pack_layer<T>(a, *a.coupling);
}

// Rows [begin, end) of the gradients of a weight and of the gate that was multiplied into it, from
// the gradient of their product.
template <class T>
void unfold_gate(const FieldLayer& y, int64_t begin, int64_t end) {
  using V = Vec<T>;
  for (int64_t i = begin; i < end; ++i) {
    const T* w = typed<T>(y.weight) + i * y.in;
    T* grad = typed<T>(y.grad_weight) + i * y.in;
    const V g = typed<T>(y.scale)[i];
    V sum = T(0);
    each_vector<T>(y.in, [&](int64_t j, int m) {
      const V v = get(grad + j, m);
      sum += get(w + j, m) * v;
      put(g * v, grad + j, m);
    });
    typed<T>(y.grad_gate)[i] = static_cast<T>(sum_lanes(sum));
  }
}

// total[begin, end) (+)= the sums of `tasks` tasks, in order.
template <class T>
void add_tasks(const T* sums, int64_t size, int64_t tasks, bool add, int64_t begin, int64_t end,
               double* total) {
  if (!add) memset(total + begin, 0, (end - begin) * sizeof(double));
  for (int64_t task = 0; task < tasks; ++task) {
    const T* from = sums + task * size;
    for (int64_t i = begin; i < end; ++i) total[i] += static_cast<double>(from[i]);
  }
}

}  // namespace

PFK_END
