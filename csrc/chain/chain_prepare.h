// SPDX-License-Identifier: Apache-2.0
// What a chain computes once a call: matrices from their factors and sorted masked weights before
// the tiles, and the sums of the tasks' gradients after them.
#pragma once

#include <math.h>

#include "chain/chain.h"
#include "core/activations.h"
#include "core/gemm.h"

PFK_BEGIN

namespace {

// ---- before the tiles --------------------------------------------------------------------------
// The row of unit r in the tensors of a layer.
inline int64_t given_row(const ChainLayer& y, int64_t r) { return y.rows ? y.rows[r] : r; }

// A weight that is masked or in another order.
template <class T>
void copy_weight(const ChainLayer& y, T* weight) {
  const T* given = typed<T>(y.given);
  for (int64_t r = 0; r < y.out; ++r, weight += y.stride) {
    const T* from = given + given_row(y, r) * y.lead;
    const int64_t n = y.prefix == nullptr ? y.in : y.prefix[r];
    if (y.columns != nullptr) {
      for (int64_t c = 0; c < n; ++c) weight[c] = from[y.columns[c]];
    } else {
      memcpy(weight, from, n * sizeof(T));
    }
    for (int64_t c = n; c < y.in; ++c) weight[c] = T(0);
  }
}

// Rows of n numbers, `lead` apart, in the order of a layer's units.
template <class T>
const void* copy_units(const ChainLayer& y, const void* given, int64_t lead, int64_t n, T*& room) {
  T* to = room;
  for (int64_t r = 0; r < y.out; ++r) {
    memcpy(to + r * n, typed<T>(given) + given_row(y, r) * lead, n * sizeof(T));
  }
  room += (y.out * n + 15) / 16 * 16;
  return to;
}

template <class T>
void prepare_layers(ChainElements& e, int64_t context, T*& room) {
  for (int l = 0; l < e.layers; ++l) {
    ChainLayer& y = e.layer[l];
    if (is_copied(y)) {
      y.stride = (y.in + 15) / 16 * 16;
      copy_weight(y, room);
      y.weight = room;
      room += y.out * y.stride;
    }
    if (y.bias != nullptr && (y.rows != nullptr || y.context_bias != nullptr)) {
      T* bias = room;
      y.bias = copy_units(y, y.bias, 1, 1, room);
      for (int64_t r = 0; y.context_bias != nullptr && r < y.out; ++r) {
        bias[r] += typed<T>(y.context_bias)[given_row(y, r)];
      }
    }
    if (y.rows == nullptr) continue;
    if (l == 0 && e.context_weight != nullptr) {
      e.context_weight = copy_units(y, e.context_weight, e.context_lead, context, room);
      e.context_lead = context;
    }
    if (y.context != nullptr) y.context = copy_units(y, y.context, context, context, room);
    if (y.gate_bias != nullptr) y.gate_bias = copy_units(y, y.gate_bias, 1, 1, room);
  }
}

// The diagonal of U from raw numbers, and the derivative of its logarithm.
inline double lu_diagonal(double raw, double eps) { return softplus_(raw) + eps; }
inline double lu_log_slope(double raw, double eps) {
  return 1 / (1 + exp_(-raw)) / lu_diagonal(raw, eps);
}

// The factors of a matrix from packed triangles, as plu() reads them.  Returns their end.
template <class T>
T* unpack_triangles(ChainStep& s, PluArgs& f, T* room) {
  const int64_t n = f.size;
  T *lower = room, *upper = lower + n * n, *log_diag = upper + n * n, *sign = log_diag + n;
  const T *below = typed<T>(f.lower), *above = typed<T>(f.upper), *raw = typed<T>(s.given);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < r; ++c) lower[r * n + c] = *below++;
    for (int64_t c = r + 1; c < n; ++c) upper[r * n + c] = *above++;
    log_diag[r] = static_cast<T>(log_(lu_diagonal(static_cast<double>(raw[r]), s.bound)));
    sign[r] = T(1);
  }
  f.lower = lower, f.upper = upper, f.log_diag = log_diag, f.sign = sign;
  return sign + n;
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
      case kLuStep: {
        T* end = unpack_triangles(s, *factors, room);
        a.log_det_of_all += sum_of<T>(factors->log_diag, n);
        factors->out = end;
        plu(*factors++, sizeof(T) == 8);
        s.first = end;
        room = end + n * n;
        break;
      }
      case kElementsStep:
        prepare_layers(s.elements, a.context, room);
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

// The gradient of a layer's tensor, in the tensor's order; what a mask hides gets none.
template <class T>
void finish_layer(const ChainArgs& a, const ChainGrad& g, const ChainLayer& y, T* out) {
  if (g.part == kUnitPart) {
    for (int64_t r = 0; r < g.columns; ++r) {
      out[given_row(y, r)] = static_cast<T>(sum_tasks<T>(a, g.at + r));
    }
    return;
  }
  if (g.part == kContextPart) {
    for (int64_t r = 0; r < g.rows; ++r) {
      sum_row<T>(a, g, r, g.columns, out + given_row(y, r) * g.columns);
    }
    return;
  }
  for (int64_t r = 0; r < g.rows; ++r) {
    T* to = out + given_row(y, r) * y.lead;
    const int64_t n = y.prefix == nullptr ? y.in : y.prefix[r];
    if (y.columns != nullptr) {
      for (int64_t c = 0; c < y.in; ++c) {
        to[y.columns[c]] = c < n ? static_cast<T>(sum_tasks<T>(a, g.at + r * g.stride + c)) : T(0);
      }
    } else {
      sum_row<T>(a, g, r, n, to);
      for (int64_t c = n; c < y.in; ++c) to[c] = T(0);
    }
    if (y.lead == y.in) continue;
    ChainGrad joined = g;  // the context's part stands behind the others
    joined.at += (y.in + 15) / 16 * 16;
    sum_row<T>(a, joined, r, y.lead - y.in, to + y.in);
  }
}

template <class T>
void finish_gradient(const ChainArgs& a, const ChainGrad& g, double log_sum) {
  T* out = typed<T>(g.out);
  if (g.of_log_det) {
    *out = static_cast<T>(log_sum);
    return;
  }
  if (g.part != kNoPart) {
    const ChainElements& e = a.step[g.step].elements;
    return finish_layer(a, g, e.layer[g.layer], out);
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

// The gradients of packed triangles; `room` has as many numbers as four matrices.
template <class T>
void finish_triangles(const ChainArgs& a, const ChainStep& s, PluArgs& f, double log_sum, T* room,
                      T* below, T* above, T* of_raw) {
  const int64_t n = f.size;
  T *lower = room + n * n, *upper = lower + n * n, *diagonal = upper + n * n;
  f.grad_lower = lower, f.grad_upper = upper, f.grad_log_diag = diagonal;
  finish_factors(a, s, f, log_sum, room);
  const T* raw = typed<T>(s.given);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < r; ++c) *below++ = lower[r * n + c];
    for (int64_t c = r + 1; c < n; ++c) *above++ = upper[r * n + c];
    of_raw[r] = static_cast<T>(static_cast<double>(diagonal[r]) *
                               lu_log_slope(static_cast<double>(raw[r]), s.bound));
  }
}

}  // namespace

PFK_END
