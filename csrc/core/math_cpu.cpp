// SPDX-License-Identifier: Apache-2.0
// The Vec functions of math.h over arrays, called by the accuracy tests through ctypes at every
// SIMD level.
#include "core/activations.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void math_probe_f32(int, const float*, float*, int64_t);
                   void math_probe_f64(int, const double*, double*, int64_t))

PFK_BEGIN

template <class T>
static Vec<T> probe(int function, Vec<T> x) {
  switch (function) {
    case 0:
      return exp_(x);
    case 1:
      return expm1_(x);
    case 2:
      return log_(x);
    case 3:
      return log1p_(x);
    case 4:
      return atan_(x);
    case 5:
      return tanh_(x).value;
    case 6:
      return tanh_(x).slope;
    case 7:
      return sigmoid_(x);
    case 8:
      return softplus_(x);
    case 9:
      return floor_(x);
    case 10:
      return sqrt_(x);
    case 11:
      return log_normal(x);
    case 12:
      return sincos_small(x).sin;
    case 13:
      return sincos_small(x).cos;
    default:
      return asinh_(x);
  }
}

template <class T>
static void probe_all(int function, const T* x, T* y, int64_t n) {
  constexpr int w = Vec<T>::kLanes;
  T tail[w] = {};
  for (int64_t i = 0; i < n; i += w) {
    const int64_t m = n - i < w ? n - i : w;
    memcpy(tail, x + i, m * sizeof(T));
    probe(function, Vec<T>::load(tail)).store(tail);
    memcpy(y + i, tail, m * sizeof(T));
  }
}

void math_probe_f32(int function, const float* x, float* y, int64_t n) {
  probe_all(function, x, y, n);
}
void math_probe_f64(int function, const double* x, double* y, int64_t n) {
  probe_all(function, x, y, n);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#define PFK_EXPORT extern "C" __attribute__((visibility("default")))
PFK_EXPORT void pyflowkern_math_f32(int function, const float* x, float* y, int64_t n) {
  PFK_CALL_LEVEL(math_probe_f32, function, x, y, n);
}
PFK_EXPORT void pyflowkern_math_f64(int function, const double* x, double* y, int64_t n) {
  PFK_CALL_LEVEL(math_probe_f64, function, x, y, n);
}
#endif
