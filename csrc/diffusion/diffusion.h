// SPDX-License-Identifier: Apache-2.0
// A step of a stochastic differential equation dX = u dt + sigma dW (Maruyama 1955), element by
// element:
//
//   x + h u + s z,   s = sigma sqrt|h|,
//
// of which u may be the mean of two drifts (Heun), or missing.  Element i has number i of the
// standard normal numbers z of a stream (core/normal.h): they are made again wherever they are
// wanted, and never kept.
#pragma once

#include "core/normal.h"

namespace pfk {

struct DiffusionArgs {
  int64_t count;
  const void *x, *drift, *other;  // the drifts, or null: both, or the second
  void* out;
  double step, scale;  // h and s
  uint64_t stream;
};

}  // namespace pfk

PFK_BEGIN

template <class T>
struct DiffusionStep {
  T step, half, scale;
  PFK_HD explicit DiffusionStep(const DiffusionArgs& a)
      : step(static_cast<T>(a.step)),
        half(static_cast<T>(0.5 * a.step)),
        scale(static_cast<T>(a.scale)) {}
};

template <class V>
PFK_HD V diffusion_step(V x, V z, const DiffusionStep<Lane<V>>& s) {
  return x + V(s.scale) * z;
}
template <class V>
PFK_HD V diffusion_step(V x, V drift, V z, const DiffusionStep<Lane<V>>& s) {
  return diffusion_step(x + V(s.step) * drift, z, s);
}
template <class V>
PFK_HD V diffusion_step(V x, V drift, V other, V z, const DiffusionStep<Lane<V>>& s) {
  return diffusion_step(x + V(s.half) * (drift + other), z, s);
}

PFK_END
