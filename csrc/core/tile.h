// SPDX-License-Identifier: Apache-2.0
// Tiles on the CPU: as many rows of a table as a Vec has lanes, transposed so that each column is
// one Vec.
//
// Eight columns (or as many as there are lanes) are transposed at a time.  Rows are loaded as they
// lie; then each of three stages exchanges one bit of the row's number with one bit of the
// column's, in pairs of registers.  The last block of columns overlaps the one before it.
#pragma once

#include <utility>

#include "core/half.h"

PFK_BEGIN

template <class T>
struct TileBlock {
  static constexpr int kLanes = Vec<T>::kLanes;
  static constexpr int kColumns = kLanes < 8 ? kLanes : 8;
  static constexpr int kParts = kLanes / kColumns;  // rows in a register
  static_assert(kParts <= 2);
};

#if defined(__GNUC__)
template <int kBit, class T, size_t... kLane>
PFK_HD void exchange_lanes(Vec<T>& a, Vec<T>& b, std::index_sequence<kLane...>) {
  constexpr size_t w = sizeof...(kLane), bit = size_t{1} << kBit;
  const typename Vec<T>::Raw low =
      __builtin_shufflevector(a.v, b.v, (kLane & bit ? w + (kLane ^ bit) : kLane)...);
  b.v = __builtin_shufflevector(a.v, b.v, (kLane & bit ? w + kLane : kLane | bit)...);
  a.v = low;
}
#endif

template <int kBit, class T>
PFK_HD void exchange(Vec<T> (&v)[TileBlock<T>::kColumns]) {
#pragma GCC unroll 8
  for (int i = 0; i < TileBlock<T>::kColumns; ++i) {
    if (!(i >> kBit & 1))
      exchange_lanes<kBit>(v[i], v[i + (1 << kBit)], std::make_index_sequence<Vec<T>::kLanes>());
  }
}

// Before, register i holds columns of row i (and of row i + 8); after, column i of all rows.  The
// same steps lead back.
template <class T>
PFK_HD void transpose(Vec<T> (&v)[TileBlock<T>::kColumns]) {
  exchange<0>(v);
  if constexpr (TileBlock<T>::kColumns > 2) exchange<1>(v);
  if constexpr (TileBlock<T>::kColumns > 4) exchange<2>(v);
}

// One register of a block: kColumns numbers of each of its rows.
template <class T>
struct TilePart {
  typedef T Raw __attribute__((vector_size(TileBlock<T>::kColumns * sizeof(T))));
};
template <>
struct TilePart<float> {
  typedef float Raw __attribute__((vector_size(TileBlock<float>::kColumns * 4)));
};
template <>
struct TilePart<double> {
  typedef double Raw __attribute__((vector_size(TileBlock<double>::kColumns * 8)));
};

template <class T, size_t... kLane>
PFK_HD Vec<T> join_parts(typename TilePart<T>::Raw a, typename TilePart<T>::Raw b,
                         std::index_sequence<kLane...>) {
  return Vec<T>(__builtin_shufflevector(a, b, kLane...));
}
template <class T, size_t... kLane>
PFK_HD typename TilePart<T>::Raw part_of(Vec<T> v, int part, std::index_sequence<kLane...>) {
  constexpr size_t n = sizeof...(kLane);
  return part == 0 ? __builtin_shufflevector(v.v, v.v, kLane...)
                   : __builtin_shufflevector(v.v, v.v, (n + kLane)...);
}

// The rows of a tile: row i begins at p + at(i).  Rows that are not used repeat the offset of
// another.
template <class T, class At>
PFK_HD void load_block(const T* p, const At& at, T* tile) {
  using B = TileBlock<T>;
  Vec<T> v[B::kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < B::kColumns; ++i) {
    if constexpr (B::kParts == 1) {
      v[i] = Vec<T>::load(p + at(i));
    } else {
      typename TilePart<T>::Raw a, b;
      memcpy(&a, p + at(i), sizeof(a));
      memcpy(&b, p + at(i + B::kColumns), sizeof(b));
      v[i] = join_parts<T>(a, b, std::make_index_sequence<B::kLanes>());
    }
  }
  transpose(v);
#pragma GCC unroll 8
  for (int i = 0; i < B::kColumns; ++i) v[i].store(tile + i * B::kLanes);
}

// Stores the first `rows` rows, in order.
template <class T, class At>
PFK_HD void store_block(const T* tile, const At& at, T* p, int rows) {
  using B = TileBlock<T>;
  Vec<T> v[B::kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < B::kColumns; ++i) v[i] = Vec<T>::load(tile + i * B::kLanes);
  transpose(v);
  if constexpr (B::kParts == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < B::kColumns; ++i) {
      if (i < rows) v[i].store(p + at(i));
    }
  } else {
    const auto lanes = std::make_index_sequence<B::kColumns>();
#pragma GCC unroll 16
    for (int i = 0; i < B::kLanes; ++i) {
      const auto part = part_of(v[i % B::kColumns], i / B::kColumns, lanes);
      if (i < rows) memcpy(p + at(i), &part, sizeof(part));
    }
  }
}

// tile[column][row] from rows of `columns` numbers.  Where rows are narrower than a block, a whole
// block is loaded if `readable` numbers allow it; what is beyond the row goes into the next
// columns.
template <class T, class At>
static PFK_HD void load_tile(const T* p, const At& at, int columns, int64_t readable, T* tile) {
  constexpr int w = Vec<T>::kLanes, c = TileBlock<T>::kColumns;
  if (columns < c && at(w - 1) + c > readable) {
    for (int i = 0; i < w; ++i) {
      for (int j = 0; j < columns; ++j) tile[j * w + i] = p[at(i) + j];
    }
    return;
  }
  int j = 0;
  for (; j + c <= columns; j += c) load_block(p + j, at, tile + j * w);
  if (columns < c) {
    load_block(p, at, tile);
  } else if (j < columns) {
    load_block(p + columns - c, at, tile + (columns - c) * w);
  }
}

// The way back: all rows, or the first n.  They are stored in order, because a block may write
// beyond a narrow row what the next row overwrites.
template <class T, class At>
static PFK_HD void store_tile(const T* tile, const At& at, int columns, int n, T* p) {
  constexpr int w = Vec<T>::kLanes, c = TileBlock<T>::kColumns;
  int from = 0;
  if (n == w && columns >= c) {
    int j = 0;
    for (; j + c <= columns; j += c) store_block(tile + j * w, at, p + j, w);
    if (j < columns) store_block(tile + (columns - c) * w, at, p + columns - c, w);
    return;
  }
  if (n == w && at(1) == columns && at(w - 1) == (w - 1) * static_cast<int64_t>(columns)) {
    from = w - (c + columns - 1) / columns;
    store_block(tile, at, p, from);
  }
  for (int i = from; i < n; ++i) {
    for (int j = 0; j < columns; ++j) p[at(i) + j] = tile[j * w + i];
  }
}

PFK_END
