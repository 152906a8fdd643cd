// SPDX-License-Identifier: Apache-2.0
// The exact trace of a shallow field (field_exact.h) in tiles, as in field_cache.h.  The rows of a
// tile are the primal of its samples and then their slopes; M is like one more layer.
#pragma once

#include "field/field_cache.h"

PFK_BEGIN

namespace {

// Copies products of a tile to what is kept, or back.
template <class T>
void move_exact(const FieldArgs& a, const FieldLayer& y, int64_t first, int64_t n, T* tile,
                bool load) {
  if (a.kept == nullptr || y.kept < 0) return;
  T* kept = typed<T>(a.kept) + y.kept + first * y.out;
  load ? copy_rows<T>(kept, y.out, tile, y.out_stride, n, y.out)
       : copy_rows<T>(tile, y.out_stride, kept, y.out, n, y.out);
}

// A layer whose "tangents" consist of ones.
template <class T>
LayerArgs slope_args(const FieldArgs& a, const FieldLayer& y, int64_t n, const Tile<T>& w) {
  LayerArgs r = layer_args(a, y, n, w);
  r.tangents = a.ones;
  r.tangent_step = 0;
  return r;
}

// The slopes of a layer lie behind its values.
template <class T>
T* slopes_of(const FieldLayer& y, T* s, int64_t n) {
  return s + n * y.out_stride;
}

template <class T>
void activate_exact(const FieldArgs& a, Tile<T>& w, int l, int64_t first, int64_t n,
                    LayerPass pass) {
  LayerArgs r = slope_args(a, a.layer[l], n, w);
  set_parameters(a, a.layer[l], first, n, w, r, 0);
  run_layer<T>(r, pass, 0, n);
}

template <class T>
void product_exact(const FieldArgs& a, Tile<T>& w, const FieldLayer& y, const T* h, int64_t n) {
  multiply<T>(h, y.in_stride, Packed<T>(a, y).transposed, y.out_stride, n, y.out, y.in,
              w.product(y), y.out_stride);
}

template <class T>
void load_input(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n) {
  copy_rows(typed<T>(a.x) + first * a.features, a.features, w.input, a.layer[0].in_stride, n,
            a.features);
}

template <class T>
OutputArgs exact_output(const FieldArgs& a, int64_t first, int64_t n, const Tile<T>& w) {
  OutputArgs o = output_args(a, a.layer[a.layers - 1], first, n, w);
  o.probes = 0;
  return o;
}

template <class T>
void exact_tile(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n) {
  const FieldLayer& c = *a.coupling;
  const int last = a.layers - 1;
  T* const trace = typed<T>(a.trace) + first;
  load_input(a, w, first, n);
  const T* h = w.input;
  for (int l = 0; l < last; ++l) {
    product_exact(a, w, a.layer[l], h, n);
    activate_exact(a, w, l, first, n, kForward);
    move_exact(a, a.layer[l], first, n, w.product(a.layer[l]), false);
    h = w.s;
    if (l > 0) continue;
    // now, because the next layer overwrites the slopes of this one
    product_exact(a, w, c, slopes_of(a.layer[0], w.s, n), n);
    move_exact(a, c, first, n, w.product(c), false);
  }
  const T* q = w.product(c);
  for (int64_t i = 0; i < n; ++i, q += c.out_stride) {
    if (last == 1) {
      trace[i] = q[0];
      continue;
    }
    const T* slopes = slopes_of(a.layer[1], w.s, n) + i * c.out_stride;
    Vec<T> sum = T(0);
    each_vector<T>(c.out, [&](int64_t j, int m) { sum += get(slopes + j, m) * get(q + j, m); });
    trace[i] = static_cast<T>(sum_lanes(sum));
  }
  product_exact(a, w, a.layer[last], h, n);
  OutputArgs o = exact_output(a, first, n, w);
  set_parameters(a, a.layer[last], first, n, w, o, 0);
  output_forward<true, T>(o, 0, n);
}

// Replaces q by its cotangents, and writes those of the upper slopes to `low`.
template <class T>
void coupling_backward(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n, T* low) {
  const FieldLayer& c = *a.coupling;
  T* q = w.product(c);
  const T* slopes = slopes_of(a.layer[a.layers - 2], w.s, n);
  for (int64_t i = 0; i < n; ++i) {
    const Vec<T> t = typed<T>(a.grad_trace)[first + i];
    const int64_t row = i * c.out_stride;
    if (a.layers == 2) {
      q[row] = typed<T>(a.grad_trace)[first + i];
      continue;
    }
    for (int64_t j = row; j < row + c.out; j += Vec<T>::kLanes) {
      (t * Vec<T>::load(q + j)).store(low + j);
      (t * Vec<T>::load(slopes + j)).store(q + j);
    }
  }
}

template <class T>
void exact_backward_tile(const FieldArgs& a, Tile<T>& w, int64_t first, int64_t n, int64_t task,
                         bool fresh) {
  const FieldLayer &c = *a.coupling, &last = a.layer[a.layers - 1];
  load_input(a, w, first, n);
  for (int l = 0; l < a.layers - 1; ++l) {
    move_exact(a, a.layer[l], first, n, w.product(a.layer[l]), true);
  }
  move_exact(a, c, first, n, w.product(c), true);
  if (a.layers == 3 || last.gate) activate_exact(a, w, a.layers - 2, first, n, kRestored);
  if (last.gate) product_exact(a, w, last, w.s, n);
  OutputArgs o = exact_output(a, first, n, w);
  set_parameters(a, last, first, n, w, o, task);
  output_backward<true, T>(o, 0, n);
  store_own_gradients(last, first, n, w);
  coupling_backward(a, w, first, n, slopes_of(a.layer[a.layers - 2], w.other, n));
  for (int l = a.layers - 1; l > 0; --l) {
    const FieldLayer &y = a.layer[l], &below = a.layer[l - 1];
    multiply<T>(w.grad, y.out_stride, Packed<T>(a, y).weight, y.in_stride, n, y.in, y.out, w.other,
                y.in_stride);
    if (l == 1) {
      multiply<T>(w.product(c), c.out_stride, Packed<T>(a, c).weight, c.in_stride, n, c.in, c.out,
                  slopes_of(below, w.other, n), c.in_stride);
    }
    LayerArgs r = slope_args(a, below, n, w);
    r.grad = w.other;
    set_parameters(a, below, first, n, w, r, task);
    run_layer<T>(r, kBackward, 0, n);
    store_own_gradients(below, first, n, w);
    add_weight<T>(a, y, w.grad, w.s, n, task, fresh);
    T* swap = w.grad;
    w.grad = w.other;
    w.other = swap;
  }
  const FieldLayer& y = a.layer[0];
  add_weight<T>(a, c, w.product(c), slopes_of(y, w.s, n), n, task, fresh);
  add_weight<T>(a, y, w.grad, w.input, n, task, fresh);
  multiply<T>(w.grad, y.out_stride, Packed<T>(a, y).weight, y.in_stride, n, y.in, y.out, w.other,
              y.in_stride);
  copy_rows<T>(w.other, y.in_stride, typed<T>(a.grad_x) + first * a.features, a.features, n,
               a.features);
}

// The tiles of tasks [begin, end).
template <bool kBackward, class T>
void exact_tasks(const FieldArgs& a, int64_t begin, int64_t end) {
  Tile<T> w(a);
  each_tile<T>(a, w, begin, end, [&](int64_t first, int64_t n, int64_t task, bool fresh) {
    if constexpr (kBackward) {
      exact_backward_tile<T>(a, w, first, n, task, fresh);
    } else {
      exact_tile<T>(a, w, first, n);
    }
  });
}

}  // namespace

PFK_END
