// SPDX-License-Identifier: Apache-2.0
// Elementary functions for scalars and Vecs under the same names (exp_, log_, ...).
//
// Scalars use the standard library (on a GPU, CUDA's).  Vecs use polynomials fitted here by
// Chebyshev interpolation in 60-digit arithmetic; the relative error of each fit stands beside its
// coefficients and the error of the whole function, in units in the last place, is held by
// tests/core/test_math.py.  NaN passes through every function; no function relies on fast-math.
#pragma once

#include <math.h>

#include "core/vec.h"

PFK_BEGIN

// ---- scalars ------------------------------------------------------------------------------------
PFK_HD float exp_(float x) { return ::expf(x); }
PFK_HD double exp_(double x) { return ::exp(x); }
PFK_HD float expm1_(float x) { return ::expm1f(x); }
PFK_HD double expm1_(double x) { return ::expm1(x); }
PFK_HD float log_(float x) { return ::logf(x); }
PFK_HD double log_(double x) { return ::log(x); }
PFK_HD float log1p_(float x) { return ::log1pf(x); }
PFK_HD double log1p_(double x) { return ::log1p(x); }
PFK_HD float atan_(float x) { return ::atanf(x); }
PFK_HD double atan_(double x) { return ::atan(x); }
PFK_HD float asinh_(float x) { return ::asinhf(x); }
PFK_HD double asinh_(double x) { return ::asinh(x); }
PFK_HD float abs_(float x) { return ::fabsf(x); }
PFK_HD double abs_(double x) { return ::fabs(x); }
PFK_HD float copysign_(float x, float s) { return ::copysignf(x, s); }
PFK_HD double copysign_(double x, double s) { return ::copysign(x, s); }
PFK_HD float sqrt_(float x) { return ::sqrtf(x); }
PFK_HD double sqrt_(double x) { return ::sqrt(x); }
PFK_HD float floor_(float x) { return ::floorf(x); }
PFK_HD double floor_(double x) { return ::floor(x); }

template <class V>
PFK_HD V max_(V a, V b) {  // NaN in a is returned
  return select(a < b, b, a);
}
template <class V>
PFK_HD V min_(V a, V b) {
  return select(a > b, b, a);
}

// c[0] + x (c[1] + x (...)), unrolled at compile time.
template <class V, int n>
PFK_HD V polynomial(V x, const Lane<V> (&c)[n]) {
  V r = c[n - 1];
  PFK_UNROLL(16)
  for (int i = n - 2; i >= 0; --i) r = r * x + V(c[i]);
  return r;
}

#if !defined(__CUDACC__)

// One instruction, where the compiler makes two of the above.  It returns its second operand if
// either is NaN.
#if PFK_SIMD_LEVEL == 1
PFK_HD Vec<float> max_(Vec<float> a, Vec<float> b) { return __builtin_ia32_maxps256(b.v, a.v); }
PFK_HD Vec<float> min_(Vec<float> a, Vec<float> b) { return __builtin_ia32_minps256(b.v, a.v); }
PFK_HD Vec<double> max_(Vec<double> a, Vec<double> b) { return __builtin_ia32_maxpd256(b.v, a.v); }
PFK_HD Vec<double> min_(Vec<double> a, Vec<double> b) { return __builtin_ia32_minpd256(b.v, a.v); }
#endif

// ---- bits ---------------------------------------------------------------------------------------
template <class T>
struct Float;  // layout of a binary floating-point number
template <>
struct Float<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int32_t kSignBit = INT32_MIN;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr float kExpMin = -104.0f, kExpMax = 89.0f;  // beyond, exp is 0 and inf
  static constexpr float kTiny = 1.17549435e-38f, kTinyScale = 16777216.0f;
  static constexpr int kTinyShift = 24;
};
template <>
struct Float<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int64_t kSignBit = INT64_MIN;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpMin = -746.0, kExpMax = 710.0;
  static constexpr double kTiny = 2.2250738585072014e-308, kTinyScale = 18014398509481984.0;
  static constexpr int kTinyShift = 54;
};

template <class T>
PFK_HD typename Vec<T>::RawInt bits(Vec<T> x) {
  return (typename Vec<T>::RawInt)x.v;
}
template <class T>
PFK_HD Vec<T> from_bits(typename Vec<T>::RawInt i) {
  return Vec<T>((typename Vec<T>::Raw)i);
}
// Sums and differences of bits wrap: those of NaN, or of numbers that a formula is not for, may be
// any, and integers with a sign must not overflow.
template <class T>
PFK_HD typename Vec<T>::RawInt plus_bits(typename Vec<T>::RawInt a, typename Vec<T>::RawInt b) {
  using Word = typename Vec<T>::RawWord;
  return (typename Vec<T>::RawInt)((Word)a + (Word)b);
}
template <class T>
PFK_HD typename Vec<T>::RawInt minus_bits(typename Vec<T>::RawInt a, typename Vec<T>::RawInt b) {
  using Word = typename Vec<T>::RawWord;
  return (typename Vec<T>::RawInt)((Word)a - (Word)b);
}

