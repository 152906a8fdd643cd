// SPDX-License-Identifier: Apache-2.0
// The diagonal normal density, element by element, for scalars (CUDA) and Vecs (CPU).
//
//   d = (z - mean) e^-log_std,   log N(z) = -d^2 / 2 - log_std - log(2 pi) / 2
//
// The last constant, and the log_std that all samples share, are added once for a sample.
#pragma once

#include "core/codes.h"
#include "core/math.h"

namespace pfk {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

enum ParameterKind : int {
  kNone,
  kEvent,
  kElement
};  // none; shared by all samples; of each element

// Pointers are to elements of the storage type.  Parameters that all samples share, sums and
// log-dets have the type of the computation.
struct NormalArgs {
  int mean_kind, log_std_kind;
  int64_t rows, features;
  int64_t channels, space;
  bool channels_last;  // z and parameters of each element; shared ones are contiguous
  double constant;     // of a sample, without shared log_std
  const void *z, *mean, *log_std;
  const void* log_det;  // or null
  void* out;
  const void* grad;
  void *grad_z, *grad_mean, *grad_log_std;  // null if not wanted

  // The index in a shared parameter of the element at place i of a sample's memory.
#if defined(__CUDACC__)
  __host__ __device__
#endif
      int64_t shared_index(int64_t i) const {
    return channels_last ? i % channels * space + i / channels : i;
  }
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
