// SPDX-License-Identifier: Apache-2.0
// The two sums over the stages of an explicit Runge-Kutta step (Hairer, Norsett and Wanner 1993,
// II.4), element by element:
//
//   combination  y + h sum_i w_i k_i,
//   error        r = h sum_i e_i k_i / (atol + rtol max(|y|, |y1|)),
//
// of which the root of the mean square is taken, for each row that has a step h of its own and for
// each segment of it.  r is NaN where y1 is not finite.  A weight of zero leaves its slope unread,
// so that what it holds, NaN and inf included, has no part in the sum.
//
// The last slope that the field returned is "fresh": it lies in memory of the field.  The pass that
// reads it first also copies it to its row of the buffer of slopes.
#pragma once

#include "core/math.h"

namespace pfk {

constexpr int kMaxSlopes = 32, kMaxSegments = 16;

// Pointers are to elements of the state's type.
struct RungeKuttaArgs {
  int64_t rows, features;  // of the state; a row may have its own step
  int count;               // slopes whose weight is not zero, without the fresh one
  const void* slopes[kMaxSlopes];
  double weights[kMaxSlopes];
  const void* fresh;  // or null
  void* kept;         // its row of the buffer
  double fresh_weight;
  const void *y, *y1;
  void* out;            // of the combination
  double step;          // of all rows, if steps is null
  const double* steps;  // on the device: one for each row, or one for all
  bool each_row;
  double rtol, atol;
  int segments, counted;  // of a row; those that are not counted have no part in the error
  int64_t begins[kMaxSegments + 1];  // of the segments, then the end of the row

#if defined(__CUDACC__)
  __host__ __device__
#endif
      double step_of(int64_t row) const {
    return steps == nullptr ? step : steps[each_row ? row : 0];
  }
};

}  // namespace pfk

PFK_BEGIN

template <class V>
PFK_HD V runge_kutta_ratio(V change, V y, V y1, V rtol, V atol) {
  // y - y is 0, or NaN where the maximum or an infinite scale would hide a bad state
  return change / (atol + rtol * max_(abs_(y1), abs_(y))) + (y1 - y1) + (y - y);
}

// The largest norm of segments so far, given one more; NaN stays NaN.
PFK_HD double runge_kutta_largest(double largest, double squares, int64_t length) {
  const double norm = length > 0 ? sqrt_(squares / static_cast<double>(length)) : 0.0;
  return norm <= largest ? largest : norm == norm && largest != largest ? largest : norm;
}

PFK_END