template <class T>
PFK_HD Vec<T> abs_(Vec<T> x) {
  return from_bits<T>(bits(x) & ~Float<T>::kSignBit);
}
template <class T>
PFK_HD Vec<T> copysign_(Vec<T> x, Vec<T> s) {
  return from_bits<T>((bits(x) & ~Float<T>::kSignBit) | (bits(s) & Float<T>::kSignBit));
}
template <class T>
PFK_HD Vec<T> sqrt_(Vec<T> x) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kLanes; ++i) {
    r.v[i] = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(x.v[i]))
                            : static_cast<T>(__builtin_sqrt(x.v[i]));
  }
  return r;
}
template <class T>
PFK_HD Vec<T> floor_(Vec<T> x) {
  const Vec<T> big = Float<T>::kRound / T(1.5);  // from there on every number is an integer
  const Vec<T> r = (x + copysign_(big, x)) - copysign_(big, x);
  return select(abs_(x) < big, select(r > x, r - T(1), r), x);
}

// 2^k for integer lanes that hold k as rounded bits of (k + kRound).
template <class T>
PFK_HD Vec<T> two_to(typename Vec<T>::RawInt k) {
  const typename Vec<T>::RawInt bias = typename Vec<T>::RawInt{} + Float<T>::kBias;
  return from_bits<T>(plus_bits<T>(k, bias) << Float<T>::kMantissa);
}

// ---- exponential --------------------------------------------------------------------------------
// x = k ln 2 + r with |r| <= ln(2)/2, and e^r - 1 = r + r^2 q(r).
template <class T>
struct Reduced {
  Vec<T> em1;  // e^r - 1
  typename Vec<T>::RawInt k;
};

template <class T>
PFK_HD Reduced<T> reduce_exp(Vec<T> x) {
  using F = Float<T>;
  const Vec<T> shifted = x * T(1.44269504088896340736) + Vec<T>(F::kRound);
  const Vec<T> k = shifted - F::kRound;
  const Vec<T> r = (x - k * F::kLn2Hi) - k * F::kLn2Lo;
  Vec<T> q;
  const Vec<T> r2 = r * r;
  if constexpr (sizeof(T) == 4) {  // relative error of q 9e-8, of e^r below 7e-9; short chains
    q = (r * 0.166665769897f + Vec<T>(0.5f)) +
        r2 * ((r * 0.00836317905272f + Vec<T>(0.0416665546172f)) + r2 * 0.00139261835877f);
  } else {  // 4e-20
    q = polynomial(r, {0.5, 0.166666666666666667, 0.0416666666666666768, 0.00833333333333333401,
                       0.0013888888888879074, 0.000198412698412632991, 2.48015873364422379e-5,
                       2.75573192472187308e-6, 2.75572632790884969e-7, 2.50520710942935468e-8,
                       2.09181377376427364e-9, 1.60866279567803688e-10});
  }
  return {r + r2 * q, minus_bits<T>(bits(shifted), bits(Vec<T>(F::kRound)))};
}

template <class T>
PFK_HD Vec<T> exp_(Vec<T> x) {
  using F = Float<T>;
  x = max_(min_(x, Vec<T>(F::kExpMax)), Vec<T>(F::kExpMin));
  const Reduced<T> e = reduce_exp(x);
  // multiplied by two powers of two: one alone would be out of range where the result is subnormal
  const typename Vec<T>::RawInt half = e.k >> 1;
  return (e.em1 + T(1)) * two_to<T>(half) * two_to<T>(minus_bits<T>(e.k, half));
}

// e^x - 1 = 2^k (e^r - 1) + (2^k - 1): exact where it matters, at k = 0.  Infinite from 88
// (float32) or 709 on.
template <class T>
PFK_HD Vec<T> expm1_(Vec<T> x) {
  using F = Float<T>;
  const T top = F::kExpMax - T(1);
  const Vec<T> c = select(x > top, Vec<T>(top), select(x < T(-40), Vec<T>(T(-40)), x));
  const Reduced<T> e = reduce_exp(c);
  const Vec<T> scale = two_to<T>(e.k);
  const Vec<T> r = e.em1 * scale + (scale - T(1));
  return select(x > top, Vec<T>(T(INFINITY)), r);
}

