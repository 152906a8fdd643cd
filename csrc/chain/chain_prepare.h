// SPDX-License-Identifier: Apache-2.0
// What a chain computes once a call: matrices from their factors and sorted masked weights before
// the tiles, and the sums of the tasks' gradients after them.
#pragma once

#include <math.h>

#include "chain/chain.h"
#include "core/gemm.h"

PFK_BEGIN

namespace {

// ---- before the tiles --------------------------------------------------------------------------
// The feature's place in the tensor of row r of a layer's sorted rows.
inline int64_t given_row(const ChainLayer& y, const ChainElements& e, int64_t r) {
  if (!(y.flags & kLayerRows)) return r;
  return e.moved[r / e.per_feature] * e.per_feature + r % e.per_feature;
}

// A masked weight, sorted, and its bias.
template <class T>
void pack_masked(const ChainLayer& y, const ChainElements& e, T* weight) {
  const T* given = typed<T>(y.given);
  for (int64_t r = 0; r < y.out; ++r, weight += y.stride) {
    const T* from = given + given_row(y, e, r) * y.in;
    const int64_t n = y.prefix[r];
    if (y.flags & kLayerColumns) {
      for (int64_t c = 0; c < n; ++c) weight[c] = from[e.read[c]];
    } else {
      memcpy(weight, from, n * sizeof(T));
    }
    for (int64_t c = n; c < y.in; ++c) weight[c] = T(0);
  }
}

template <class T>
void prepare_layers(const ChainElements& e, T*& room) {
  for (int l = 0; l < e.layers; ++l) {
    ChainLayer& y = e.layer[l];
    if (y.prefix == nullptr) continue;
    y.stride = (y.in + 15) / 16 * 16;
    pack_masked(y, e, room);
    y.weight = room;
    room += y.out * y.stride;
    if (y.bias == nullptr || !(y.flags & kLayerRows)) continue;
    for (int64_t r = 0; r < y.out; ++r) room[r] = typed<T>(y.bias)[given_row(y, e, r)];
    y.bias = room;
    room += (y.out + 15) / 16 * 16;
  }
}

// The panels of a layer, and those of its transpose, which the backward pass alone reads.
template <class T>
void pack_layer(ChainLayer& y, bool backward, T* room) {
  const T* weight = typed<T>(y.weight);
  pack_left<T>({weight, y.stride, 1}, y.out, y.in, room);
  y.panels = room;
  if (!backward) return;
  room += y.out * y.in;
  pack_left<T>({weight, 1, y.stride}, y.in, y.out, room);
  y.turned = room;
}

template <class T>
double sum_of(const void* p, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(typed<T>(p)[i]);
  return sum;
}

// `room` has as many numbers as ChainTensors.prepared.
template <class T>
void prepare_chain(ChainArgs& a, PluArgs* factors, T* room) {
  a.log_det_of_all = 0;
  const int64_t n = a.features;
  for (int64_t i = 0; i < a.steps; ++i) {
    ChainStep& s = a.step[i];
    switch (s.kind) {
      case kActNormStep:
        for (int64_t d = 0; d < n; ++d) {
          const T log_scale = typed<T>(s.given)[d];
          room[d] = exp_(a.inverse ? -log_scale : log_scale);
        }
        s.first = room;
        room += n;
        a.log_det_of_all += sum_of<T>(s.given, n);
        break;
      case kLinearStep:
        a.log_det_of_all += static_cast<double>(*typed<T>(s.given));
        break;
      case kPluStep:
        factors->out = room;
        plu(*factors++, sizeof(T) == 8);
        s.first = room;
        room += n * n;
        a.log_det_of_all += sum_of<T>(s.given, n);
        break;
      case kElementsStep:
        prepare_layers(s.elements, room);
        break;
      default:
        break;
    }
  }
  if (a.inverse) a.log_det_of_all = -a.log_det_of_all;
}

// ---- after the tiles ---------------------------------------------------------------------------
// A number of the tasks' gradients.
template <class T>
double sum_tasks(const ChainArgs& a, int64_t at) {
  double sum = 0;
  for (int64_t t = 0; t < a.tasks; ++t) {
    sum += static_cast<double>(typed<T>(a.grads)[t * a.size + at]);
  }
  return sum;
}

// Row r of the sums of the tasks' gradients, of one task as they are.
template <class T>
void sum_row(const ChainArgs& a, const ChainGrad& g, int64_t r, int64_t n, T* to) {
  const T* from = typed<T>(a.grads) + g.at + r * g.stride;
  if (a.tasks == 1) {
    memcpy(to, from, n * sizeof(T));
    return;
  }
  constexpr int64_t kBlock = 64;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = n - begin < kBlock ? n - begin : kBlock;
    double sum[kBlock] = {};
    for (int64_t t = 0; t < a.tasks; ++t) {
      const T* p = from + t * a.size + begin;
      for (int64_t c = 0; c < m; ++c) sum[c] += static_cast<double>(p[c]);
    }
    for (int64_t c = 0; c < m; ++c) to[begin + c] = static_cast<T>(sum[c]);
  }
}

