// SPDX-License-Identifier: Apache-2.0
// The networks of a chain on a tile: units are rows, samples are columns.
//
//   h = W0 x + b0 (+ C c, or a(C c + d));   plain: h <- Wi a(h) + bi;   residual: h <- h + W'' a(W'
//   a(h) + b') + b'' between the first layer and the last, or W' h without activation.  What a
//   layer between them computes, before h is added, may have the context added, or be multiplied by
//   a gate, sigmoid(C c + d).
//
// Products read a weight as it lies: number by number on the left (core/gemm.h), its transpose by
// other steps.  A masked layer reads the first inputs of a block of its rows, and no others.
#pragma once

#include "chain/chain.h"
#include "chain/chain_inputs.h"
#include "core/activations.h"
#include "core/gemm.h"
#include "core/rows.h"

PFK_BEGIN

namespace {

// ---- products ----------------------------------------------------------------------------------
// out += W in, where `weight` is W in one of its forms.
template <class T, class L>
void add_product(const ChainLayer& y, const ChainRows<T>& w, L weight, const T* in, T* out) {
  if (y.prefix == nullptr) {
    gemm<T>(weight, {in, w.width}, y.out, w.columns, y.in, {out, w.width}, true);
    return;
  }
  for (int64_t r = 0; r < y.out; r += kMostRows<T>) {
    const int64_t n = y.out - r < kMostRows<T> ? y.out - r : kMostRows<T>;
    gemm<T>(weight.skip(r, 0), {in, w.width}, n, w.columns, y.prefix[r + n - 1],
            {out + r * w.width, w.width}, true);
  }
}

// out = W in + b.
template <class T>
void layer_forward(const ChainLayer& y, const ChainRows<T>& w, const T* in, T* out,
                   const T* add = nullptr) {
  const T* bias = typed<T>(y.bias);
  for (int64_t r = 0; r < y.out; ++r) {
    const Vec<T> b = bias == nullptr ? T(0) : bias[r];
    for (int64_t i = r * w.width; i < r * w.width + w.columns; i += Vec<T>::kLanes) {
      (add == nullptr ? b : b + Vec<T>::load(add + i)).store(out + i);
    }
  }
  if (y.panels != nullptr) {
    add_product(y, w, LeftPanels<T>{typed<T>(y.panels), y.in}, in, out);
  } else {
    add_product(y, w, Left<T>{typed<T>(y.weight), y.stride, 1}, in, out);
  }
}

// to = W^T grad, where `turned` is W^T in one of its forms.
template <class T, class L>
void turned_product(const ChainLayer& y, const ChainRows<T>& w, L turned, const T* grad, T* to) {
  if (y.prefix == nullptr) {
    gemm<T>(turned, {grad, w.width}, y.in, w.columns, y.out, {to, w.width}, false);
    return;
  }
  int64_t first = 0;  // the first row that reads one of these inputs
  for (int64_t c = 0; c < y.in; c += kMostRows<T>) {
    const int64_t n = y.in - c < kMostRows<T> ? y.in - c : kMostRows<T>;
    while (first < y.out && y.prefix[first] <= c) ++first;
    gemm<T>(turned.skip(c, first), {grad + first * w.width, w.width}, n, w.columns, y.out - first,
            {to + c * w.width, w.width}, false);
  }
}

template <class T>
void layer_backward(const ChainLayer& y, const ChainRows<T>& w, const T* grad, T* to) {
  if (y.turned != nullptr) {
    turned_product(y, w, LeftPanels<T>{typed<T>(y.turned), y.out}, grad, to);
  } else {
    turned_product(y, w, Left<T>{typed<T>(y.weight), 1, y.stride}, grad, to);
  }
}

// ---- gradients of parameters -------------------------------------------------------------------
// Adds the sums over the samples of rows of a tile.  As many rows as a vector has lanes are summed
// in vectors, which are then transposed, so that the last sums are sums of vectors, too.
template <class T>
void add_row_sums(const ChainRows<T>& w, const T* rows, int64_t n, T* to) {
  using V = Vec<T>;
  constexpr int64_t lanes = V::kLanes;
  alignas(64) T numbers[lanes], sums[lanes * lanes], turned[lanes * lanes];
  for (int64_t i = 0; i < lanes; ++i) numbers[i] = static_cast<T>(i);
  const int64_t whole = w.count / lanes * lanes;
  const auto rest = V::load(numbers) < V(static_cast<T>(w.count - whole));
  for (int64_t r = 0; r < n; r += lanes) {
    const int64_t m = n - r < lanes ? n - r : lanes;
    for (int64_t k = 0; k < lanes; ++k) {
      V sum = T(0);
      if (k < m) {
        const T* row = rows + (r + k) * w.width;
        for (int64_t i = 0; i < whole; i += lanes) sum += V::load(row + i);
        if (whole < w.count) sum += select(rest, V::load(row + whole), V(T(0)));
      }
      sum.store(sums + k * lanes);
    }
    transpose<T>({sums, lanes}, lanes, lanes, {turned, lanes});
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
      for (int64_t k = 0; k < half; ++k) {
        T* at = turned + k * lanes;
        (V::load(at) + V::load(at + half * lanes)).store(at);
      }
    }
    for (int64_t k = 0; k < m; ++k) to[r + k] = turned[k] + (w.first ? T(0) : to[r + k]);
  }
}

