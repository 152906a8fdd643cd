// SPDX-License-Identifier: Apache-2.0
// The diagonal normal density, element by element, for scalars (CUDA) and Vecs (CPU).
//
//   d = (z - mean) e^-log_std,   log N(z) = -d^2 / 2 - log_std - log(2 pi) / 2
//
// The last constant, and the log_std of an event, are added once for a sample.
#pragma once

#include "core/math.h"

namespace pfk {

enum ParameterKind : int { kNone, kEvent, kElement };  // none; alike for all samples; of every element
enum WantedGrads : int { kGradZ = 1, kGradMean = 2, kGradLogStd = 4 };

struct NormalArgs {
  int mean_kind, log_std_kind;
  double constant;  // of a sample, without what kEvent log_std add
  const void *z, *mean, *log_std;
  // kEvent parameters as a block reads them: whole rows repeated where features are few
  const void *event_mean, *event_scale;
  const void* log_det;  // may be null
  void* out;
  double* partial;  // forward: sums of chunks; backward: sums of row groups, [groups, 2, features]
  const void* grad;
  void *grad_z, *grad_mean, *grad_log_std;  // null if not wanted; kEvent ones come from partial
};

}  // namespace pfk

PFK_BEGIN

template <class V>
PFK_HD V normal_distance(V z, V mean, V inverse_std) {
  return (z - mean) * inverse_std;
}
template <class V>
PFK_HD V normal_term(V d) {
  using T = Lane<V>;
  return V(T(-0.5)) * d * d;
}

// For an upstream gradient g of the sample; the gradient of the mean is the negative of that of z.
template <class V>
struct NormalGrad {
  V z, log_std;
};
template <class V>
PFK_HD NormalGrad<V> normal_vjp(V d, V inverse_std, V g) {
  const V gd = g * d;
  return {-(gd * inverse_std), gd * d - g};
}

PFK_END
