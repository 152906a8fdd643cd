// SPDX-License-Identifier: Apache-2.0
// Elementwise maps with a sum of terms for each sample, on the CPU: how [rows, features] is cut
// into tasks and blocks, and the order of summation.
//
// A task is several whole rows, or a chunk of one long row.  A block of a task fits a buffer in L1;
// it holds whole rows if these are short.  Every block starts at the start of a row or of a task,
// so that the sum of a row depends neither on the number of threads nor on the row's place in the
// batch. Terms of a block are summed in vectors, the sums of blocks in double.
#pragma once

#include "core/dtype.h"
#include "core/math.h"

// Plain data is the same for every SIMD level.
namespace pfk {

constexpr int kRowBlock = 1024;       // elements of a block
constexpr int64_t kRowChunk = 16384;  // elements of a task, approximately

struct RowPlan {
  int64_t rows, features;
  int64_t block;          // elements of a block: kRowBlock, or whole rows
  int64_t group, chunk;   // rows of a task; elements of a row in a task
  int64_t chunks, tasks;  // tasks of a row; tasks
};

static inline RowPlan plan_rows(int64_t rows, int64_t features) {
  RowPlan p{rows, features, kRowBlock, 1, kRowChunk, 1, rows};
  if (features <= kRowBlock) {
    const int64_t width = features > 0 ? features : 1;
    const int64_t in_block = kRowBlock / width, in_chunk = kRowChunk / width;
    p.block = in_block * features;
    p.group = in_chunk;
    p.chunk = features;
    p.tasks = (rows + p.group - 1) / p.group;
  } else {
    p.chunks = (features + kRowChunk - 1) / kRowChunk;
    p.tasks = rows * p.chunks;
  }
  return p;
}

// Where the sum of a row goes: to `out`, or, if the row has several chunks, to `partial`, which
// finish_rows() adds up.
template <class T>
struct RowSums {
  T* out;
  double* partial;  // [rows, chunks]
  double constant;  // of every row
  const T* add;     // of each row, or null
};

// Adds up the chunks of each row in order.
template <class T>
static inline void finish_rows(const RowPlan& p, const RowSums<T>& s) {
  for (int64_t row = 0; p.chunks > 1 && row < p.rows; ++row) {
    double total = s.constant + (s.add ? static_cast<double>(s.add[row]) : 0);
    for (int64_t c = 0; c < p.chunks; ++c) total += s.partial[row * p.chunks + c];
    s.out[row] = static_cast<T>(total);
  }
}
static inline void finish_rows(const RowPlan& p, DType dtype, void* out, double* partial,
                               double constant = 0, const void* add = nullptr) {
  with_compute_type(dtype, [&](auto type) {
    using T = decltype(type);
    finish_rows(p, RowSums<T>{static_cast<T*>(out), partial, constant, static_cast<const T*>(add)});
  });
}

}  // namespace pfk

PFK_BEGIN

// ---- vectors, the last one partial -------------------------------------------------------------

// each_vector(n, f) calls f(i, Full{}) for whole vectors and f(i, Part{m}) for the last m elements.
struct Full {};
struct Part {
  int count;
};

template <class T, class F>
static PFK_HD void each_vector(int64_t n, F f) {
  constexpr int w = Vec<T>::kLanes;
  int64_t i = 0;
  for (; i + w <= n; i += w) f(i, Full{});
  if (i < n) f(i, Part{static_cast<int>(n - i)});
}

template <class T>
static PFK_HD Vec<T> load(const T* p, Full, T = T(0)) {
  return Vec<T>::load(p);
}
template <class T>
static PFK_HD Vec<T> load(const T* p, Part part, T rest = T(0)) {
  T lanes[Vec<T>::kLanes];
  Vec<T>(rest).store(lanes);
  memcpy(lanes, p, part.count * sizeof(T));
  return Vec<T>::load(lanes);
}
template <class T>
static PFK_HD void store(Vec<T> x, T* p, Full) {
  x.store(p);
}
template <class T>
static PFK_HD void store(Vec<T> x, T* p, Part part) {
  T lanes[Vec<T>::kLanes];
  x.store(lanes);
  memcpy(p, lanes, part.count * sizeof(T));
}

// ---- sums --------------------------------------------------------------------------------------
template <class T>
static inline double sum_terms(const T* terms, int64_t n) {
  constexpr int w = Vec<T>::kLanes;
  double sum = 0;
  int64_t i = 0;
  if (n >= w) {
    Vec<T> a[4] = {T(0), T(0), T(0), T(0)};
    for (; i + 4 * w <= n; i += 4 * w) {
      for (int k = 0; k < 4; ++k) a[k] += Vec<T>::load(terms + i + k * w);
    }
    for (; i + w <= n; i += w) a[0] += Vec<T>::load(terms + i);
    sum = sum_lanes((a[0] + a[1]) + (a[2] + a[3]));
  }
  for (; i < n; ++i) sum += static_cast<double>(terms[i]);
  return sum;
}

template <class T>
static PFK_HD void put_row(const RowPlan& p, const RowSums<T>& s, int64_t row, int64_t chunk,
                           double total) {
  if (p.chunks == 1) {
    s.out[row] = static_cast<T>(total + s.constant + (s.add ? static_cast<double>(s.add[row]) : 0));
  } else {
    s.partial[row * p.chunks + chunk] = total;
  }
}

// Walks a task: element(begin, n) fills the terms of flat elements [begin, begin + n), sum(offset,
// n) adds up terms of one row within that block, done(row, chunk, total) takes the result.
template <class Element, class Sum, class Done>
static PFK_HD void walk_rows(const RowPlan& p, int64_t task, Element element, Sum sum, Done done) {
  int64_t row = task / p.chunks * p.group;
  const int64_t chunk = task % p.chunks, last = row + p.group < p.rows ? row + p.group : p.rows;
  if (p.features == 0) {
    for (; row < last; ++row) done(row, chunk, 0.0);
    return;
  }
  const int64_t stop = (chunk + 1) * p.chunk < p.features ? (chunk + 1) * p.chunk : p.features;
  int64_t begin = row * p.features + chunk * p.chunk;
  const int64_t end = (last - 1) * p.features + stop, width = stop - chunk * p.chunk;
  double total = 0;
  for (int64_t left = width; begin < end;) {
    const int64_t n = end - begin < p.block ? end - begin : p.block;
    element(begin, n);
    for (int64_t at = 0; at < n;) {
      const int64_t m = left < n - at ? left : n - at;
      total += sum(at, m);
      at += m;
      left -= m;
      if (left == 0) {
        done(row++, chunk, total);
        total = 0;
        left = width;
      }
    }
    begin += n;
  }
}

PFK_END
