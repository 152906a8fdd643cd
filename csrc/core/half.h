// SPDX-License-Identifier: Apache-2.0
// 16-bit storage on the CPU: loaded to float, computed in float, rounded to nearest even on the way
// back. gather/scatter move a run of elements, any storage type and stride, between memory and a
// block buffer in L1.
#pragma once

#include "core/dtype.h"
#include "core/vec.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

PFK_BEGIN

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f with a value of the storage type that dtype names.
template <class F>
static PFK_HD void each_dtype(DType dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(float{});
    case kFloat64:
      return f(double{});
    case kBFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

static PFK_HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static PFK_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static PFK_HD float widen(float x) { return x; }
static PFK_HD double widen(double x) { return x; }
static PFK_HD float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
static PFK_HD float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // 2^112 moves the 5-bit exponent to the 8-bit one, subnormals included
  const float scaled = bits_to_float(rest << 13) * bits_to_float(0x77800000u);
  const uint32_t value = rest >= 0x7c00u ? (0x7f800000u | (rest << 13)) : float_to_bits(scaled);
  return bits_to_float(sign | value);
#endif
}

static PFK_HD void narrow(float x, float* p) { *p = x; }
static PFK_HD void narrow(double x, double* p) { *p = x; }
static PFK_HD void narrow(float x, BFloat16* p) {
  const uint32_t u = float_to_bits(x);
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
  p->bits =
      static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded >> 16);
}
static PFK_HD void narrow(float x, Float16* p) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t h;
  if (rest >= 0x7f800000u) {
    h = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (rest >= 0x477ff000u) {
    h = 0x7c00u;  // rounds beyond the largest finite half
  } else if (rest < 0x38800000u) {
    // below 2^-14: let a float addition round to the spacing of the subnormals
    h = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    h = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | h);
#endif
}

template <class S, class T>
static inline void gather(const S* from, int64_t step, int64_t count, T* to) {
  if (step == 1) {
    if constexpr (sizeof(S) == sizeof(T)) {
      memcpy(to, from, count * sizeof(T));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * step]);
  }
}

template <class S, class T>
static inline void scatter(const T* from, int64_t step, int64_t count, S* to) {
  if (step == 1) {
    if constexpr (sizeof(S) == sizeof(T)) {
      memcpy(to, from, count * sizeof(T));
    } else {
      for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i * step);
  }
}

// As many 16-bit values as a vector of floats has lanes: without this the compiler converts them
// one by one.
constexpr int kHalfLanes = Vec<float>::kLanes;
typedef uint16_t HalfLanes __attribute__((vector_size(2 * kHalfLanes)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * kHalfLanes)));

static PFK_HD Vec<float> widen_lanes(const BFloat16* p) {
  HalfLanes h;
  memcpy(&h, p, sizeof(h));
  return Vec<float>((Vec<float>::Raw)(__builtin_convertvector(h, WordLanes) << 16));
}
static PFK_HD void narrow_lanes(Vec<float> x, BFloat16* p) {
  const WordLanes u = (WordLanes)x.v;
  const WordLanes rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet = u | 0x400000u;
  const WordLanes chosen = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  const HalfLanes h = __builtin_convertvector(chosen >> 16, HalfLanes);
  memcpy(p, &h, sizeof(h));
}
#if defined(__F16C__)
static PFK_HD Vec<float> widen_lanes(const Float16* p) {
  float lanes[kHalfLanes];
  for (int i = 0; i < kHalfLanes; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
    _mm256_storeu_ps(lanes + i, _mm256_cvtph_ps(h));
  }
  return Vec<float>::load(lanes);
}
static PFK_HD void narrow_lanes(Vec<float> x, Float16* p) {
  float lanes[kHalfLanes];
  x.store(lanes);
  for (int i = 0; i < kHalfLanes; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(lanes + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), h);
  }
}
#else
static PFK_HD Vec<float> widen_lanes(const Float16* p) {
  float lanes[kHalfLanes];
  for (int i = 0; i < kHalfLanes; ++i) lanes[i] = widen(p[i]);
  return Vec<float>::load(lanes);
}
static PFK_HD void narrow_lanes(Vec<float> x, Float16* p) {
  float lanes[kHalfLanes];
  x.store(lanes);
  for (int i = 0; i < kHalfLanes; ++i) narrow(lanes[i], p + i);
}
#endif

// One Vec of any storage type; the _n forms touch n elements only and leave the other lanes zero.
template <class S>
static PFK_HD Vec<Compute<S>> load_vec(const S* p) {
  using T = Compute<S>;
  if constexpr (sizeof(S) == sizeof(T)) {
    return Vec<T>::load(reinterpret_cast<const T*>(p));
  } else {
    return widen_lanes(p);
  }
}
template <class S>
static PFK_HD void store_vec(Vec<Compute<S>> v, S* p) {
  using T = Compute<S>;
  if constexpr (sizeof(S) == sizeof(T)) {
    v.store(reinterpret_cast<T*>(p));
  } else {
    narrow_lanes(v, p);
  }
}
template <class S>
static PFK_HD Vec<Compute<S>> load_vec_n(const S* p, int n) {
  using T = Compute<S>;
  T lanes[Vec<T>::kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return Vec<T>::load(lanes);
}
template <class S>
static PFK_HD void store_vec_n(Vec<Compute<S>> v, S* p, int n) {
  using T = Compute<S>;
  T lanes[Vec<T>::kLanes];
  v.store(lanes);
  for (int i = 0; i < n; ++i) narrow(lanes[i], p + i);
}
template <class T>
static PFK_HD Mask<T> first_lanes(int n) {
  uint8_t flags[Vec<T>::kLanes];
  for (int i = 0; i < Vec<T>::kLanes; ++i) flags[i] = i < n;
  return Mask<T>::load(flags);
}

PFK_END