// ---- logarithm ----------------------------------------------------------------------------------
// x = 2^e m with m in [sqrt(1/2), sqrt(2)), f = m - 1, s = f / (2 + f), log(1 + f) = f - (f^2/2 - s
// (f^2/2 + R(s^2))).
template <class T>
PFK_HD Vec<T> log_(Vec<T> x) {
  using F = Float<T>;
  const Mask<T> tiny = x < F::kTiny;
  const Vec<T> scaled = select(tiny, x * F::kTinyScale, x);
  const T root_half = T(0.70710678118654752440);
  typename Vec<T>::RawInt i = bits(scaled);
  const typename Vec<T>::RawInt offset = minus_bits<T>(i, bits(Vec<T>(root_half)));
  const typename Vec<T>::RawInt e = offset >> F::kMantissa;
  const Vec<T> m = from_bits<T>(minus_bits<T>(i, e << F::kMantissa));
  const Vec<T> f = m - T(1);
  const Vec<T> s = f / (f + T(2));
  const Vec<T> z = s * s;
  Vec<T> r;
  if constexpr (sizeof(T) == 4) {  // relative error 1.8e-9
    r = polynomial(z, {0.666666665498831766f, 0.400001255945543671f, 0.285503969596180136f,
                       0.233419433887145609f});
  } else {  // 3.3e-18
    r = polynomial(
        z, {0.666666666666666664, 0.400000000000009413, 0.285714285707644501, 0.222222224005477573,
            0.181817947008977996, 0.15386290534658992, 0.132674185964748834, 0.131007213835034914});
  }
  const Vec<T> half_square = f * f * T(0.5);
  const Vec<T> k = __builtin_convertvector(e, typename Vec<T>::Raw) -
                   select(tiny, Vec<T>(T(F::kTinyShift)), Vec<T>(T(0))).v;
  Vec<T> y = k * F::kLn2Hi - ((half_square - (s * (half_square + z * r) + k * F::kLn2Lo)) - f);
  y = select(x == T(0), Vec<T>(T(-INFINITY)), y);
  y = select(x == T(INFINITY), x, y);
  return select(x >= T(0), y, Vec<T>(T(NAN)));
}

// log(1 + x), corrected for the rounding error of 1 + x.
template <class T>
PFK_HD Vec<T> log1p_(Vec<T> x) {
  const Vec<T> u = x + T(1);
  const Vec<T> lost = x - (u - T(1));
  const Vec<T> y = log_(u) + select(mask_and(u > T(0), u < T(INFINITY)), lost / u, Vec<T>(T(0)));
  return select(abs_(x) < Float<T>::kTiny, x, y);
}

// ---- inverse hyperbolic sine --------------------------------------------------------------------
// asinh|x| = log(1 + |x| + x^2 / (1 + sqrt(1 + x^2))), and log(|x| / 2) + 2 ln 2 where x^2 may be
// infinite.
template <class T>
PFK_HD Vec<T> asinh_(Vec<T> x) {
  const Vec<T> a = abs_(x), one = T(1), zero = T(0);
  const Mask<T> large = a > T(1e18);
  const Vec<T> b = select(large, one, a), square = b * b;
  const Vec<T> inner = select(large, a * T(0.5), b + square / (one + sqrt_(one + square)));
  return copysign_(log1p_(inner) + select(large, Vec<T>(T(1.38629436111989061883)), zero), x);
}

// ---- arc tangent --------------------------------------------------------------------------------
// One division brings |x| into [-tan(pi/8), tan(pi/8)]: atan x = base + atan(num / den).
template <class T>
PFK_HD Vec<T> atan_(Vec<T> x) {
  const Vec<T> a = abs_(x);
  const Mask<T> high = a > T(2.41421356237309504880), middle = a > T(0.41421356237309504880);
  const Vec<T> one = T(1), zero = T(0);
  const Vec<T> num = select(high, -one, select(middle, a - one, a));
  const Vec<T> den = select(high, a, select(middle, a + one, one));
  const Vec<T> base = select(high, Vec<T>(T(1.57079632679489661923)),
                             select(middle, Vec<T>(T(0.78539816339744830962)), zero));
  const Vec<T> t = num / den;
  const Vec<T> z = t * t;
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {  // relative error 6.3e-10
    p = polynomial(z, {0.999999999370875859f, -0.333333068808740647f, 0.199981823843304346f,
                       -0.14239520496655996f, 0.105697380249157379f, -0.0602607097050497562f});
  } else {  // 4.6e-20
    p = polynomial(z, {1.0, -0.333333333333333242, 0.199999999999970109, -0.142857142853293587,
                       0.111111110853012387, -0.0909090805829840951, 0.0769228108367890092,
                       -0.0666620502317809166, 0.0587683170984274969, -0.0521729791965505925,
                       0.0449944150674960439, -0.033386452259033169, 0.0151123764314951695});
  }
  return copysign_(base + t * p, x);
}

