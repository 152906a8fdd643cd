// SPDX-License-Identifier: Apache-2.0
// Passes over tiles of scores on the CPU.
//
// Lower bound of the time of a soft minimum: a dozen operations for the power of two of each pair
// and two for each coordinate (one where r_ij is a product), at two vectors a cycle; memory plays
// no part.  Clouds of few coordinates are read straight from their panels, several rows at a time,
// and no tile is stored.  Else a tile of r_ij is a product of core/gemm.h that stays in L2.
//
// The sum of a row is shifted by its last logarithm, which is at least a good guess of the present
// one: only where that guess is bad, as in the first iteration, a pass finds the largest score.
#pragma once

#include <stdlib.h>

#include "core/matmul.h"
#include "transport/transport.h"

PFK_BEGIN

namespace {

constexpr int64_t kTileBytes = 1024;    // of a row of a tile
constexpr int64_t kSumColumns = 2048;   // that are summed before the sums go into doubles
constexpr int64_t kTransportRows = 96;  // of a task, at most
constexpr double kLeastSum = 0x1p-60, kMostSum = 0x1p90;  // beyond, a shift was a bad guess

template <class T>
constexpr int64_t kTileColumns = kTileBytes / sizeof(T);

// 2^t for any t: zero (nearly) below the smallest exponent; t at most that of the largest.
// 2^t = 2^k 2^r with |r| <= 1/2.
template <class T>
PFK_HD Vec<T> exp2_of_score(Vec<T> t) {
  using F = Float<T>;
  t = max_(t, Vec<T>(T(1 - F::kBias)));
  t = min_(t, Vec<T>(T(F::kBias)));
  const Vec<T> shifted = t + Vec<T>(F::kRound);
  const Vec<T> r = t - (shifted - Vec<T>(F::kRound));
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {  // relative error 1e-7, less than that of a score of 2
    p = polynomial(r, {1.00000007545f, 0.693147188026f, 0.240221074853f, 0.0555035711422f,
                       0.00967603191832f, 0.00133908633647f});
  } else {  // 4e-18
    p = polynomial(r, {0.999999999999999997, 0.693147180559945309, 0.240226506959101596,
                       0.055504108664821627, 0.00961812910758725667, 0.00133335581464064707,
                       0.000154035304637243542, 0.0000152527338415567726, 1.32154325359123762e-6,
                       1.01780570877339411e-7, 7.07419429728852101e-9, 4.45581790833606449e-10});
  }
  return from_bits<T>(plus_bits<T>(bits(p), bits(shifted) << F::kMantissa));
}

// ---- few coordinates ---------------------------------------------------------------------------
enum Pass { kSum, kLargest };

template <class T>
PFK_HD double largest_lane(Vec<T> v) {
  T most = v.v[0];
  for (int i = 1; i < Vec<T>::kLanes; ++i) most = v.v[i] > most ? v.v[i] : most;
  return static_cast<double>(most);
}

// R rows of D coordinates, scaled such that a score is w - h - |x - y|^2: the sum of the powers of
// two of each row, or its largest score.
template <Pass kPass, class T, int D, int R>
void direct_rows(const ScoreArgs& s, T root, const T* x, const T* shift, double* out) {
  constexpr int64_t w = Vec<T>::kLanes, panel = kPanel<T>;
  const T *y = typed<T>(s.packed), *weights = typed<T>(s.weights);
  double total[R];
  for (int r = 0; r < R; ++r) total[r] = kPass == kSum ? 0 : -INFINITY;
  for (int64_t first = 0; first < s.columns; first += kSumColumns) {
    const int64_t end = first + kSumColumns < s.columns ? first + kSumColumns : s.columns;
    Vec<T> sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = kPass == kSum ? T(0) : T(-INFINITY);
    for (int64_t j = first; j < end; j += w) {
      const T* column = y + j / panel * panel * D + j % panel;
      Vec<T> at[D];
#pragma GCC unroll 8
      for (int k = 0; k < D; ++k) at[k] = Vec<T>::load(column + k * panel) * root;
      const Vec<T> weight = Vec<T>::load(weights + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec<T> t = weight - Vec<T>(shift[r]);
#pragma GCC unroll 8
        for (int k = 0; k < D; ++k) {
          const Vec<T> difference = Vec<T>(x[r * D + k]) - at[k];
          t = t - difference * difference;
        }
        sum[r] = kPass == kSum ? sum[r] + exp2_of_score(t) : max_(t, sum[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (kPass == kSum) {
        total[r] += sum_lanes(sum[r]);
      } else {
        const double most = largest_lane(sum[r]);
        total[r] = most > total[r] ? most : total[r];
      }
    }
  }
  for (int r = 0; r < R; ++r) out[r] = total[r];
}

template <Pass kPass, class T, int D>
void direct_block(const ScoreArgs& s, int64_t first, int64_t rows, const T* shift, double* out) {
  constexpr int R = sizeof(Vec<T>) == 64 ? 6 : 3;
  const T root = static_cast<T>(__builtin_sqrt(-s.kappa));
  T x[kTransportRows * D];
  const T* from = typed<T>(s.points) + first * D;
  for (int64_t i = 0; i < rows * D; ++i) x[i] = from[i] * root;
  int64_t r = 0;
  for (; r + R <= rows; r += R) direct_rows<kPass, T, D, R>(s, root, x + r * D, shift + r, out + r);
  for (; r < rows; ++r) direct_rows<kPass, T, D, 1>(s, root, x + r * D, shift + r, out + r);
}

// ---- tiles of any depth ------------------------------------------------------------------------
// r_ij of rows [first, first + rows) and columns [column, column + width), which begin a panel.
template <class T>
void fill_tile(const ScoreArgs& s, int64_t first, int64_t rows, int64_t column, int64_t width,
               Rows<T> tile) {
  constexpr int64_t w = Vec<T>::kLanes, panel = kPanel<T>;
  const T* x = typed<T>(s.points) + first * s.depth;
  const T* packed = typed<T>(s.packed) + column * s.depth;
  for (int64_t j = 0; j < width; j += panel, packed += panel * s.depth) {
    if (!s.direct) {
      for (int64_t k = 0; k < s.depth; k += kMatmulDepth) {
        const int64_t depth = s.depth - k < kMatmulDepth ? s.depth - k : kMatmulDepth;
        gemm_columns<T, 2>({x + k, s.depth, 1}, packed + k * panel, panel, rows, depth,
                           {tile.p + j, tile.stride}, k > 0);
      }
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t lane = 0; lane < panel; lane += w) {
        Vec<T> sum = T(0);
        for (int64_t k = 0; k < s.depth; ++k) {
          const Vec<T> d = Vec<T>(x[r * s.depth + k]) - Vec<T>::load(packed + k * panel + lane);
          sum += d * d;
        }
        sum.store(tile.p + r * tile.stride + j + lane);
      }
    }
  }
}

template <class T>
int64_t whole_panels(int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

// Calls f(first column, columns, tile) for the tiles of a block of rows, padded to whole panels.
template <class T, class F>
void each_tile(const ScoreArgs& s, int64_t first, int64_t rows, F f) {
  if (s.kept) {
    T* kept = const_cast<T*>(typed<T>(s.kept)) + first * s.kept_row;  // f only reads what is kept
    for (int64_t j = 0; j < s.columns; j += kSumColumns) {
      const int64_t left = whole_panels<T>(s.columns - j);
      f(j, left < kSumColumns ? left : kSumColumns, Rows<T>{kept + j, s.kept_row});
    }
    return;
  }
  alignas(64) T memory[kTransportRows * kTileColumns<T>];
  const Rows<T> tile{memory, kTileColumns<T>};
  for (int64_t j = 0; j < s.columns; j += kTileColumns<T>) {
    const int64_t left = whole_panels<T>(s.columns - j);
    const int64_t width = left < kTileColumns<T> ? left : kTileColumns<T>;
    fill_tile<T>(s, first, rows, j, width, tile);
    f(j, width, tile);
  }
}

// Makes the products of a block of rows that are kept.
template <class T>
void keep_block(const ScoreArgs& s, int64_t task, int64_t block, T* to) {
  const int64_t first = block * task, left = s.rows - first;
  fill_tile<T>(s, first, left < task ? left : task, 0, whole_panels<T>(s.columns),
               Rows<T>{to + first * s.kept_row, s.kept_row});
}

// Calls f(score, lane's column) for a row of a tile.
template <class T, class F>
PFK_HD void each_score(const ScoreArgs& s, const T* row, int64_t column, int64_t width, T shift,
                       F f) {
  const T* weights = typed<T>(s.weights) + column;
  const Vec<T> kappa = static_cast<T>(s.kappa), h = shift;
  for (int64_t j = 0; j < width; j += Vec<T>::kLanes) {
    f((Vec<T>::load(weights + j) - h) + kappa * Vec<T>::load(row + j), j);
  }
}

template <Pass kPass, class T>
void tiled_block(const ScoreArgs& s, int64_t first, int64_t rows, const T* shift, double* out) {
  for (int64_t r = 0; r < rows; ++r) out[r] = kPass == kSum ? 0 : -INFINITY;
  each_tile<T>(s, first, rows, [&](int64_t column, int64_t width, Rows<T> tile) {
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> sum = kPass == kSum ? T(0) : T(-INFINITY);
      each_score(s, tile.p + r * tile.stride, column, width, shift[r], [&](Vec<T> t, int64_t) {
        sum = kPass == kSum ? sum + exp2_of_score(t) : max_(t, sum);
      });
      if (kPass == kSum) {
        out[r] += sum_lanes(sum);
      } else {
        const double most = largest_lane(sum);
        out[r] = most > out[r] ? most : out[r];
      }
    }
  });
}

template <Pass kPass, class T>
void score_block(const ScoreArgs& s, int64_t first, int64_t rows, const T* shift, double* out) {
  if (!s.direct) return tiled_block<kPass, T>(s, first, rows, shift, out);
  switch (s.depth) {
    case 1:
      return direct_block<kPass, T, 1>(s, first, rows, shift, out);
    case 2:
      return direct_block<kPass, T, 2>(s, first, rows, shift, out);
    case 3:
      return direct_block<kPass, T, 3>(s, first, rows, shift, out);
    default:
      return direct_block<kPass, T, 4>(s, first, rows, shift, out);
  }
}

inline bool are_good(const double* sums, int64_t rows) {
  bool good = true;
  for (int64_t r = 0; r < rows; ++r) good = good && sums[r] > kLeastSum && sums[r] < kMostSum;
  return good;
}

// The sums of a block of rows and the shifts that they are relative to: those given, or the largest
// scores where the given ones are no good guess.
template <class T>
void shifted_sums(const ScoreArgs& s, int64_t first, int64_t rows, T* shift, double* sums) {
  bool good = true;
  for (int64_t r = 0; r < rows; ++r) good = good && shift[r] - shift[r] == T(0);
  for (int attempt = good ? 0 : 1; attempt < 2; ++attempt) {
    if (attempt == 1) {
      for (int64_t r = 0; r < rows; ++r) shift[r] = T(0);
      score_block<kLargest, T>(s, first, rows, shift, sums);
      for (int64_t r = 0; r < rows; ++r) shift[r] = static_cast<T>(sums[r]);
    }
    score_block<kSum, T>(s, first, rows, shift, sums);
    if (are_good(sums, rows)) return;
  }
}

// ---- passes ------------------------------------------------------------------------------------
template <class T>
void softmin_block(const SoftminArgs& a, int64_t block) {
  constexpr int64_t w = Vec<double>::kLanes;
  const int64_t first = block * a.task, left = a.scores.rows - first;
  const int64_t rows = left < a.task ? left : a.task;
  T shift[kTransportRows];
  alignas(64) double sums[kTransportRows + w], logs[kTransportRows + w];
  for (int64_t r = 0; r < rows; ++r) shift[r] = static_cast<T>(a.shift[first + r]);
  shifted_sums<T>(a.scores, first, rows, shift, sums);
  for (int64_t r = rows; r < rows + w; ++r) sums[r] = 1;
  for (int64_t r = 0; r < rows; r += w) log_(Vec<double>::load(sums + r)).store(logs + r);
  alignas(64) double ratio[kTransportRows + w], wanted[kTransportRows + w];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = first + r;
    const double log2 = shift[r] + logs[r] / kLog2, old = a.potential[i];
    const double soft = (a.squares ? a.squares[i] : 0) - a.unit * log2;
    const double origin = a.origin ? a.origin[i] : 0;
    a.shift[i] = log2;
    a.result[i] = old + a.blend * (a.damp * (soft + origin) - origin - old);
    ratio[r] = (old - soft) / a.epsilon;
    wanted[r] = a.origin ? -(old + origin) / a.penalty : 0;
  }
  for (int64_t r = rows; r < rows + w; ++r) ratio[r] = wanted[r] = 0;
  double error = 0;
  for (int64_t r = 0; r < rows; r += w) {
    const Vec<double> d = exp_(Vec<double>::load(ratio + r)) - exp_(Vec<double>::load(wanted + r));
    abs_(d).store(ratio + r);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double mass = a.mass[first + r];  // without mass the ratio may be infinite
    error += mass == 0 ? 0 : mass * ratio[r];
  }
  a.errors[block] = error;
}

// out = P matrix.  A tile of the plan is the left factor of a product with the rows of the matrix.
template <class T>
void product_blocks(const PlanProductArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t panel = kPanel<T>;
  const int64_t padded = whole_panels<T>(a.width);
  T* part = static_cast<T*>(aligned_alloc(64, (kTransportRows * panel * sizeof(T) + 63) / 64 * 64));
  double* sum = static_cast<double*>(malloc(kTransportRows * padded * sizeof(double)));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * a.task, left = a.scores.rows - first;
    const int64_t rows = left < a.task ? left : a.task;
    for (int64_t i = 0; i < rows * padded; ++i) sum[i] = 0;
    each_tile<T>(a.scores, first, rows, [&](int64_t column, int64_t width, Rows<T> tile) {
      for (int64_t r = 0; r < rows; ++r) {
        T* row = tile.p + r * tile.stride;
        each_score(a.scores, row, column, width, static_cast<T>(a.shift[first + r]),
                   [&](Vec<T> t, int64_t j) { exp2_of_score(t).store(row + j); });
      }
      const int64_t most = a.scores.columns - column, depth = width < most ? width : most;
      for (int64_t c = 0; c < padded; c += panel) {
        const T* right = typed<T>(a.matrix) + c * a.scores.columns + column * panel;
        gemm_columns<T, 2>({tile.p, tile.stride, 1}, right, panel, rows, depth, {part, panel},
                           false);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < panel; ++i) sum[r * padded + c + i] += part[r * panel + i];
        }
      }
    });
    T* out = typed<T>(a.out) + first * a.width;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < a.width; ++c)
        out[r * a.width + c] = static_cast<T>(sum[r * padded + c]);
    }
  }
  free(part);
  free(sum);
}

