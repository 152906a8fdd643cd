// SPDX-License-Identifier: Apache-2.0
// Products of small matrices that already lie in L1: out (+)= left * right.
//
// Twelve vectors of accumulators (6 rows by 2 vectors) hide the latency of the multiply-adds.  They
// leave four of AVX2's 16 registers: one for a broadcast number of left, two for vectors of right.
// AVX-512 has twice the registers and takes 12 rows.  While the first rows are computed, the next
// columns of right are prefetched, which matters where right does not fit into L2.
//
// left is read number by number, so that its transpose costs nothing extra.  Where it does not fit
// into L1 and is read often, it is packed first (LeftPanels).  right and out are read in whole
// vectors, to which their rows must be padded.  Every element of out is one chain of multiply-adds
// in the order of depth, whatever the sizes are.
#pragma once

#include "core/vec.h"

PFK_BEGIN

namespace {

template <class T>
struct Left {  // element (r, k) at p[r * row + k * step]
  const T* p;
  int64_t row, step;

  // R rows; without the first rows, or the first terms
  template <int R>
  Left block() const {
    return *this;
  }
  Left skip(int64_t rows, int64_t terms) const {
    return {p + rows * row + terms * step, row, step};
  }
};

// Packed: the numbers of the R rows of a tile (12, 6, or what is left) that are multiplied at the
// same time are neighbors, so that all of left is read in order.
template <class T>
struct LeftPanels {
  const T* p;
  int64_t depth;      // of all that is packed
  int64_t first = 0;  // term

  template <int R>
  Left<T> block() const {
    return {p + first * R, 1, R};
  }
  LeftPanels skip(int64_t rows, int64_t terms) const {  // whole blocks of rows
    return {p + rows * depth, depth, first + terms};
  }
};

template <class T>
struct Rows {  // a row-major matrix
  T* p;
  int64_t stride;
};

template <class T>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
               int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(to + r * to_stride, from + r * from_stride, columns * sizeof(T));
  }
}

constexpr int kGemmRows = 6;
template <class T>
constexpr int kMostRows = sizeof(Vec<T>) == 64 ? 2 * kGemmRows : kGemmRows;

constexpr int64_t kGemmDeep = 64;  // from which depth on a prefetch of out costs next to nothing

template <class T, int R, int C, bool kAhead = false>
inline void gemm_tile(Left<T> l, const T* right, int64_t stride, int64_t depth, Rows<T> out,
                      bool add) {
  constexpr int w = Vec<T>::kLanes;
  Vec<T> sum[R][C];  // the loops over it must be unrolled: else the compiler keeps it in memory
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      sum[r][c] = add ? Vec<T>::load(out.p + r * out.stride + c * w) : Vec<T>(T(0));
    }
  }
  if (add && depth >= kGemmDeep) {  // what the next rows are added to
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) __builtin_prefetch(out.p + (R + r) * out.stride + c * w, 1);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> b[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) b[c] = Vec<T>::load(right + c * w);
    if (kAhead) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) __builtin_prefetch(right + (C + c) * w);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> a = l.p[r * l.row];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sum[r][c] += a * b[c];
    }
    l.p += l.step;
    right += stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[r][c].store(out.p + r * out.stride + c * w);
  }
}

template <class T, int R, int C, bool kAhead = false, class L>
inline void gemm_step(L& l, const T* right, int64_t stride, int64_t depth, Rows<T>& out, bool add) {
  gemm_tile<T, R, C, kAhead>(l.template block<R>(), right, stride, depth, out, add);
  l = l.skip(R, 0);
  out.p += R * out.stride;
}

// L is Left or LeftPanels.
template <class T, int C, class L = Left<T>>
void gemm_columns(L l, const T* right, int64_t stride, int64_t rows, int64_t depth, Rows<T> out,
                  bool add) {
  constexpr int kMost = kMostRows<T>;
  // the first rows prefetch the next columns of right
  if (rows >= kMost) gemm_step<T, kMost, C, true>(l, right, stride, depth, out, add), rows -= kMost;
  for (; rows >= kMost; rows -= kMost) gemm_step<T, kMost, C>(l, right, stride, depth, out, add);
  if (kMost > kGemmRows && rows >= kGemmRows)
    gemm_step<T, kGemmRows, C>(l, right, stride, depth, out, add), rows -= kGemmRows;
  switch (rows) {
    case 1:
      return gemm_tile<T, 1, C>(l.template block<1>(), right, stride, depth, out, add);
    case 2:
      return gemm_tile<T, 2, C>(l.template block<2>(), right, stride, depth, out, add);
    case 3:
      return gemm_tile<T, 3, C>(l.template block<3>(), right, stride, depth, out, add);
    case 4:
      return gemm_tile<T, 4, C>(l.template block<4>(), right, stride, depth, out, add);
    case 5:
      return gemm_tile<T, 5, C>(l.template block<5>(), right, stride, depth, out, add);
  }
}