// The transpose of n rows, and the step between its rows, which are padded with zeros.
template <class T>
Rows<const T> turn(const ChainRows<T>& w, const T* rows, int64_t row_width, int64_t n,
                   int64_t stride) {
  transpose_rows<T>({rows, row_width}, n, w.columns, {w.turned, stride});
  return {w.turned, stride};
}

// Adds grad in^T and the sum of grad to the gradients of a task; the first tile stores the former.
template <class T>
void add_layer_gradients(const ChainLayer& y, const ChainRows<T>& w, const T* grad, const T* in,
                         T* grads) {
  const Rows<const T> right = turn(w, in, w.width, y.in, y.grad_stride);
  T* out = grads + y.grad;
  if (y.prefix == nullptr) {
    gemm<T>({grad, w.width, 1}, right, y.out, y.in, w.count, {out, y.grad_stride}, !w.first);
  } else {
    for (int64_t r = 0; r < y.out; r += kMostRows<T>) {
      const int64_t n = y.out - r < kMostRows<T> ? y.out - r : kMostRows<T>;
      gemm<T>({grad + r * w.width, w.width, 1}, right, n, y.prefix[r + n - 1], w.count,
              {out + r * y.grad_stride, y.grad_stride}, !w.first);
    }
  }
  if (y.bias != nullptr) add_row_sums(w, grad, y.out, grads + y.grad_bias);
}

// ---- activations -------------------------------------------------------------------------------
// Calls f(activation, i) for every vector of n rows.
template <class T, class F>
void each_unit(Activation activation, const ChainRows<T>& w, int64_t n, F f) {
  with_activation(activation, [&](auto which) {
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = r * w.width; i < r * w.width + w.columns; i += Vec<T>::kLanes) f(which, i);
    }
  });
}

template <class T>
void activate(Activation activation, const ChainRows<T>& w, int64_t n, const T* h, T* to) {
  each_unit(activation, w, n, [&](auto which, int64_t i) {
    activation_curve<decltype(which)::value>(Vec<T>::load(h + i)).value.store(to + i);
  });
}

// to = (add or 0) + grad a'(h).
template <class T>
void deactivate(Activation activation, const ChainRows<T>& w, int64_t n, const T* h, const T* grad,
                const T* add, T* to) {
  each_unit(activation, w, n, [&](auto which, int64_t i) {
    const Vec<T> slope = activation_curve<decltype(which)::value>(Vec<T>::load(h + i)).slope;
    const Vec<T> more = add == nullptr ? Vec<T>(T(0)) : Vec<T>::load(add + i);
    (more + Vec<T>::load(grad + i) * slope).store(to + i);
  });
}

// ---- contexts ----------------------------------------------------------------------------------
// A weight of the context, [out, K], its rows `lead` apart, and the place of its gradient.
struct ContextWeight {
  const void* p;
  int64_t lead, place, stride;
};

// What the sums of a layer have added: C c, with C null for none.
template <class T>
ContextWeight added_context(const ChainElements& e, int l, int64_t context) {
  const ChainLayer& y = e.layer[l];
  if (l > 0) return {y.gated ? nullptr : y.context, context, y.grad_context, e.context_stride};
  if (y.lead > y.in) {  // joined: the gradient stands beside that of the other inputs
    return {e.context_weight, e.context_lead, y.grad + (y.in + 15) / 16 * 16, y.grad_stride};
  }
  return {e.context_weight, e.context_lead, e.grad_context, e.context_stride};
}

// Rows [begin, end) of `out` += C c, for a weight C that has all rows.
template <class T>
void add_context(const ContextWeight& weight, const ChainRows<T>& w, const T* c, int64_t context,
                 int64_t begin, int64_t end, T* out) {
  gemm<T>({typed<T>(weight.p) + begin * weight.lead, weight.lead, 1}, {c, w.width}, end - begin,
          w.columns, context, {out + begin * w.width, w.width}, true);
}

