// SPDX-License-Identifier: Apache-2.0
// y = A (x + pre) + post on a GPU, A at most 128 x 128: the forward product, and with the
// transposed matrix the gradient of x.
#pragma once

#include "core/cuda.cuh"
#include "linear/linear.h"

PFK_BEGIN
namespace {

constexpr int kMost = 128;     // channels
constexpr int kSegments = 8;   // parts in which the sums of blocks are added up
constexpr int kBlocks = 1056;  // enough for any GPU; each loads the matrix once

template <class T>
struct Parameters {
  MixMap map;
  const T* weight;
  const T* log_scale;  // or null
  const T* bias;       // or null

  __device__ T scale(int64_t c) const {
    return log_scale ? exp_(map.inverse ? -log_scale[c] : log_scale[c]) : T(1);
  }
  __device__ T pre(int64_t c) const { return bias && map.bias_before() ? signed_bias(c) : T(0); }
  __device__ T post(int64_t c) const { return bias && !map.bias_before() ? signed_bias(c) : T(0); }
  __device__ T signed_bias(int64_t c) const { return map.inverse ? -bias[c] : bias[c]; }
};

template <class T>
struct LogDets {
  const T* log_abs_det;
  T* out;  // or null
  int64_t samples;
  double space;
};

// Pixels in memory: channel c of pixel q is at begin(q) + c step().
struct Pixels {
  int64_t count, channels, inner;  // inner = 0: channels innermost
  bool wide;                       // 16-byte accesses are aligned and stay within a sample or pixel

  __device__ bool flat() const { return inner == 0; }
  __device__ int64_t step() const { return flat() ? 1 : inner; }
  __device__ int64_t begin(int64_t q) const {
    if (flat()) return q * channels;
    if (count <= INT32_MAX) {  // 64-bit division is slow
      const uint32_t p = static_cast<uint32_t>(q), n = static_cast<uint32_t>(inner);
      return static_cast<int64_t>(p / n) * channels * inner + p % n;
    }
    return q / inner * channels * inner + q % inner;
  }
};

// ---- y = A (x + pre) + post --------------------------------------------------------------------
template <class S, int kGroups>
struct MixTile {
  using T = Compute<S>;
  static constexpr int kRows = 8 * kGroups;  // output channels
  static constexpr int kAcross = (kGroups & (kGroups - 1) ? 192 : 256) / kGroups;
  static constexpr int kThreads = kGroups * kAcross;
  static constexpr int kEach = 16 / sizeof(S);  // pixels of a thread
  static constexpr int kPixels = kAcross * kEach;
  static constexpr int kDepth = sizeof(S) == 2 ? 8 : 16;              // input channels of a step
  static constexpr bool kWhole = kRows * kRows * sizeof(T) <= 37000;  // the matrix fits whole

  T matrix[kWhole ? kRows : kDepth][kRows];  // [input channel][output channel]
  T x[kDepth][kPixels + kEach];
  T scale[kRows], pre[kRows], post[kRows];
  double log_det;
};

template <class Tile>
struct MixTask {
  using T = typename Tile::T;
  Pixels p;
  const void* x;
  void* y;
  bool transposed;  // the matrix, and no bias: the backward product
};

template <class S, class Tile>
__device__ void load_matrix(Tile& t, const Parameters<Compute<S>>& k, const MixTask<Tile>& task,
                            int first, int depth) {
  const int c = static_cast<int>(task.p.channels);
  for (int e = threadIdx.x; e < depth * Tile::kRows; e += Tile::kThreads) {
    const int in = e / Tile::kRows, out = e % Tile::kRows;
    const int i = task.transposed ? first + in : out, j = task.transposed ? out : first + in;
    const bool inside = i < c && j < c;
    t.matrix[in][out] = inside ? k.weight[i * c + j] * t.scale[k.map.scaled(i, j)] : Compute<S>(0);
  }
}

// Loads x + pre of channels [first, first + kDepth) to shared memory, P::kCount elements at a time.
template <class P, class S, class Tile>
__device__ void load_pixels(Tile& t, const MixTask<Tile>& task, int64_t tile, int first) {
  const Pixels& p = task.p;
  const S* x = static_cast<const S*>(task.x);
  if (p.flat()) {
    constexpr int kUnits = Tile::kDepth / P::kCount;
    for (int e = threadIdx.x; e < Tile::kPixels * kUnits; e += Tile::kThreads) {
      const int column = e / kUnits, in = e % kUnits * P::kCount;
      const int64_t q = tile * Tile::kPixels + column, c = first + in;
      const bool inside = q < p.count && c < p.channels;
      P pack{};
      if (inside) pack = P::load(x + q * p.channels + c);
#pragma unroll
      for (int l = 0; l < P::kCount; ++l) {
        t.x[in + l][column] = inside ? widen(pack.lanes[l]) + t.pre[c + l] : Compute<S>(0);
      }
    }
    return;
  }
  const int group = threadIdx.x / Tile::kAcross, across = threadIdx.x % Tile::kAcross;
#pragma unroll
  for (int part = 0; part < Tile::kEach / P::kCount; ++part) {
    const int column = across * Tile::kEach + part * P::kCount;
    const int64_t q = tile * Tile::kPixels + column, begin = p.begin(q);
    for (int in = group; in < Tile::kDepth; in += Tile::kThreads / Tile::kAcross) {
      const int64_t c = first + in;
      const bool inside = q < p.count && c < p.channels;
      P pack{};
      if (inside) pack = P::load(x + begin + c * p.inner);
#pragma unroll
      for (int l = 0; l < P::kCount; ++l) {
        t.x[in][column + l] = inside ? widen(pack.lanes[l]) + t.pre[c] : Compute<S>(0);
      }
    }
  }
}

template <class P, class S, class Tile>
__device__ void store_pixels(const Tile& t, const MixTask<Tile>& task, int64_t tile,
                             const Compute<S> (&sum)[8][Tile::kEach]) {
  const Pixels& p = task.p;
  S* y = static_cast<S*>(task.y);
  const int row = threadIdx.x / Tile::kAcross * 8;
  const int64_t first = tile * Tile::kPixels + threadIdx.x % Tile::kAcross * Tile::kEach;
  if (p.flat()) {
#pragma unroll
    for (int j = 0; j < Tile::kEach; ++j) {
#pragma unroll
      for (int r = 0; r < 8; r += P::kCount) {
        if (first + j >= p.count || row + r >= p.channels) continue;
        P pack;
#pragma unroll
        for (int l = 0; l < P::kCount; ++l) {
          pack.lanes[l] = narrow<S>(sum[r + l][j] + t.post[row + r + l]);
        }
        pack.store(y + (first + j) * p.channels + row + r);
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < Tile::kEach; j += P::kCount) {
    if (first + j >= p.count) continue;
    const int64_t begin = p.begin(first + j);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (row + r >= p.channels) continue;
      P pack;
#pragma unroll
      for (int l = 0; l < P::kCount; ++l) {
        pack.lanes[l] = narrow<S>(sum[r][j + l] + t.post[row + r]);
      }
      pack.store(y + begin + (row + r) * p.inner);
    }
  }
}

template <class T, class Tile>
__device__ void multiply(const Tile& t, int at, int depth, T (&sum)[8][Tile::kEach]) {
  const int row = threadIdx.x / Tile::kAcross * 8;
  const int column = threadIdx.x % Tile::kAcross * Tile::kEach;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    T a[8], b[Tile::kEach];
#pragma unroll
    for (int r = 0; r < 8; ++r) a[r] = t.matrix[at + k][row + r];
#pragma unroll
    for (int j = 0; j < Tile::kEach; ++j) b[j] = t.x[k][column + j];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int j = 0; j < Tile::kEach; ++j) sum[r][j] += a[r] * b[j];
    }
  }
}

