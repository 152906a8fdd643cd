// SPDX-License-Identifier: Apache-2.0
// Mean and squared deviations of every channel on the CPU, in one pass over memory.
//
// A piece that fits into L1 is read twice: for its mean, which need not be exact, and for the sums
// of deviations from it and of their squares.  These correct the mean and are accurate even for
// data around 1e4.  Pieces are merged in double.  (A single pass in double was ten times slower.)
#pragma once

#include "actnorm/actnorm.h"
#include "core/half.h"

PFK_BEGIN

namespace {

struct Task {
  int64_t begin, end;  // outer rows
};
Task task_rows(const ActNormArgs& a, int64_t task) {
  const int64_t begin = task * a.rows;
  return {begin, begin + a.rows < a.outer ? begin + a.rows : a.outer};
}

// Where channels are innermost, runs of elements are computed in whole Vecs together with numbers
// that belong to the channels.  Up to kWide channels, a run has many rows, and the numbers of the
// channels are repeated to a whole number of Vecs: so 10 channels leave no partial Vecs.  Beyond, a
// run is a row.
constexpr int64_t kWide = 64;

// The length of the repeated numbers: channels * lanes / gcd(channels, lanes), or one row of Vecs.
int64_t pattern_length(int64_t channels, int64_t lanes) {
  if (channels >= kWide) return (channels + lanes - 1) / lanes * lanes;
  int64_t a = channels, b = lanes;
  while (b != 0) {
    const int64_t r = a % b;
    a = b;
    b = r;
  }
  return channels * (lanes / a);
}

// In double, for where a sum of floats overflows.
template <class S>
Moments careful_moments(const S* x, int64_t n, int64_t step) {
  double mean = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) mean += static_cast<double>(widen(x[i * step]));
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(widen(x[i * step])) - mean;
    m2 += d * d;
  }
  return {static_cast<double>(n), mean, m2};
}

Moments corrected(double n, double rough, double sum, double squares) {
  return {n, rough + sum / n, squares - sum * sum / n};
}
bool is_finite(double x) { return x - x == 0; }

template <class S>
Moments piece_moments(const S* x, int64_t n) {
  using T = Compute<S>;
  using V = Vec<T>;
  V a = T(0), b = T(0);
  int64_t i = 0;
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    a += load_vec(x + i);
    b += load_vec(x + i + V::kLanes);
  }
  const int64_t whole = i;
  double rough = sum_lanes(a + b);
  for (; i < n; ++i) rough += widen(x[i]);
  const T mean = static_cast<T>(rough / static_cast<double>(n));
  V sum[2] = {T(0), T(0)}, squares[2] = {T(0), T(0)};
  for (i = 0; i < whole; i += 2 * V::kLanes) {
    for (int k = 0; k < 2; ++k) {
      const V d = load_vec(x + i + k * V::kLanes) - V(mean);
      sum[k] += d;
      squares[k] += d * d;
    }
  }
  double total = sum_lanes(sum[0] + sum[1]), total2 = sum_lanes(squares[0] + squares[1]);
  for (; i < n; ++i) {
    const double d = static_cast<double>(widen(x[i])) - mean;
    total += d;
    total2 += d * d;
  }
  if (!is_finite(total2)) return careful_moments(x, n, 1);
  return corrected(static_cast<double>(n), mean, total, total2);
}

void put_moments(Moments m, double* out) { out[0] = m.mean, out[1] = m.m2; }

template <class S>
void moments_rows(const ActNormArgs& a, Task t, double* out) {
  constexpr int64_t kPiece = 1024;
  for (int64_t c = 0; c < a.channels; ++c) {
    Moments m{0, 0, 0};
    for (int64_t row = t.begin; row < t.end; ++row) {
      const S* x = static_cast<const S*>(a.in) + (row * a.channels + c) * a.inner;
      for (int64_t i = 0; i < a.inner; i += kPiece) {
        m = merge(m, piece_moments(x + i, a.inner - i < kPiece ? a.inner - i : kPiece));
      }
    }
    put_moments(m, out + 2 * c);
  }
}

// Runs of `length` elements of x, `stride` apart.
template <class S>
struct Runs {
  const S* x;
  int64_t count, length, stride;
};

// Sums at every position of the repeated numbers; with `mean`, of deviations and their squares.
template <class S, class T>
void pattern_sums(Runs<S> r, int64_t period, const T* mean, T* sum, T* squares) {
  using V = Vec<T>;
  for (; r.count > 0; --r.count, r.x += r.stride) {
    int64_t p = 0;
    for (int64_t i = 0; i < r.length; i += V::kLanes, p += V::kLanes) {
      if (p == period) p = 0;
      const int n = static_cast<int>(r.length - i < V::kLanes ? r.length - i : V::kLanes);
      V v = n == V::kLanes ? load_vec(r.x + i) : load_vec_n(r.x + i, n);
      if (mean) {
        v = v - V::load(mean + p);
        if (n < V::kLanes) v = select(first_lanes<T>(n), v, V(T(0)));
        (V::load(squares + p) + v * v).store(squares + p);
      }
      (V::load(sum + p) + v).store(sum + p);
    }
  }
}

// Merges the moments of `width` channels of rows that fit into L1 with those of `count` earlier
// rows.
template <class S, class T>
void merge_piece(const Runs<S>& r, int64_t rows, int64_t width, int64_t channels, double count,
                 T* memory, double* out) {
  const int64_t period = pattern_length(width, Vec<T>::kLanes);
  T *mean = memory, *sum = mean + period, *squares = sum + period;
  memset(sum, 0, period * sizeof(T));
  pattern_sums<S, T>(r, period, nullptr, sum, nullptr);
  for (int64_t j = 0; j < width; ++j) {
    double total = 0;
    for (int64_t i = j; i < period; i += width) total += sum[i];
    for (int64_t i = j; i < period; i += width) mean[i] = static_cast<T>(total / rows);
  }
  memset(sum, 0, 2 * period * sizeof(T));
  pattern_sums<S, T>(r, period, mean, sum, squares);
  for (int64_t j = 0; j < width; ++j) {
    double total = 0, total2 = 0;
    for (int64_t i = j; i < period; i += width) total += sum[i], total2 += squares[i];
    const Moments m = is_finite(total2)
                          ? corrected(static_cast<double>(rows), mean[j], total, total2)
                          : careful_moments(r.x + j, rows, channels);
    put_moments(merge({count, out[2 * j], out[2 * j + 1]}, m), out + 2 * j);
  }
}

template <class S>
void moments_flat(const ActNormArgs& a, Task t, double* out) {
  using T = Compute<S>;
  constexpr int64_t kColumns = 128;  // with 32 rows, half of L1 in floats
  const int64_t c = a.channels, columns = c < kWide ? c : kColumns;
  const int64_t piece = 4096 / columns;
  T* memory = new T[3 * kWide * 16];
  for (int64_t at = 0; at < c;) {
    // all the rest if the next block would be narrow: narrow blocks must be contiguous
    const int64_t width = c - at < columns + kWide ? c - at : columns;
    double count = 0;
    for (int64_t row = t.begin; row < t.end; row += piece) {
      const int64_t rows = t.end - row < piece ? t.end - row : piece;
      const S* x = static_cast<const S*>(a.in) + row * c + at;
      const Runs<S> runs = c < kWide ? Runs<S>{x, 1, rows * c, 0} : Runs<S>{x, rows, width, c};
      merge_piece<S, T>(runs, rows, width, c, count, memory, out + 2 * at);
      count += static_cast<double>(rows);
    }
    at += width;
  }
  delete[] memory;
}

}  // namespace

PFK_END
