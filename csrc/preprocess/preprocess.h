// SPDX-License-Identifier: Apache-2.0
// Dequantization and the logit, element by element, for scalars (CUDA) and Vecs (CPU).
//
//   v = (x + u) / 2^bits,   p = alpha + (1 - 2 alpha) v,   q = 1 - p = alpha + (1 - 2 alpha)(1 - v)
//   y = log p - log q,      log |dy/dv| = log(1 - 2 alpha) - log p - log q
//
// where 1 - v is exact from v = 1/2 on, so that q is accurate near v = 1, too.  The constant
// log(1 - 2 alpha) is added once for a sample, not here.
#pragma once

#include "core/activations.h"

namespace pfk {

constexpr int kNoiseBits = 16;  // with a level of 8 bits these are 24 bits: exact in float32

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

// ---- the logit ---------------------------------------------------------------------------------
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
PFK_HD LogitOut<V> logit_forward(const Odds<V>& o) {
  const V log_p = log_(o.p), log_q = log_(o.q);
  return {log_p - log_q, -(log_p + log_q)};
}
template <class V>
PFK_HD LogitOut<V> logit_forward_normal(const Odds<V>& o) {  // p and q positive normal numbers
  const V log_p = log_normal(o.p), log_q = log_normal(o.q);
  return {log_p - log_q, -(log_p + log_q)};
}
// For any p and q.  Where both are positive normal numbers, the result has the same bits as that of
// logit_forward_normal: which of the two functions runs must not show in other elements.
template <class V>
PFK_HD LogitOut<V> logit_forward_mixed(const Odds<V>& o, MaskOf<V> normal) {
  const LogitOut<V> fast = logit_forward_normal(o), full = logit_forward(o);
  return {select(normal, fast.y, full.y), select(normal, fast.term, full.term)};
}
// For p and q of at least 2^-22, with one logarithm.  The term is p q in place of -log(p q): the
// sum takes one logarithm of the product of four terms, which still is a normal number.
template <class V>
PFK_HD LogitOut<V> logit_of_level(V x, const LogitMap<Lane<V>>& m) {
  const Odds<V> o = odds(x, m);
  return {log_normal(o.p / o.q), o.p * o.q};
}

// sigmoid and its complement, and log p + log q = 2 log max(p, q) - |y|, whose magnitude is 2 log 2
// at least, so that the rounding of a maximum near 1 does no harm.
template <class V>
struct LogitSides {
  V p, q, log_pq;
};
template <class V>
PFK_HD LogitSides<V> sides_of_logit(V y) {
  using T = Lane<V>;
  const V a = abs_(y);
  const Sigmoid<V> s = sigmoid_from(y, exp_(-a));
  return {s.value, s.rest, V(T(2)) * log_normal(max_(s.value, s.rest)) - a};
}
template <class V>
PFK_HD LogitOut<V> logit_inverse(V y, const LogitMap<Lane<V>>& m) {
  const LogitSides<V> s = sides_of_logit(y);
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
  const LogitSides<V> s = sides_of_logit(y);
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
