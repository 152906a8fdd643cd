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

// ---- logarithm of positive normal numbers ------------------------------------------------------

// The two sides of a sigmoid are nearly always such: then the special cases and the division of
// log_ are spared, 12 cycles a vector of 8 on Zen 3 against 20.  Anything else gives something
// arbitrary.
template <class V>
PFK_HD V log_normal(V x) {
#if !defined(__CUDACC__)
  if constexpr (sizeof(V) == sizeof(Vec<float>) && sizeof(Lane<V>) == 4 && sizeof(V) > 4) {
    // x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), log(1 + f) = f - f^2 / 2 + f^3 r(f); relative
    // error 3.4e-9
    using F = Float<float>;
    const typename V::RawInt i = bits(x), offset = i - bits(V(0.70710678118654752440f));
    const typename V::RawInt e = offset >> F::kMantissa;
    const V f = from_bits<float>(i - (e << F::kMantissa)) - V(1.0f), square = f * f;
    const V r =
        polynomial(f, {0.333333313f, -0.24999997f, 0.200007156f, -0.166678026f, 0.142490581f,
                       -0.124256872f, 0.116854198f, -0.114797339f, 0.0697161183f});
    const V k = __builtin_convertvector(e, typename V::Raw);
    return k * V(F::kLn2Hi) + (f + (f * square * r + k * V(F::kLn2Lo) - square * V(0.5f)));
  }
#endif
  return log_(x);
}

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
// The same for p and q of at least 2^-22, with one logarithm: the term is p q here, of which a sum
// takes the logarithm four at a time (the product of four stays a normal number), and changes the
// sign.
template <class V>
PFK_HD LogitOut<V> logit_of_level(V x, const LogitMap<Lane<V>>& m) {
  const Odds<V> o = odds(x, m);
  return {log_normal(o.p / o.q), o.p * o.q};
}

// sigmoid and its complement, neither by subtraction, and log p + log q = 2 log max(p, q) - |y|,
// whose magnitude is 2 log 2 at least, so that the rounding of a maximum near 1 does no harm.
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
          V(T(2)) * log_normal(large) - a};
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
