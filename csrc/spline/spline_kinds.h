// SPDX-License-Identifier: Apache-2.0
// A spline of a kind that the kernel is compiled for.
#pragma once

#include <type_traits>

#include "spline/spline_cubic.h"
#include "spline/spline_linear.h"
#include "spline/spline_quadratic.h"
#include "spline/spline_rational.h"

PFK_BEGIN

template <int kKind, class C, class V, class Tile>
PFK_HD SplineValue<V> spline_apply(const SplineMap<Lane<V>>& m, Tile& t, V v) {
  if constexpr (kKind == kRational) {
    return rational_apply<C>(m, t, v);
  } else if constexpr (kKind == kLinearSpline) {
    return linear_apply(m, t, v);
  } else if constexpr (kKind == kQuadratic) {
    return quadratic_apply(m, t, v);
  } else {
    return cubic_apply(m, t, v);
  }
}

// Returns the gradient of the input; those of the raw parameters replace these in the tile.
template <int kKind, class C, class V, class Tile>
PFK_HD V spline_vjp(const SplineMap<Lane<V>>& m, Tile& t, V v, V grad_out, V grad_log) {
  if constexpr (kKind == kRational) {
    return rational_vjp<C>(m, t, v, grad_out, grad_log);
  } else if constexpr (kKind == kLinearSpline) {
    return linear_vjp(m, t, v, grad_out, grad_log);
  } else if constexpr (kKind == kQuadratic) {
    return quadratic_vjp(m, t, v, grad_out, grad_log);
  } else {
    return cubic_vjp(m, t, v, grad_out, grad_log);
  }
}

// Calls f with the kind of spline as a constant.
template <class F>
PFK_HD void with_spline_kind(int kind, F f) {
  switch (kind) {
    case kLinearSpline:
      return f(std::integral_constant<int, kLinearSpline>{});
    case kQuadratic:
      return f(std::integral_constant<int, kQuadratic>{});
    case kCubic:
      return f(std::integral_constant<int, kCubic>{});
    default:
      return f(std::integral_constant<int, kRational>{});
  }
}

PFK_END
