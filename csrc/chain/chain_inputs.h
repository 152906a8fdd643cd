// SPDX-License-Identifier: Apache-2.0
// What the network of a step reads: features, or the cosine and the sine of angles in their place.
#pragma once

#include "chain/chain.h"
#include "core/angles.h"
#include "core/gemm.h"

PFK_BEGIN

namespace {

// The work space of a tile.
template <class T>
struct ChainRows {
  T* base;
  int64_t width;           // between rows
  int64_t count, columns;  // samples; in whole vectors
  T* turned;               // room for the transpose of the widest layer
  bool first;              // of a task's tiles: its gradients are written, not added
  T* row(int64_t r) const { return base + r * width; }
};

// The inputs that feature read[r], whose values are given, becomes.
template <class T>
void gather_read(const ChainElements& e, const ChainRows<T>& w, int64_t r, const T* values) {
  T* to = w.row(first_input(e, r));
  if (input_count(e, r) == 1) {
    memcpy(to, values, w.columns * sizeof(T));
    return;
  }
  const Vec<T> frequency = static_cast<T>(e.frequency[r]);
  for (int64_t i = 0; i < w.columns; i += Vec<T>::kLanes) {
    const SinCos<Vec<T>> found = sincos_(Vec<T>::load(values + i) * frequency);
    found.cos.store(to + i);
    found.sin.store(to + w.width + i);
  }
}

// The inputs of the first layer, rows one after the other.
template <class T>
void gather_reads(const ChainElements& e, const ChainRows<T>& w, const T* x, int64_t x_width) {
  for (int64_t r = 0; r < e.reads; ++r) gather_read(e, w, r, x + e.read[r] * x_width);
}

// to += the gradient of feature read[r], from those of the inputs that it became, which are still
// in their place.
template <class T>
void add_read_gradient(const ChainElements& e, const ChainRows<T>& w, int64_t r, const T* grad,
                       T* to) {
  using V = Vec<T>;
  const bool angle = input_count(e, r) == 2;
  const V frequency = angle ? static_cast<T>(e.frequency[r]) : T(0);
  const T* cosine = w.row(first_input(e, r));
  for (int64_t i = 0; i < w.columns; i += V::kLanes) {
    V g = V::load(grad + i);
    if (angle) {
      const V by_cosine = g * V::load(cosine + w.width + i);
      const V by_sine = V::load(grad + w.width + i) * V::load(cosine + i);
      g = (by_sine - by_cosine) * frequency;
    }
    (V::load(to + i) + g).store(to + i);
  }
}

}  // namespace

PFK_END
