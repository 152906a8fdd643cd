// SPDX-License-Identifier: Apache-2.0
// Activations with their first and second derivatives, for scalars and Vecs: the one place of their
// formulas.  What a caller leaves unread, the compiler leaves out.
#pragma once

#include <type_traits>

#include "core/codes.h"
#include "core/math.h"

PFK_BEGIN

// ---- sigmoid and softplus -----------------------------------------------------------------------
// Both from e = exp(-|x|), which never overflows.
template <class V>
struct Sigmoid {
  V value, rest;  // sigmoid(x) and 1 - sigmoid(x), neither by subtraction
};
template <class V>
PFK_HD Sigmoid<V> sigmoid_from(V x, V e) {
  using T = Lane<V>;
  const V large = V(T(1)) / (V(T(1)) + e), small = e * large;
  const auto negative = x < V(T(0));
  return {select(negative, small, large), select(negative, large, small)};
}
template <class V>
PFK_HD V sigmoid_(V x) {
  return sigmoid_from(x, exp_(-abs_(x))).value;
}

template <class V>
struct Softplus {
  V value, slope;
};
template <class V>
PFK_HD Softplus<V> softplus_from(V x, V e, V log1p_e) {
  return {max_(x, V(Lane<V>(0))) + log1p_e, sigmoid_from(x, e).value};
}
template <class V>
PFK_HD Softplus<V> softplus_from(V x, V e) {
  return softplus_from(x, e, log1p_(e));
}
template <class V>
PFK_HD V softplus_(V x) {
  return softplus_from(x, exp_(-abs_(x))).value;
}

// ---- the normal distribution --------------------------------------------------------------------
// Phi(-x) for x >= 0.
PFK_HD float normal_tail(float x) { return 0.5f * ::erfcf(x * 0.70710678118654752440f); }
PFK_HD double normal_tail(double x) { return 0.5 * ::erfc(x * 0.70710678118654752440); }
#if !defined(__CUDACC__)
// (1 + 2 x) e^(x^2 / 2) Phi(-x) for x >= 0, as a polynomial in (x - centre) / (x + centre)
// (Shepherd and Laframboise 1981), to 2e-8 and 2e-17.  From kEnd on, Phi(-x) is zero.  Adding and
// subtracting kRounder rounds x to so few digits that its square is exact.
template <class T>
struct NormalTail;
template <>
struct NormalTail<float> {
  static constexpr float kCentre = 3, kEnd = 15, kRounder = 49152;
  static constexpr float kTerms[] = {0.850597651f,    0.0133491005f,    -0.156090223f,
                                     0.136540928f,    -0.0515817946f,   -0.000580623889f,
                                     0.00696262334f,  -0.000380511046f, -0.00107731175f,
                                     1.97201345e-06f, 0.000131346006f,  1.14178904e-05f};
};
template <>
struct NormalTail<double> {
  static constexpr double kCentre = 5, kEnd = 40, kRounder = 6442450944;
  static constexpr double kTerms[] = {
      0.84611235472506929,     -0.039647008404006111,   -0.054008075034077556,
      0.10088858203458727,     -0.10065743821670525,    0.07248782697502397,
      -0.039332201357163157,   0.015422845692508128,    -0.0035716954115872857,
      -0.00011869364958067348, 0.00042509568529797555,  -0.00010817646879708506,
      -2.6436294882238703e-05, 1.9389747606273739e-05,  5.3361170301456543e-07,
      -2.8583436753070545e-06, 1.7987739077791011e-07,  4.3194941270701092e-07,
      -4.2834524074568658e-08, -6.788340647682934e-08,  6.2043455585574289e-09,
      9.5754152130883462e-09,  -5.7641545972009118e-10, -8.2365522969944163e-10,
      2.2981126252889365e-11};
};

template <class T>
PFK_HD Vec<T> normal_tail(Vec<T> x) {
  using V = Vec<T>;
  using N = NormalTail<T>;
  constexpr int terms = sizeof(N::kTerms) / sizeof(T);
  x = min_(x, V(N::kEnd));
  const V u = (x - N::kCentre) / (x + N::kCentre);
  V p = N::kTerms[terms - 1];
  for (int i = terms - 2; i >= 0; --i) p = p * u + N::kTerms[i];
  // e^(-x^2 / 2) in two factors: the rounding error of x^2 would be multiplied by x^2
  const V high = (x + N::kRounder) - N::kRounder, rest = (x - high) * (x + high);
  return p * exp_(T(-0.5) * high * high) * exp_(T(-0.5) * rest) / (T(1) + T(2) * x);
}
#endif

