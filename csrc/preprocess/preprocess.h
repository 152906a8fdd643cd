// SPDX-License-Identifier: Apache-2.0
// Dequantization and the logit, element by element, for scalars (CUDA) and Vecs (CPU).
//
//   v = (x + u) / 2^bits,   p = alpha + (1 - 2 alpha) v,   q = 1 - p = alpha + (1 - 2 alpha)(1 - v)
//   y = log p - log q,      log |dy/dv| = log(1 - 2 alpha) - log p - log q
//
// where 1 - v is exact from v = 1/2 on, so that q keeps its digits as v nears 1.  The constant
// log(1 - 2 alpha) is added once for a sample, not here.
#pragma once

#include "core/math.h"

namespace pfk {

constexpr int kNoiseBits = 16;  // a level of 8 bits and its noise make 24: exact in float32

struct PreprocessArgs {
  double alpha;
  int bits;
  bool logit;    // dequantize, quantize: whether the logit is applied
  bool inverse;  // logit: the direction
  int edge;      // least distance of the noise from the edges of a level, in steps of 2^-16
  uint64_t seed;
  double constant;  // of a sample, added to its summed terms
  int64_t channels, space;
  bool channels_last;  // dequantize: where a logical element lies
  const void* in;      // forward: input; backward: what was kept
  void* out;           // forward: output; backward: gradient of the input
  void* log_det;
  double* partial;  // sums of chunks, if a row has several
  const void* grad_out;
  const void* grad_log_det;
};

}  // namespace pfk

PFK_BEGIN

template <class T>
struct LogitMap {
  T alpha, width, inverse_width;
};
template <class T>
PFK_HD LogitMap<T> logit_map(double alpha) {
  return {T(alpha), T(1 - 2 * alpha), T(1 / (1 - 2 * alpha))};
}

template <class V>
struct Odds {
  V p, q;
};
template <class V>
PFK_HD Odds<V> odds(V x, const LogitMap<Lane<V>>& m) {
  using T = Lane<V>;
  const V a = V(m.alpha), w = V(m.width);
  return {w * x + a, w * (V(T(1)) - x) + a};
}

// y and its term of the log-det: log |dy/dx| less log(1 - 2 alpha), or the negative for the
// inverse.
template <class V>
struct LogitOut {
  V y, term;
};
template <class V>
PFK_HD LogitOut<V> logit_forward(V x, const LogitMap<Lane<V>>& m) {
  const Odds<V> o = odds(x, m);
  const V log_p = log_(o.p), log_q = log_(o.q);
  return {log_p - log_q, -(log_p + log_q)};
}
// The same for p and q of at least 2^-22, with one logarithm: the term is p q here, of which a sum
// takes the logarithm four at a time (the product of four stays a normal number), and changes the
// sign.
template <class V>
PFK_HD LogitOut<V> logit_of_level(V x, const LogitMap<Lane<V>>& m) {
  const Odds<V> o = odds(x, m);
  return {log_(o.p / o.q), o.p * o.q};
}

// sigmoid and its complement, neither by subtraction, and log p + log q = -|y| - 2 log(1 + e^-|y|).
template <class V>
struct Sigmoid {
  V p, q, log_pq;
};
template <class V>
PFK_HD Sigmoid<V> sigmoid_odds(V y) {
  using T = Lane<V>;
  const V a = abs_(y), e = exp_(-a);
  const V large = V(T(1)) / (V(T(1)) + e), small = e * large;
  return {select(y < T(0), small, large), select(y < T(0), large, small),
          -(a + V(T(2)) * log1p_(e))};
}
template <class V>
PFK_HD LogitOut<V> logit_inverse(V y, const LogitMap<Lane<V>>& m) {
  const Sigmoid<V> s = sigmoid_odds(y);
  return {(s.p - V(m.alpha)) * V(m.inverse_width), s.log_pq};
}

// d y / d x = (1 - 2 alpha) / (p q), and of the log-det d y / d x (p - q); the inverse's likewise.
template <class V>
PFK_HD V logit_forward_vjp(V x, V grad_y, V grad_term, const LogitMap<Lane<V>>& m) {
  const Odds<V> o = odds(x, m);
  return V(m.width) / (o.p * o.q) * (grad_y + (o.p - o.q) * grad_term);
}
template <class V>
PFK_HD V logit_inverse_vjp(V y, V grad_x, V grad_term, const LogitMap<Lane<V>>& m) {
  const Sigmoid<V> s = sigmoid_odds(y);
  return s.p * s.q * V(m.inverse_width) * grad_x + (s.q - s.p) * grad_term;
}

// The level of v, limited to [0, top]; nan gives 0.
template <class V>
PFK_HD V quantize_level(V v, Lane<V> levels, Lane<V> top) {
  using T = Lane<V>;
  const V t = v * V(levels);
  return floor_(select(t > T(0), select(t > top, V(top), t), V(T(0))));
}

PFK_END