// Rows [begin, end) of C c + d, of a gate or of what the first layer activates.
template <class T>
void context_sums(const ChainLayer& y, const ChainRows<T>& w, const T* c, int64_t context,
                  int64_t begin, int64_t end) {
  T* gate = w.row(y.gate);
  for (int64_t r = begin; r < end; ++r) {
    const Vec<T> b = typed<T>(y.gate_bias)[r];
    for (int64_t i = 0; i < w.columns; i += Vec<T>::kLanes) b.store(gate + r * w.width + i);
  }
  add_context({y.context, context, 0, 0}, w, c, context, begin, end, gate);
}

// Rows [begin, end) of `out` += a(C c + d).
template <class T>
void add_activated(const ChainElements& e, const ChainLayer& y, const ChainRows<T>& w, const T* c,
                   int64_t context, int64_t begin, int64_t end, T* out) {
  context_sums(y, w, c, context, begin, end);
  const T* sums = w.row(y.gate + begin);
  T* to = out + begin * w.width;
  each_unit(e.activation, w, end - begin, [&](auto which, int64_t i) {
    const Vec<T> value = activation_curve<decltype(which)::value>(Vec<T>::load(sums + i)).value;
    (Vec<T>::load(to + i) + value).store(to + i);
  });
}

// The gates of rows [begin, end).
template <class T>
void compute_gates(const ChainLayer& y, const ChainRows<T>& w, const T* c, int64_t context,
                   int64_t begin, int64_t end) {
  context_sums(y, w, c, context, begin, end);
  T* rows = w.row(y.gate + begin);
  activate(Activation::kSigmoid, w, end - begin, rows, rows);
}

// Rows [begin, end) of `out` = gate * value (+ the rows of `add`).
template <class T>
void apply_gates(const ChainLayer& y, const ChainRows<T>& w, int64_t begin, int64_t end,
                 const T* add, T* out) {
  const T *value = w.row(y.ungated), *gate = w.row(y.gate);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = r * w.width; i < r * w.width + w.columns; i += Vec<T>::kLanes) {
      const Vec<T> more = add == nullptr ? Vec<T>(T(0)) : Vec<T>::load(add + i);
      (more + Vec<T>::load(value + i) * Vec<T>::load(gate + i)).store(out + i);
    }
  }
}

// From the gradients of rows [begin, end): those of the values replace the gates, and those of what
// the sigmoid is taken of replace the values.
template <class T>
void gates_backward(const ChainLayer& y, const ChainRows<T>& w, int64_t begin, int64_t end,
                    const T* grad) {
  T *value = w.row(y.ungated), *gate = w.row(y.gate);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = r * w.width; i < r * w.width + w.columns; i += Vec<T>::kLanes) {
      const Vec<T> s = Vec<T>::load(gate + i), g = Vec<T>::load(grad + i) * s;
      (g * Vec<T>::load(value + i) * (Vec<T>(T(1)) - s)).store(value + i);
      g.store(gate + i);
    }
  }
}

// From the gradients of C c, in `out` rows, to those of C and of c.
template <class T>
void context_backward(const ContextWeight& weight, int64_t out, const ChainRows<T>& w, const T* c,
                      T* grad_c, int64_t context, const T* grad, T* grads) {
  if (grads != nullptr) {
    const Rows<const T> right = turn(w, c, w.width, context, (context + 15) / 16 * 16);
    gemm<T>({grad, w.width, 1}, right, out, context, w.count, {grads + weight.place, weight.stride},
            !w.first);
  }
  if (grad_c != nullptr) {
    gemm<T>({typed<T>(weight.p), 1, weight.lead}, {grad, w.width}, context, w.columns, out,
            {grad_c, w.width}, true);
  }
}

// The contexts of a network: from the gradients of its layers' sums.
template <class T>
void layer_context_backward(const ChainElements& e, int l, const ChainRows<T>& w, const T* c,
                            T* grad_c, int64_t context, const T* grad, T* grads) {
  const ChainLayer& y = e.layer[l];
  const ContextWeight added = added_context<T>(e, l, context);
  if (added.p != nullptr) context_backward(added, y.out, w, c, grad_c, context, grad, grads);
  if (!y.gated && !y.activated) return;
  T* from = w.row(y.gated ? y.ungated : y.gate);
  if (y.activated) deactivate<T>(e.activation, w, y.out, from, grad, nullptr, from);
  const ContextWeight own{y.context, context, y.grad_context, e.context_stride};
  context_backward<T>(own, y.out, w, c, grad_c, context, from, grads);
  if (grads != nullptr) add_row_sums<T>(w, from, y.out, grads + y.grad_gate_bias);
}