// ---- activations --------------------------------------------------------------------------------
template <class V>
struct Curve {
  V value, slope, bend;  // f, f', f''
};

// ReLU alone, which networks apply without a derivative; NaN passes.
template <class V>
PFK_HD V relu_(V x) {
  return select(x < V(Lane<V>(0)), V(Lane<V>(0)), x);
}

template <Activation kActivation, class V>
PFK_HD Curve<V> activation_curve(V x) {
  using T = Lane<V>;
  using A = Activation;
  const V one = T(1), zero = T(0), two = T(2);
  if constexpr (kActivation == A::kRelu) {
    return {relu_(x), select(x > zero, one, zero), zero};
  } else if constexpr (kActivation == A::kLeakyRelu) {
    const V slope = select(x < zero, V(T(0.01)), one);
    return {x * slope, slope, zero};
  } else if constexpr (kActivation == A::kElu) {
    const V below = expm1_(min_(x, zero));
    const auto negative = x < zero;
    return {select(negative, below, x), select(negative, below + one, one),
            select(negative, below + one, zero)};
  } else if constexpr (kActivation == A::kTanh) {
    const Tanh<V> t = tanh_(x);
    return {t.value, t.slope, V(T(-2)) * t.value * t.slope};
  } else if constexpr (kActivation == A::kGelu) {
    const V tail = normal_tail(abs_(x));  // Phi(-|x|)
    const V cdf = select(x < zero, tail, one - tail);
    // the density is zero long before this bound, beyond which x^2 may be infinite
    const V square = min_(x * x, V(T(4000)));
    const V density = V(T(0.39894228040143267794)) * exp_(V(T(-0.5)) * square);
    return {x * cdf, cdf + x * density, density * (two - square)};
  } else if constexpr (kActivation == A::kIdentity) {
    return {x, one, zero};
  } else {
    const V e = exp_(-abs_(x));
    const Sigmoid<V> s = sigmoid_from(x, e);
    const V q = s.value, rest = s.rest;
    if constexpr (kActivation == A::kSigmoid) {
      return {q, q * rest, q * rest * (rest - q)};
    } else if constexpr (kActivation == A::kSoftplus) {
      return {softplus_from(x, e).value, q, q * rest};
    } else {
      return {x * q, q * (one + x * rest), q * rest * (two + x * (rest - q))};
    }
  }
}

// tanh and softplus determine their derivatives: f' and f'' / f' from h = f(x).
template <class V>
struct Derivatives {
  V slope, bend_by_slope;
};
constexpr bool follow_from_value(Activation activation) {
  return activation == Activation::kTanh || activation == Activation::kSoftplus;
}
template <Activation kActivation, class V>
PFK_HD Derivatives<V> derivatives_from_value(V h) {
  using T = Lane<V>;
  static_assert(follow_from_value(kActivation));
  if constexpr (kActivation == Activation::kTanh) {
    return {(V(T(1)) - h) * (V(T(1)) + h), V(T(-2)) * h};
  } else {
    return {-expm1_(-h), exp_(-h)};
  }
}

// Calls f with the activation as a constant.
template <class F>
PFK_HD void with_activation(Activation activation, F f) {
  using A = Activation;
  switch (activation) {
    case A::kRelu:
      return f(std::integral_constant<A, A::kRelu>{});
    case A::kLeakyRelu:
      return f(std::integral_constant<A, A::kLeakyRelu>{});
    case A::kElu:
      return f(std::integral_constant<A, A::kElu>{});
    case A::kTanh:
      return f(std::integral_constant<A, A::kTanh>{});
    case A::kSigmoid:
      return f(std::integral_constant<A, A::kSigmoid>{});
    case A::kSilu:
      return f(std::integral_constant<A, A::kSilu>{});
    case A::kGelu:
      return f(std::integral_constant<A, A::kGelu>{});
    case A::kSoftplus:
      return f(std::integral_constant<A, A::kSoftplus>{});
    default:
      return f(std::integral_constant<A, A::kIdentity>{});
  }
}

PFK_END