// A term of a row that is drawn from: none where a column has no mass, which is never drawn.
template <class T>
PFK_HD Vec<T> drawn_term(Vec<T> t) {
  return select(t > Vec<T>(T(1 - Float<T>::kBias)), exp2_of_score(t), Vec<T>(T(0)));
}

// The column of a tile of a row up to which terms exceed `rest`; that of the largest one should
// rounding leave something over.
template <class T>
int64_t column_in_tile(const ScoreArgs& s, int64_t row, int64_t tile, T shift, double rest) {
  const int64_t column = tile * kTileColumns<T>, most = s.columns - column;
  const int64_t count = most < kTileColumns<T> ? most : kTileColumns<T>;
  const int64_t width = whole_panels<T>(count);
  alignas(64) T terms[kTileColumns<T>];
  fill_tile<T>(s, row, 1, column, width, Rows<T>{terms, kTileColumns<T>});
  each_score(s, terms, column, width, shift,
             [&](Vec<T> t, int64_t j) { drawn_term(t).store(terms + j); });
  int64_t largest = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (rest < terms[j]) return column + j;
    if (terms[j] > terms[largest]) largest = j;
    rest -= terms[j];
  }
  return column + largest;
}

// A column of each row, drawn by the inverse of the row's distribution function: a pass finds the
// sums of the tiles, and the tile in which the uniform number lies is made once more.
template <class T>
void draw_block(const PlanDrawArgs& a, int64_t block) {
  const ScoreArgs& s = a.scores;
  const int64_t first = block * a.task, left = s.rows - first;
  const int64_t rows = left < a.task ? left : a.task;
  const int64_t tiles = (s.columns + kTileColumns<T> - 1) / kTileColumns<T>;
  T shift[kTransportRows];
  double total[kTransportRows];
  for (int64_t r = 0; r < rows; ++r) shift[r] = static_cast<T>(a.shift[first + r]);
  double* sums = static_cast<double*>(malloc(rows * tiles * sizeof(double)));
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (int64_t r = 0; r < rows; ++r) total[r] = 0;
    each_tile<T>(s, first, rows, [&](int64_t column, int64_t width, Rows<T> tile) {
      for (int64_t r = 0; r < rows; ++r) {
        Vec<T> sum = T(0);
        each_score(s, tile.p + r * tile.stride, column, width, shift[r],
                   [&](Vec<T> t, int64_t) { sum += drawn_term(t); });
        total[r] += sums[r * tiles + column / kTileColumns<T>] = sum_lanes(sum);
      }
    });
    if (attempt == 1 || are_good(total, rows)) break;
    shifted_sums<T>(s, first, rows, shift, total);  // potentials that solve nothing
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double* sum = sums + r * tiles;
    double rest = 0;
    int64_t i = 0, last = 0;  // last: with a column that has mass
    for (int64_t k = 0; k < tiles; ++k) {
      rest += sum[k];
      if (sum[k] > 0) last = k;
    }
    rest *= a.uniforms[first + r];
    while (i < last && !(rest < sum[i])) rest -= sum[i++];
    a.out[first + r] = column_in_tile(s, first + r, i, shift[r], rest);
  }
  free(sums);
}

}  // namespace

PFK_END