// Computes whole vectors: columns up to the next multiple of the number of lanes.
template <class T, class L = Left<T>>
void gemm(L l, Rows<const T> right, int64_t rows, int64_t columns, int64_t depth, Rows<T> out,
          bool add) {
  constexpr int w = Vec<T>::kLanes;
  int64_t c = 0;
  for (; c + w < columns; c += 2 * w) {
    gemm_columns<T, 2>(l, right.p + c, right.stride, rows, depth, {out.p + c, out.stride}, add);
  }
  if (c < columns) {
    gemm_columns<T, 1>(l, right.p + c, right.stride, rows, depth, {out.p + c, out.stride}, add);
  }
}

template <class T, int R>
T* pack_block(Left<T>& from, int64_t depth, T* to) {
  for (int64_t k = 0; k < depth; ++k, to += R) {
    for (int r = 0; r < R; ++r) to[r] = from.p[r * from.row + k * from.step];
  }
  from.p += R * from.row;
  return to;
}

// Packs rows x depth numbers as gemm() cuts them into tiles.
template <class T>
void pack_left(Left<T> from, int64_t rows, int64_t depth, T* to) {
  for (; rows >= kMostRows<T>; rows -= kMostRows<T>)
    to = pack_block<T, kMostRows<T>>(from, depth, to);
  if (rows >= kGemmRows) to = pack_block<T, kGemmRows>(from, depth, to), rows -= kGemmRows;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < rows; ++r) *to++ = from.p[r * from.row + k * from.step];
  }
}

// to[c][r] = from[r][c] over whole blocks of lanes x lanes, to which columns of `from` and both
// axes of `to` must be padded.  Rows that are missing in the last block are zero in `to`.
template <class T, bool kWhole>
void transpose_blocks(Rows<const T> from, int64_t rows, int64_t columns, Rows<T> to) {
  constexpr int w = Vec<T>::kLanes;
  using Raw = typename Vec<T>::Raw;
  typename Vec<T>::RawInt low[5], high[5];  // which lanes of the pair (a, b) each round takes
  for (int h = 1, round = 0; h < w; h *= 2, ++round) {
    for (int lane = 0; lane < w; ++lane) {
      low[round][lane] = lane & h ? w + lane - h : lane;
      high[round][lane] = lane & h ? w + lane : lane + h;
    }
  }
  for (int64_t r = 0; r < rows; r += w) {
    for (int64_t c = 0; c < columns; c += w) {
      Raw v[w];
      for (int i = 0; i < w; ++i) {
        v[i] = kWhole || r + i < rows ? Vec<T>::load(from.p + (r + i) * from.stride + c).v : Raw{};
      }
#pragma GCC unroll 4
      for (int h = 1, round = 0; h < w; h *= 2, ++round) {
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) {
          if (i & h) continue;
          const Raw a = v[i], b = v[i + h];
          v[i] = __builtin_shuffle(a, b, low[round]);
          v[i + h] = __builtin_shuffle(a, b, high[round]);
        }
      }
      for (int i = 0; i < w; ++i) Vec<T>(v[i]).store(to.p + (c + i) * to.stride + r);
    }
  }
}

// Both axes must be padded in both matrices.
template <class T>
void transpose(Rows<const T> from, int64_t rows, int64_t columns, Rows<T> to) {
  transpose_blocks<T, true>(from, rows, columns, to);
}

// Rows of `from` need no padding.
template <class T>
void transpose_rows(Rows<const T> from, int64_t rows, int64_t columns, Rows<T> to) {
  constexpr int64_t w = Vec<T>::kLanes;
  const int64_t whole = rows / w * w;
  transpose_blocks<T, true>(from, whole, columns, to);
  transpose_blocks<T, false>({from.p + whole * from.stride, from.stride}, rows - whole, columns,
                             {to.p + whole, to.stride});
}

// to[c][r] = from[r][c].  Neither matrix needs rows for padding; numbers that pad the rows of `to`
// become zero.
template <class T>
void transpose_padded(Rows<const T> from, int64_t rows, int64_t columns, Rows<T> to) {
  constexpr int64_t w = Vec<T>::kLanes;
  const int64_t whole_rows = rows / w * w, whole_columns = columns / w * w;
  transpose<T>(from, whole_rows, whole_columns, to);
  for (int64_t c = 0; c < columns; ++c) {
    T* row = to.p + c * to.stride;
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      row[r] = from.p[r * from.stride + c];
    for (int64_t r = rows; r < to.stride; ++r) row[r] = T(0);
  }
}

}  // namespace

PFK_END
