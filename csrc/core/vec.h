// SPDX-License-Identifier: Apache-2.0
// Vec<T>: as many lanes as a register of the SIMD level holds, by the compiler's vector extensions.
// The formulas of every family are templates of a value type, which is a scalar (CUDA, tests) or a
// Vec (CPU); in place of branches they use select().  This header gives both types the same
// functions.
#pragma once

#include <stdint.h>
#include <string.h>

#ifndef PFK_SIMD_NAMESPACE
#define PFK_SIMD_NAMESPACE baseline
#define PFK_SIMD_LEVEL 0
#endif

#if defined(__CUDACC__)
#define PFK_HD __host__ __device__ __forceinline__
#else
#define PFK_HD inline __attribute__((always_inline))
#endif

#define PFK_BEGIN \
  namespace pfk { \
  inline namespace PFK_SIMD_NAMESPACE {
#define PFK_END \
  }             \
  }

// Loops whose bodies are to be written out n times: by every compiler, or on the CPU alone.
#define PFK_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#define PFK_UNROLL(n) PFK_PRAGMA(unroll n)
#define PFK_UNROLL_ON_CPU(n)
#else
#define PFK_UNROLL(n) PFK_PRAGMA(GCC unroll n)
#define PFK_UNROLL_ON_CPU(n) PFK_UNROLL(n)
#endif

PFK_BEGIN

template <class T>
PFK_HD const T* typed(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
PFK_HD T* typed(void* p) {
  return static_cast<T*>(p);
}

// ---- scalars ------------------------------------------------------------------------------------
template <class V>
struct LaneOf {
  using type = V;
};
template <class V>
using Lane = typename LaneOf<V>::type;

template <class T>
PFK_HD T select(bool c, T a, T b) {
  return c ? a : b;
}
PFK_HD bool mask_and(bool a, bool b) { return a && b; }
PFK_HD bool mask_or(bool a, bool b) { return a || b; }

#if !defined(__CUDACC__)

#if PFK_SIMD_LEVEL == 2
constexpr int kVecBytes = 64;
#elif PFK_SIMD_LEVEL == 1
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
struct VecTypes;  // one for each type: GCC takes a vector type that depends on T for T itself
template <>
struct VecTypes<float> {
  typedef float Raw __attribute__((vector_size(kVecBytes)));
  typedef int32_t RawInt __attribute__((vector_size(kVecBytes)));
  typedef uint32_t RawWord __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<double> {
  typedef double Raw __attribute__((vector_size(kVecBytes)));
  typedef int64_t RawInt __attribute__((vector_size(kVecBytes)));
  typedef uint64_t RawWord __attribute__((vector_size(kVecBytes)));
};

// ---- vectors ------------------------------------------------------------------------------------
template <class T>
struct Vec {
  using Raw = typename VecTypes<T>::Raw;
  using RawInt = typename VecTypes<T>::RawInt;
  using RawWord = typename VecTypes<T>::RawWord;
  static constexpr int kLanes = kVecBytes / sizeof(T);

  Raw v;

  Vec() = default;
  PFK_HD Vec(Raw r) : v(r) {}
  PFK_HD Vec(T s) : v(s - Raw{}) {}

  static PFK_HD Vec load(const T* p) {
    Vec r;
    memcpy(&r.v, p, kVecBytes);
    return r;
  }
  PFK_HD void store(T* p) const { memcpy(p, &v, kVecBytes); }
};

template <class T>
struct LaneOf<Vec<T>> {
  using type = T;
};

// All-ones or all-zeros lanes, as the compiler's comparisons produce them.
template <class T>
struct Mask {
  typename Vec<T>::RawInt m;
  // One byte per lane, nonzero is true.
  static PFK_HD Mask load(const uint8_t* p) {
    typename Vec<T>::RawInt wide;
    for (int i = 0; i < Vec<T>::kLanes; ++i) wide[i] = p[i];
    return {wide != 0};
  }
};

#define PFK_VEC_OPERATOR(op)                      \
  template <class T>                              \
  PFK_HD Vec<T> operator op(Vec<T> a, Vec<T> b) { \
    return a.v op b.v;                            \
  }                                               \
  template <class T>                              \
  PFK_HD Vec<T> operator op(Vec<T> a, T b) {      \
    return a op Vec<T>(b);                        \
  }                                               \
  template <class T>                              \
  PFK_HD Vec<T> operator op(T a, Vec<T> b) {      \
    return Vec<T>(a) op b;                        \
  }
PFK_VEC_OPERATOR(+)
PFK_VEC_OPERATOR(-)
PFK_VEC_OPERATOR(*)
PFK_VEC_OPERATOR(/)
#undef PFK_VEC_OPERATOR

template <class T>
PFK_HD Vec<T> operator-(Vec<T> a) {
  return -a.v;
}
template <class T>
PFK_HD Vec<T>& operator+=(Vec<T>& a, Vec<T> b) {
  a.v += b.v;
  return a;
}

#define PFK_VEC_COMPARE(op)                        \
  template <class T>                               \
  PFK_HD Mask<T> operator op(Vec<T> a, Vec<T> b) { \
    return {a.v op b.v};                           \
  }                                                \
  template <class T>                               \
  PFK_HD Mask<T> operator op(Vec<T> a, T b) {      \
    return {a.v op Vec<T>(b).v};                   \
  }
PFK_VEC_COMPARE(<)
PFK_VEC_COMPARE(>)
PFK_VEC_COMPARE(<=)
PFK_VEC_COMPARE(>=)
PFK_VEC_COMPARE(==)
#undef PFK_VEC_COMPARE

template <class T>
PFK_HD Mask<T> mask_and(Mask<T> a, Mask<T> b) {
  return {a.m & b.m};
}
template <class T>
PFK_HD Mask<T> mask_or(Mask<T> a, Mask<T> b) {
  return {a.m | b.m};
}
template <class T>
PFK_HD Vec<T> select(Mask<T> c, Vec<T> a, Vec<T> b) {
  return c.m ? a.v : b.v;
}

template <class T>
PFK_HD bool any_lane(Mask<T> c) {
  int64_t found = 0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) found |= c.m[i];
  return found != 0;
}

// Sum of the lanes in a fixed order, in double.
template <class T>
PFK_HD double sum_lanes(Vec<T> a) {
  double pair[4] = {0, 0, 0, 0};
  for (int i = 0; i < Vec<T>::kLanes; ++i) pair[i & 3] += static_cast<double>(a.v[i]);
  return (pair[0] + pair[1]) + (pair[2] + pair[3]);
}

#endif  // !__CUDACC__

// What comparing two values gives: a bool, or a Mask.
template <class V>
using MaskOf = decltype(V() < V());

PFK_END
