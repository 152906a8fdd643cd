// SPDX-License-Identifier: Apache-2.0
// Sine and cosine of any numbers, in the lanes of a Vec.
#pragma once

#include <math.h>

#include "core/math.h"

PFK_BEGIN

// pi / 2 in three parts, of which the first two have so few digits that their products with numbers
// of quarter turns up to kMost 2 / pi are exact.
template <class T>
struct QuarterTurn;
template <>
struct QuarterTurn<float> {
  static constexpr float kFirst = 1.5703125f, kSecond = 4.837512969970703125e-4f,
                         kThird = 7.549789954891882e-8f, kMost = 8192;
  static constexpr int kToSign = 30;  // from the second bit to the sign
};
template <>
struct QuarterTurn<double> {
  static constexpr double kFirst = 1.570796251296997070312, kSecond = 7.54978941586159635336e-8,
                          kThird = 5.3903028581581190529e-15, kMost = 1048576;
  static constexpr int kToSign = 62;
};

// x = n pi / 2 + r with |r| <= pi / 4; the last two bits of n say which of sin r and cos r it is.
template <class T>
PFK_HD SinCos<Vec<T>> sincos_(Vec<T> x) {
  using V = Vec<T>;
  using Turn = QuarterTurn<T>;
  const V shifted = x * V(T(0.636619772367581343)) + V(Float<T>::kRound);
  const V n = shifted - V(Float<T>::kRound);
  const V rest = x - n * V(Turn::kFirst) - n * V(Turn::kSecond) - n * V(Turn::kThird);
  const SinCos<V> of_rest = sincos_small(rest);
  const typename V::RawInt k = bits(shifted);
  const Mask<T> odd = {(k & 1) != 0};
  const V s = select(odd, of_rest.cos, of_rest.sin), c = select(odd, of_rest.sin, of_rest.cos);
  SinCos<V> found = {
      from_bits<T>(bits(s) ^ ((k & 2) << Turn::kToSign)),
      from_bits<T>(bits(c) ^ ((plus_bits<T>(k, typename V::RawInt{} + 1) & 2) << Turn::kToSign))};
  const Mask<T> far = abs_(x) > V(Turn::kMost);
  if (!any_lane(far)) return found;
  for (int i = 0; i < V::kLanes; ++i) {
    if (far.m[i]) found.sin.v[i] = ::sin(x.v[i]), found.cos.v[i] = ::cos(x.v[i]);
  }
  return found;
}

PFK_END