// Loads scale, pre and post to shared memory; every block then writes its share of the log-dets.
template <class S, class Tile>
__device__ void prepare(Tile& t, const Parameters<Compute<S>>& k, const MixTask<Tile>& task,
                        const LogDets<Compute<S>>& d) {
  const int c = static_cast<int>(task.p.channels);
  for (int i = threadIdx.x; i < Tile::kRows; i += Tile::kThreads) {
    const bool biased = i < c && !task.transposed;
    t.scale[i] = i < c ? k.scale(i) : Compute<S>(0);
    t.pre[i] = biased ? k.pre(i) : Compute<S>(0);
    t.post[i] = biased ? k.post(i) : Compute<S>(0);
  }
  if (threadIdx.x < 32 && d.out) {
    double sum = 0;
    for (int i = threadIdx.x; k.log_scale && i < c; i += 32) sum += k.log_scale[i];
    sum = lanes_sum(sum);
    if (threadIdx.x == 0) t.log_det = k.map.sign() * d.space * (sum + *d.log_abs_det);
  }
  __syncthreads();
  if (!d.out) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Tile::kThreads;
  int64_t n = static_cast<int64_t>(blockIdx.x) * Tile::kThreads + threadIdx.x;
  for (; n < d.samples; n += step) d.out[n] = static_cast<Compute<S>>(t.log_det);
}

template <class S, int kGroups>
__global__ void __launch_bounds__(MixTile<S, kGroups>::kThreads)
    mix_kernel(const MixTask<MixTile<S, kGroups>> task, const Parameters<Compute<S>> k,
               const LogDets<Compute<S>> d) {
  using Tile = MixTile<S, kGroups>;
  using T = Compute<S>;
  __shared__ __align__(16) Tile t;
  prepare<S>(t, k, task, d);
  if constexpr (Tile::kWhole) load_matrix<S>(t, k, task, 0, Tile::kRows);
  const int64_t tiles = (task.p.count + Tile::kPixels - 1) / Tile::kPixels;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    T sum[8][Tile::kEach] = {};
    for (int first = 0; first < task.p.channels; first += Tile::kDepth) {
      if constexpr (!Tile::kWhole) load_matrix<S>(t, k, task, first, Tile::kDepth);
      if (task.p.wide) {
        load_pixels<Pack<S, true>, S>(t, task, tile, first);
      } else {
        load_pixels<Pack<S, false>, S>(t, task, tile, first);
      }
      __syncthreads();
      const int left = static_cast<int>(task.p.channels) - first;
      multiply<T>(t, Tile::kWhole ? first : 0, left < Tile::kDepth ? left : Tile::kDepth, sum);
      __syncthreads();
    }
    if (task.p.wide) {
      store_pixels<Pack<S, true>, S>(t, task, tile, sum);
    } else {
      store_pixels<Pack<S, false>, S>(t, task, tile, sum);
    }
  }
}

}  // namespace
PFK_END
