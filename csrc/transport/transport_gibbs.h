// SPDX-License-Identifier: Apache-2.0
// Iterations over the kept Gibbs kernel of a small problem.
//
// With K_ij = exp((f_i + g_j - C_ij) / epsilon) in memory an iteration is a product with K and one
// with its transpose.  Both are one pass: while the rows of a group are still in L1 their sums give
// the new factors, with which the rows go into the sums of the columns.  Lower bound of its time: K
// is read once from L2, with two multiplications for each number; taking the powers of two anew is
// six times as much.
#pragma once

#include "core/rows.h"
#include "transport/transport_tiles.h"

PFK_BEGIN

namespace {

// Makes a block of rows of K.
template <class T>
void gibbs_block(const GibbsArgs& a, int64_t block) {
  const ScoreArgs& s = a.scores;
  const int64_t first = block * a.task, left = s.rows - first;
  const int64_t rows = left < a.task ? left : a.task, width = whole_panels<T>(s.columns);
  T* to = typed<T>(a.kernel) + first * a.row;
  if (!s.kept) fill_tile<T>(s, first, rows, 0, width, Rows<T>{to, a.row});
  for (int64_t r = 0; r < rows; ++r) {
    T* row = to + r * a.row;
    const T* from = s.kept ? typed<T>(s.kept) + (first + r) * s.kept_row : row;
    each_score(s, from, 0, width, static_cast<T>(a.shift[first + r]),
               [&](Vec<T> t, int64_t j) { exp2_of_score(t).store(row + j); });
  }
}

// K of a smaller epsilon, whose ratio to the present one is a power of two: K_ij becomes a power of
// u_i K_ij v_j.
template <class T>
void gibbs_power_block(const GibbsArgs& a, int64_t block) {
  const int64_t first = block * a.task, left = a.scores.rows - first;
  const int64_t rows = left < a.task ? left : a.task;
  const T* columns = typed<T>(a.columns);
  for (int64_t r = first; r < first + rows; ++r) {
    T* row = typed<T>(a.kernel) + r * a.row;
    const Vec<T> factor = static_cast<T>(a.factors[r]);
    for (int64_t j = 0; j < a.row; j += Vec<T>::kLanes) {
      Vec<T> k = Vec<T>::load(row + j) * Vec<T>::load(columns + j) * factor;
      for (int i = 0; i < a.squarings; ++i) k = k * k;
      k.store(row + j);
    }
  }
}

// x[i] = f(x[i]) for n numbers.
template <class F>
void each_number(double* x, int64_t n, F f) {
  constexpr int64_t w = Vec<double>::kLanes;
  int64_t i = 0;
  for (; i + w <= n; i += w) f(Vec<double>::load(x + i)).store(x + i);
  alignas(64) double rest[w] = {};
  for (int64_t k = i; k < n; ++k) rest[k - i] = x[k];
  f(Vec<double>::load(rest)).store(rest);
  for (int64_t k = i; k < n; ++k) x[k] = rest[k - i];
}

// R rows: their factors, unless these are given, and their part of the sums of the columns.
template <class T, int R>
PFK_HD void gibbs_rows(const GibbsArgs& a, int64_t first, T* sums) {
  constexpr int64_t w = Vec<T>::kLanes;
  const T* kernel = typed<T>(a.kernel) + first * a.row;
  const T* columns = typed<T>(a.columns);
  if (columns) {
    double total[R] = {};
    for (int64_t begin = 0; begin < a.row; begin += kSumColumns) {
      const int64_t end = begin + kSumColumns < a.row ? begin + kSumColumns : a.row;
      Vec<T> sum[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = T(0);
      for (int64_t j = begin; j < end; j += w) {
        const Vec<T> column = Vec<T>::load(columns + j);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r] += Vec<T>::load(kernel + r * a.row + j) * column;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r] += sum_lanes(sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a.factors[first + r] = 1 / total[r];
  }
  Vec<T> weight[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) weight[r] = static_cast<T>(a.mass[first + r] * a.factors[first + r]);
  for (int64_t j = 0; j < a.row; j += w) {
    Vec<T> sum = Vec<T>::load(sums + j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum += Vec<T>::load(kernel + r * a.row + j) * weight[r];
    sum.store(sums + j);
  }
}

template <class T>
void gibbs_pass_block(const GibbsArgs& a, int64_t block) {
  constexpr int R = sizeof(Vec<T>) == 64 ? 6 : 4;
  const int64_t first = block * a.task, left = a.scores.rows - first;
  const int64_t rows = left < a.task ? left : a.task;
  T* sums = typed<T>(a.sums) + block * a.row;
  for (int64_t j = 0; j < a.row; ++j) sums[j] = T(0);
  int64_t r = 0;
  for (; r + R <= rows; r += R) gibbs_rows<T, R>(a, first + r, sums);
  switch (rows - r) {
    case 1:
      return gibbs_rows<T, 1>(a, first + r, sums);
    case 2:
      return gibbs_rows<T, 2>(a, first + r, sums);
    case 3:
      return gibbs_rows<T, 3>(a, first + r, sums);
    case 4:
      return gibbs_rows<T, 4>(a, first + r, sums);
    case 5:
      return gibbs_rows<T, 5>(a, first + r, sums);
  }
}

// As many numbers as there are lanes of double.
template <class T>
PFK_HD Vec<double> load_wide(const T* p) {
  if constexpr (sizeof(T) == 8) {
    return Vec<double>::load(p);
  } else {
    typedef float Half __attribute__((vector_size(kVecBytes / 2)));
    Half half;
    memcpy(&half, p, sizeof(half));
    return Vec<double>(__builtin_convertvector(half, Vec<double>::Raw));
  }
}

// Whether all of n factors are near 1; not if one is NaN.
inline bool are_near_one(const double* factors, int64_t n) {
  Vec<double> far = 0.0;
  each_vector<double>(n, [&](int64_t j, auto part) {
    const Vec<double> f = load(factors + j, part, 1.0);
    const auto near = mask_and(f > Vec<double>(0x1p-30), f < Vec<double>(0x1p30));
    far = select(near, far, Vec<double>(1.0));
  });
  return sum_lanes(far) == 0;
}

// Adds up the sums of all tasks: the error with the factors v, and the factors of the next step.
// The errors of columns are added in order, at every level of SIMD.
template <class T>
double gibbs_columns(const GibbsArgs& a, int64_t tasks, const double* mass, const double* v,
                     double* next, int64_t n) {
  using V = Vec<double>;
  double error = 0;
  each_vector<double>(n, [&](int64_t j, auto part) {
    V sum = 0.0;
    for (int64_t task = 0; task < tasks; ++task) {
      sum += load_wide(typed<T>(a.sums) + task * a.row + j);
    }
    store(sum, next + j, part);
    sum = load(next + j, part, 1.0);  // what pads a row may be infinite
    const V off = load(mass + j, part) * abs_(load(v + j, part, 1.0) * sum - 1.0);
    store(1.0 / sum, next + j, part);
    for (int i = 0; i < V::kLanes; ++i) error += off.v[i];
  });
  return error;
}

}  // namespace

PFK_END
