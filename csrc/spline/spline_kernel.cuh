// SPDX-License-Identifier: Apache-2.0
// The spline kernel.  A block has a tile of elements in shared memory, with a row of raw parameters
// for each thread.  The step between rows is an odd number of words, so that threads that read the
// same column use different banks.  The formulas work in the tile, because they index its columns
// at run time, which registers do not allow.
#pragma once

#include "core/cuda.cuh"
#include "spline/spline_args.h"
#include "spline/spline_kinds.h"

PFK_BEGIN

constexpr int kSplineThreads = 128;

// How elements are distributed over blocks: whole samples to each, or chunks of one sample.
struct SplineGrid {
  int elements, rows;  // elements of a block, at most; samples of a block, 0 for chunks
  int64_t chunks;      // of a sample
  int stride;          // between rows of the tile
  bool wide;           // raw parameters of a block are whole packs
  bool wide_x;         // elements of x of a block are whole packs
  Divider features, length, places;
  const int32_t* channel;  // the transformed channels in order, or null
  double* partial;         // log-dets of the chunks
};

// A thread's row.
template <class T>
struct SharedTile {
  T* p;
  PFK_HD T get(int c) const { return p[c]; }
  PFK_HD void put(int c, T v) { p[c] = v; }
};

struct BlockOfElements {
  int64_t row, begin;  // first sample; first element of all
  int count;
};

__device__ inline BlockOfElements block_of(const SplineArgs& a, const SplineGrid& g) {
  BlockOfElements b;
  if (g.rows > 0) {
    b.row = static_cast<int64_t>(blockIdx.x) * g.rows;
    b.begin = b.row * a.features;
    const int64_t rows = min(static_cast<int64_t>(g.rows), a.samples - b.row);
    b.count = static_cast<int>(rows * a.features);
  } else {
    b.row = blockIdx.x / g.chunks;
    const int64_t at = (blockIdx.x - b.row * g.chunks) * g.elements;
    b.begin = b.row * a.features + at;
    b.count = static_cast<int>(min(static_cast<int64_t>(g.elements), a.features - at));
  }
  return b;
}

// Where an element lies: in x, and in the parameters of a source.
struct ElementPlace {
  int64_t sample, x, row, at;
  bool moved;
};

__device__ inline ElementPlace place_of(const SplineArgs& a, const SplineGrid& g, int64_t element,
                                        const bool* mask) {
  ElementPlace p;
  p.sample = g.features.quotient(element);
  const int64_t e = element - p.sample * a.features;
  p.row = g.length.quotient(e), p.at = e - p.row * a.length;
  p.moved = true;
  int64_t x = a.x_start + p.row * a.x_outer + p.at * a.x_inner;
  if (mask != nullptr) {
    int64_t channel = a.channels_last ? p.at : p.row;
    const int64_t pixel = a.channels_last ? p.row : p.at;
    if (g.channel != nullptr) {
      const int64_t rank = channel;
      channel = g.channel[rank];
      p.moved = channel >= 0;
      if (!p.moved) channel = 0;
    } else {
      p.moved = mask[channel * a.space + pixel];
    }
    x = a.channels_last ? pixel * a.channels + channel : channel * a.space + pixel;
  }
  p.x = p.sample * a.x_features + x;
  return p;
}

// Moves contiguous rows in packs between memory and the tile.
template <class S, class T, bool kStore>
__device__ void move_packs(const SplineSource& s, int64_t begin, int count, T* tile, int stride) {
  using P = Pack<S, true>;
  constexpr int w = P::kCount;
  const int total = count * s.columns, columns = s.columns;
  const int64_t from = begin * columns;
  for (int i = threadIdx.x * w; i < total; i += kSplineThreads * w) {
    int row = i / columns, c = i - row * columns;
    if (i + w <= total) {
      P pack{};
      if (!kStore) pack = P::load(static_cast<const S*>(s.raw) + from + i);
#pragma unroll
      for (int j = 0; j < w; ++j) {
        T& number = tile[row * stride + s.first + c];
        if (kStore) {
          pack.lanes[j] = narrow<S>(number);
        } else {
          number = widen(pack.lanes[j]);
        }
        if (++c == columns) c = 0, ++row;
      }
      if (kStore) pack.store(static_cast<S*>(s.grad) + from + i);
    } else {
      for (int j = 0; i + j < total; ++j) {
        T& number = tile[row * stride + s.first + c];
        if (kStore) {
          static_cast<S*>(s.grad)[from + i + j] = narrow<S>(number);
        } else {
          number = widen(static_cast<const S*>(s.raw)[from + i + j]);
        }
        if (++c == columns) c = 0, ++row;
      }
    }
  }
}

// Moves rows from or to any place; neighbouring threads take neighbouring numbers.
template <class S, class T, bool kStore>
__device__ void move_numbers(const SplineSource& s, int64_t begin, int count, T* tile, int stride,
                             const int64_t* place) {
  const bool in_rows = s.bin == 1;
  const bool fresh = kStore && s.grad_step != 0;
  for (int i = threadIdx.x; i < count * s.columns; i += kSplineThreads) {
    const int side = in_rows ? s.columns : count, q = i / side, r = i - q * side;
    const int row = in_rows ? q : r, c = in_rows ? r : q;
    const int64_t at = fresh ? (begin + row) * s.grad_step + c : place[row] + c * s.bin;
    T& number = tile[row * stride + s.first + c];
    if (kStore) {
      static_cast<S*>(s.grad)[at] = narrow<S>(number);
    } else {
      number = widen(static_cast<const S*>(s.raw)[at]);
    }
  }
}

