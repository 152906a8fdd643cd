// SPDX-License-Identifier: Apache-2.0
// The exponentials of a softmax and a softplus, for scalars and Vecs.  A spline takes K of them for
// each element: they are shorter, and less exact, than the functions of math.h and activations.h.
#pragma once

#include "core/activations.h"
#if !defined(__CUDACC__) && PFK_SIMD_LEVEL == 2
#include <immintrin.h>
#endif

PFK_BEGIN

// ---- 2^t for t <= 1 -----------------------------------------------------------------------------
// Results below the least normal number may be rounded to that number or to 0.  NaN stays NaN.
PFK_HD float exp2_below(float t) { return ::exp2f(t); }
PFK_HD double exp2_below(double t) { return ::exp2(t); }

#if !defined(__CUDACC__)

// 2^f for |f| <= 1/2.
template <class T>
PFK_HD Vec<T> exp2_fraction(Vec<T> f) {
  if constexpr (sizeof(T) == 4) {  // relative error 5.1e-9; short chains
    const Vec<T> f2 = f * f;
    const Vec<T> low = f * 0.693147188026f + Vec<T>(1.0f);
    const Vec<T> middle = f * 0.0555035711422f + Vec<T>(0.240226507606f);
    const Vec<T> high = f * 0.00133908633647f + Vec<T>(0.00961808255728f);
    return low + f2 * (middle + f2 * (high + f2 * 0.000154531629451f));
  } else {  // 1.2e-19
    return Vec<T>(T(1)) +
           f * polynomial(
                   f, {0.693147180559945309, 0.240226506959100712, 0.055504108664821627,
                       0.00961812910762847949, 0.00133335581464064707, 0.000154035303933707334,
                       0.0000152527338415567726, 1.32154868087055628e-6, 1.01780570877339411e-7,
                       7.05489730415549928e-9, 4.45581790833606449e-10, 2.57293241773623042e-11});
  }
}

template <class T>
PFK_HD Vec<T> exp2_below(Vec<T> t) {
  using F = Float<T>;
#if PFK_SIMD_LEVEL == 2
  if constexpr (sizeof(T) == 4) {  // AVX-512 can round and scale in one instruction each
    constexpr __mmask16 all = 0xffff;
    const __m512 x = (__m512)t.v, k = _mm512_maskz_roundscale_ps(all, x, 0);
    const __m512 p = (__m512)exp2_fraction(Vec<T>((typename Vec<T>::Raw)(x - k))).v;
    return Vec<T>((typename Vec<T>::Raw)_mm512_maskz_scalef_ps(all, p, k));
  }
#endif
  t = max_(t, Vec<T>(T(1 - F::kBias)));
  const Vec<T> shifted = t + F::kRound;
  const Vec<T> f = t - (shifted - F::kRound);
  return exp2_fraction(f) *
         from_bits<T>(plus_bits<T>(bits(shifted) << F::kMantissa, bits(Vec<T>(T(1)))));
}

#endif

// ---- softplus -----------------------------------------------------------------------------------
// log(1 + e) for 0 <= e <= 1: 2 atanh(s) with s = e / (2 + e), s^2 <= 1/9.
PFK_HD float log1p_unit(float e) { return ::log1pf(e); }
PFK_HD double log1p_unit(double e) { return ::log1p(e); }
#if !defined(__CUDACC__)
template <class T>
PFK_HD Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> s = e / (e + T(2));
  const Vec<T> z = s * s;
  if constexpr (sizeof(T) == 4) {  // relative error 4.1e-9
    return s * polynomial(z, {2.00000000768f, 0.666663216414f, 0.400245952307f, 0.279651577452f,
                              0.281577783631f});
  } else {  // 9.4e-22
    return s * polynomial(z, {2.0, 0.666666666666666661, 0.40000000000000268, 0.285714285713756515,
                              0.22222222227641732, 0.181818178521812272, 0.15384628221264642,
                              0.133329995203851707, 0.117706185552483092, 0.104549475155308627,
                              0.100981854686340596, 0.0578540899766765006, 0.160725661346782718});
  }
}
#endif

// softplus with its slope.
template <class V>
PFK_HD Softplus<V> softplus_with_slope(V x) {
  const V e = exp2_below(abs_(x) * V(Lane<V>(-1.44269504088896340736)));
  return softplus_from(x, e, log1p_unit(e));
}

PFK_END