template <class T>
void finish_gradient(const ChainArgs& a, const ChainGrad& g, double log_sum) {
  T* out = typed<T>(g.out);
  if (g.of_log_det) {
    *out = static_cast<T>(log_sum);
    return;
  }
  if (g.layer >= 0) {
    const ChainElements& e = a.step[g.step].elements;
    const ChainLayer& y = e.layer[g.layer];
    if (g.rows == 1 && g.at == y.grad_bias) {
      for (int64_t r = 0; r < g.columns; ++r) {
        out[given_row(y, e, r)] = static_cast<T>(sum_tasks<T>(a, g.at + r));
      }
      return;
    }
    if (y.prefix != nullptr) {
      for (int64_t r = 0; r < g.rows; ++r) {
        T* to = out + given_row(y, e, r) * g.columns;
        const int64_t n = y.prefix[r];
        if (y.flags & kLayerColumns) {
          for (int64_t c = 0; c < g.columns; ++c) {
            to[e.read[c]] = c < n ? static_cast<T>(sum_tasks<T>(a, g.at + r * g.stride + c)) : T(0);
          }
          continue;
        }
        sum_row<T>(a, g, r, n, to);
        for (int64_t c = n; c < g.columns; ++c) to[c] = T(0);
      }
      return;
    }
  }
  for (int64_t r = 0; r < g.rows; ++r) {
    T* to = out + r * g.columns;
    sum_row<T>(a, g, r, g.columns, to);
    for (int64_t c = 0; g.negative && c < g.columns; ++c) to[c] = -to[c];
  }
}

// The gradients of an ActNorm's tensors.
template <class T>
void finish_actnorm(const ChainArgs& a, const ChainStep& s, double sum, void* log_scale,
                    void* bias) {
  for (int64_t d = 0; d < a.features; ++d) {
    const ActNormGrad g =
        actnorm_finish(sum_tasks<T>(a, s.grad_second + d), sum_tasks<T>(a, s.grad + d),
                       static_cast<double>(typed<T>(s.first)[d]), sum, a.inverse);
    typed<T>(log_scale)[d] = static_cast<T>(g.log_scale);
    typed<T>(bias)[d] = static_cast<T>(g.bias);
  }
}

// The gradients of the factors of a matrix; `room` has as many numbers as the matrix.
template <class T>
void finish_factors(const ChainArgs& a, const ChainStep& s, PluArgs& f, double log_sum, T* room) {
  const ChainGrad g{nullptr, f.size, f.size, s.grad, s.stride, false, false, -1, 0};
  for (int64_t r = 0; r < f.size; ++r) sum_row<T>(a, g, r, f.size, room + r * f.size);
  f.grad = room;
  plu_backward(f, sizeof(T) == 8);
  T* diagonal = typed<T>(f.grad_log_diag);
  for (int64_t d = 0; d < f.size; ++d) {
    diagonal[d] = static_cast<T>(static_cast<double>(diagonal[d]) + log_sum);
  }
}

}  // namespace

PFK_END