// Moves all sources; `place` is shared memory for the starts of rows.
template <class S, class T, bool kStore>
__device__ void move_tile(const SplineArgs& a, const SplineGrid& g, const BlockOfElements& b,
                          const ElementPlace& mine, T* tile, int64_t* place) {
  for (int j = 0; j < a.sources; ++j) {
    const SplineSource& s = a.source[j];
    if (g.wide) {
      move_packs<S, T, kStore>(s, b.begin, b.count, tile, g.stride);
      continue;
    }
    __syncthreads();
    if (threadIdx.x < b.count)
      place[threadIdx.x] = mine.sample * s.sample + mine.row * s.outer + mine.at * s.inner;
    __syncthreads();
    move_numbers<S, T, kStore>(s, b.begin, b.count, tile, g.stride, place);
  }
  __syncthreads();
}

// The sum of each sample of the block, in an order that does not depend on the place of the sample.
template <class T>
__device__ void sum_samples(const SplineArgs& a, const SplineGrid& g, const BlockOfElements& b,
                            const T* terms) {
  const int width = g.rows > 0 ? static_cast<int>(a.features) : b.count;
  const int rows = g.rows > 0 ? b.count / width : 1, lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < rows; r += kSplineThreads / 32) {
    double sum = 0;
    for (int i = lane; i < width; i += 32) sum += terms[r * width + i];
    sum = lanes_sum(sum);
    if (lane != 0) continue;
    if (g.rows > 0) {
      static_cast<T*>(a.log_det)[b.row + r] = static_cast<T>(sum);
    } else {
      g.partial[blockIdx.x] = sum;
    }
  }
}

// Transforms a thread's element, or leaves it as it is.  Given its input x and, backward, the
// gradient of its output, returns the output or the gradient of the input.
template <int kKind, class T, bool kBackward>
__device__ T transform_element(const SplineArgs& a, const SplineMap<T>& m, const ElementPlace& mine,
                               SharedTile<T> row, T x, T upstream, T* log_slope) {
  const bool each = a.flags & kSplineElementwise;
  if constexpr (kBackward) {
    const T grad_log = static_cast<const T*>(a.grad_log)[each ? mine.x : mine.sample];
    if (mine.moved) return spline_vjp<kKind, AnySpline, T>(m, row, x, upstream, grad_log);
    for (int c = 0; c < a.columns; ++c) row.put(c, T(0));
    return x;
  } else {
    *log_slope = T(0);
    if (!mine.moved) return x;
    const SplineValue<T> r = spline_apply<kKind, AnySpline, T>(m, row, x);
    *log_slope = r.log_slope;
    if (each) static_cast<T*>(a.log_det)[mine.x] = r.log_slope;
    return r.out;
  }
}

template <int kKind, class S, bool kBackward>
__global__ void __launch_bounds__(kSplineThreads, sizeof(Compute<S>) == 8 ? 2 : 4)
    spline_kernel(const SplineArgs a, const SplineMap<Compute<S>> m, const SplineGrid g,
                  const bool* mask) {
  using T = Compute<S>;
  PFK_SHARED_MEMORY(memory);
  int64_t* place = reinterpret_cast<int64_t*>(memory);
  T* terms = reinterpret_cast<T*>(place + g.elements);
  T* staged = terms + g.elements;
  T* tile = staged + g.elements;
  const BlockOfElements b = block_of(a, g);
  const int i = threadIdx.x;
  const bool active = i < b.count;
  const ElementPlace mine = place_of(a, g, active ? b.begin + i : 0, mask);
  const S* passing = static_cast<const S*>(kBackward ? a.grad_out : a.in);
  S* out = static_cast<S*>(a.out);
  SplineSource x{};
  x.columns = 1, x.raw = a.in, x.grad = a.out;
  if (g.wide_x) {
    move_packs<S, T, false>(x, b.begin, b.count, staged, 1);
    x.raw = a.grad_out;
    if (kBackward) move_packs<S, T, false>(x, b.begin, b.count, terms, 1);
  }
  move_tile<S, T, false>(a, g, b, mine, tile, place);

  if (active) {
    const T v = g.wide_x ? staged[i] : T(widen(static_cast<const S*>(a.in)[mine.x]));
    T upstream = T(0);
    if (kBackward) upstream = g.wide_x ? terms[i] : T(widen(passing[mine.x]));
    const T result = transform_element<kKind, T, kBackward>(
        a, m, mine, SharedTile<T>{tile + i * g.stride}, v, upstream, terms + i);
    if (g.wide_x) {
      staged[i] = result;
    } else if (mine.moved) {
      out[mine.x] = narrow<S>(result);
    } else if (g.channel == nullptr) {
      out[mine.x] = passing[mine.x];
    }
  }
  __syncthreads();
  if (g.wide_x) move_packs<S, T, true>(x, b.begin, b.count, staged, 1);
  if constexpr (kBackward) {
    move_tile<S, T, true>(a, g, b, mine, tile, place);
  } else {
    if (!(a.flags & kSplineElementwise)) sum_samples(a, g, b, terms);
  }
}

PFK_END