#endif  // !__CUDACC__

// ---- logarithm of positive normal numbers ------------------------------------------------------

// The two sides of a sigmoid are such numbers nearly always.  Without the special cases and the
// division of log_ a vector of 8 takes 12 cycles on Zen 3 in place of 20.  For other numbers the
// result means nothing.
template <class V>
PFK_HD V log_normal(V x) {
#if !defined(__CUDACC__)
  if constexpr (sizeof(V) == sizeof(Vec<float>) && sizeof(Lane<V>) == 4 && sizeof(V) > 4) {
    // x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), log(1 + f) = f - f^2 / 2 + f^3 r(f); relative
    // error 3.4e-9
    using F = Float<float>;
    const typename V::RawInt i = bits(x);
    const typename V::RawInt e =
        minus_bits<float>(i, bits(V(0.70710678118654752440f))) >> F::kMantissa;
    const V f = from_bits<float>(minus_bits<float>(i, e << F::kMantissa)) - V(1.0f), square = f * f;
    const V r =
        polynomial(f, {0.333333313f, -0.24999997f, 0.200007156f, -0.166678026f, 0.142490581f,
                       -0.124256872f, 0.116854198f, -0.114797339f, 0.0697161183f});
    const V k = __builtin_convertvector(e, typename V::Raw);
    return k * V(F::kLn2Hi) + (f + (f * square * r + k * V(F::kLn2Lo) - square * V(0.5f)));
  }
#endif
  return log_(x);
}

// ---- sine and cosine of |x| <= pi / 4
// ------------------------------------------------------------
template <class V>
struct SinCos {
  V sin, cos;
};
template <class V>
PFK_HD SinCos<V> sincos_small(V x) {
  const V z = x * x;
  V s, c;                                // sin x = x + x z s(z), cos x = 1 - z / 2 + z^2 c(z)
  if constexpr (sizeof(Lane<V>) == 4) {  // relative errors 1.4e-8 and 1.1e-9
    s = polynomial(z, {-0.166666646617146985f, 0.00833274815408503215f, -0.000195878657021018751f});
    c = polynomial(z, {0.0416666646589014037f, -0.00138883029191136328f, 2.45479168536910169e-5f});
  } else {  // 1.4e-17 and 6.9e-19
    s = polynomial(z, {-0.166666666666666646, 0.00833333333333094729, -0.000198412698367567725,
                       2.75573161016178744e-6, -2.50511316502351815e-8, 1.59181152632659752e-10});
    c = polynomial(z, {0.0416666666666666654, -0.00138888888888873965, 2.48015872987645608e-5,
                       -2.7557317271145146e-7, 2.08761461465586116e-9, -1.13826236474746046e-11});
  }
  using T = Lane<V>;
  return {x + x * (z * s), V(T(1)) - (z * V(T(0.5)) - z * z * c)};
}

// ---- hyperbolic tangent, for scalars and Vecs --------------------------------------------------
template <class V>
struct Tanh {
  V value, slope;  // tanh x and 1 - tanh^2 x
};
// m = e^{2|x|} - 1, far from the ends of its range.
template <class T>
PFK_HD T expm1_of_tanh(T x) {
  return expm1_(x);
}
#if !defined(__CUDACC__)
template <class T>
PFK_HD Vec<T> expm1_of_tanh(Vec<T> x) {
  const Reduced<T> e = reduce_exp(x);
  const Vec<T> scale = two_to<T>(e.k);
  return e.em1 * scale + (scale - T(1));
}
#endif
template <class V>
PFK_HD V tanh_exponential(V x) {
  using T = Lane<V>;
  const V a = min_(abs_(x), V(T(43)));  // e^86 is still finite in float32; NaN passes
  return expm1_of_tanh(a + a);
}
// tanh|x| = m / (m + 2) and, as 1 - tanh|x| = 2 / (m + 2), sech^2 x = (1 + tanh|x|) 2 / (m + 2):
// neither with cancellation.
template <class V>
PFK_HD Tanh<V> tanh_from(V x, V m) {
  using T = Lane<V>;
  const V inverse = V(T(1)) / (m + V(T(2)));
  const V value = m * inverse, rest = inverse + inverse;
  return {copysign_(value, x), rest + value * rest};
}
template <class V>
PFK_HD Tanh<V> tanh_(V x) {
  return tanh_from(x, tanh_exponential(x));
}

PFK_END
