// SPDX-License-Identifier: Apache-2.0
// Iterations over the kept Gibbs kernel of a small problem.
//
// With K_ij = exp((f_i + g_j - C_ij) / epsilon) in memory an iteration is a product with K and one
// with its transpose.  Both are one pass: while the rows of a group are still in L1 their sums give
// the new factors, with which the rows go into the sums of the columns.  Lower bound of its time: K
// is read once from L2, with two multiplications for each number; taking the powers of two anew is
// six times as much.
#pragma once

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
    Vec<T> sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = T(0);
    for (int64_t j = 0; j < a.row; j += w) {
      const Vec<T> column = Vec<T>::load(columns + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] += Vec<T>::load(kernel + r * a.row + j) * column;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a.factors[first + r] = 1 / sum_lanes(sum[r]);
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
  for (; r < rows; ++r) gibbs_rows<T, 1>(a, first + r, sums);
}

}  // namespace

PFK_END