// ---- a network ---------------------------------------------------------------------------------
// What a layer reads the one before it through.
inline Activation seen_through(const ChainElements& e, int l) {
  const bool last = l == e.layers - 1, opens = e.residual && !last && l % 2 == 1;
  const bool plain = (last && !e.activate_last) || (opens && !e.activate_blocks);
  return plain ? Activation::kIdentity : e.activation;
}

// What the context adds to rows [begin, end) of a layer's sums.
template <class T>
void add_contexts(const ChainElements& e, int l, const ChainRows<T>& w, const T* c, int64_t context,
                  int64_t begin, int64_t end, T* out) {
  const ContextWeight added = added_context<T>(e, l, context);
  if (added.p != nullptr) add_context(added, w, c, context, begin, end, out);
  if (e.layer[l].activated) add_activated(e, e.layer[l], w, c, context, begin, end, out);
}

// Computes the parameters, from the rows that gather_reads left; `c` holds the rows of the context.
template <class T>
void network_forward(const ChainElements& e, const ChainRows<T>& w, const T* c, int64_t context) {
  T* params = w.row(e.params);
  if (e.layers == 0) {
    const T* shared = typed<T>(e.shared);
    for (int64_t r = 0; r < e.params_count; ++r) {
      const Vec<T> value = shared[r];
      for (int64_t i = 0; i < w.columns; i += Vec<T>::kLanes) {
        value.store(params + r * w.width + i);
      }
    }
    return;
  }
  const int last = e.layers - 1;
  auto output = [&](int l) { return l == last ? params : w.row(e.layer[l + 1].before); };
  const T* in = w.row(0);
  for (int l = 0; l <= last; ++l) {
    const ChainLayer& y = e.layer[l];
    if (l > 0) {
      activate(seen_through(e, l), w, y.in, w.row(y.before), w.row(y.after));
      in = w.row(y.after);
    }
    const bool closes = e.residual && l > 0 && l < last && l % 2 == 0;  // the second of a pair
    const T* skip = closes ? w.row(e.layer[l - 1].before) : nullptr;
    if (y.gated) {
      layer_forward(y, w, in, w.row(y.ungated));
      compute_gates(y, w, c, context, 0, y.out);
      apply_gates(y, w, 0, y.out, skip, output(l));
      continue;
    }
    layer_forward(y, w, in, output(l), skip);
    add_contexts(e, l, w, c, context, 0, y.out, output(l));
  }
}

// From the gradients of the parameters, which stand in their rows, to those of the weights, which
// are added to `grads`, of the context's rows, which are added to grad_c, and of the inputs.
// Returns the latter, rows in the order of `read`.
template <class T>
const T* network_backward(const ChainElements& e, const ChainRows<T>& w, const T* c, T* grad_c,
                          int64_t context, T* grads) {
  T* grad = w.row(e.params);
  if (e.layers == 0) {
    if (grads != nullptr) add_row_sums(w, grad, e.params_count, grads + e.grad_shared);
    return nullptr;
  }
  T *h = w.row(e.params + e.params_count), *u = h + e.widest * w.width,
    *inner = u + e.widest * w.width;
  const int last = e.layers - 1;
  auto after = [&](int l) { return w.row(l == 0 ? 0 : e.layer[l].after); };
  for (int l = last; l > 0; --l) {
    const ChainLayer& y = e.layer[l];
    const bool opens = e.residual && l < last && l % 2 == 1;   // the first of a pair
    const bool closes = e.residual && l < last && l % 2 == 0;  // the second
    const T* of_output = opens ? inner : grad;
    if (y.gated) {
      gates_backward(y, w, 0, y.out, of_output);
      of_output = w.row(y.gate);
    }
    layer_context_backward(e, l, w, c, grad_c, context, of_output, grads);
    if (grads != nullptr) add_layer_gradients(y, w, of_output, after(l), grads);
    layer_backward(y, w, of_output, u);
    T* to = closes ? inner : h;
    deactivate(seen_through(e, l), w, y.in, w.row(y.before), u, opens ? h : nullptr, to);
    if (!closes) grad = h;
  }
  const ChainLayer& y = e.layer[0];
  if (grads != nullptr) add_layer_gradients(y, w, grad, w.row(0), grads);
  layer_context_backward(e, 0, w, c, grad_c, context, static_cast<const T*>(grad), grads);
  layer_backward(y, w, grad, u);
  return u;
}

}  // namespace

PFK_END
