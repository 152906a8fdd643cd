// SPDX-License-Identifier: Apache-2.0
// Gradients of the parameters of channel mixing on a GPU: sums over all pixels in a fixed order.
#pragma once

#include "linear/linear_mix.cuh"

PFK_BEGIN
namespace {

// ---- G = sum grad_y v^T, g = sum grad_y ---------------------------------------------------------
constexpr int power_of_two_below(int n) { return n < 2 ? 1 : 2 * power_of_two_below(n / 2); }

template <class S, int kGroups>
struct GradientTile {
  using T = Compute<S>;
  static constexpr int kRows = 8 * kGroups, kStride = kRows + 4;  // stores use different banks
  static constexpr int kPixels = power_of_two_below(16384 / static_cast<int>(sizeof(T)) / kRows);
  static constexpr int kTeam = kGroups * kGroups;                 // threads that compute G once
  static constexpr int kTeams = power_of_two_below(256 / kTeam);  // each takes its own pixels
  static constexpr int kThreads = kTeams * kTeam;

  T g[kPixels][kStride], v[kPixels][kStride];
};

template <class S>
struct GradientTask {
  Pixels p;
  const S* grad_y;
  const S* x;
  const Compute<S>* grad_log_det;
  int64_t samples;
  double*
      partial;  // [blocks, channels (channels + 1) + 1]: G beside g, and the sum of grad_log_det

  __device__ int64_t outputs() const { return p.channels * (p.channels + 1) + 1; }
};

// Pixels [first, first + kPixels) of all channels, transposed where pixels are innermost: a warp
// then takes few pixels of many channels, which fill 32-byte sectors and spread over the banks.
template <class P, class S, class Tile, class F>
__device__ void load_transposed(const Pixels& p, const S* from, int64_t first,
                                Compute<S> (&to)[Tile::kPixels][Tile::kStride], F change) {
  if (p.flat()) {
    constexpr int kUnits = Tile::kRows / P::kCount;
    for (int e = threadIdx.x; e < Tile::kPixels * kUnits; e += Tile::kThreads) {
      const int row = e / kUnits, c = e % kUnits * P::kCount;
      const bool inside = first + row < p.count && c < p.channels;
      P pack{};
      if (inside) pack = P::load(from + (first + row) * p.channels + c);
#pragma unroll
      for (int l = 0; l < P::kCount; ++l) {
        to[row][c + l] = inside ? change(widen(pack.lanes[l]), c + l) : Compute<S>(0);
      }
    }
    return;
  }
  constexpr int kBeside = P::kCount > 1 ? 2 : 8, kBelow = 32 / kBeside;  // of a warp
  constexpr int kAcross = Tile::kPixels / P::kCount / kBeside;
  constexpr int kDown = (Tile::kRows + kBelow - 1) / kBelow;
  for (int e = threadIdx.x; e < kAcross * kDown * 32; e += Tile::kThreads) {
    const int row = (e / 32 % kAcross * kBeside + e % kBeside) * P::kCount;
    const int c = e / 32 / kAcross * kBelow + e % 32 / kBeside;
    if (c >= Tile::kRows) continue;
    const bool inside = first + row < p.count && c < p.channels;
    P pack{};
    if (inside) pack = P::load(from + p.begin(first + row) + c * p.inner);
#pragma unroll
    for (int l = 0; l < P::kCount; ++l) {
      to[row + l][c] = inside ? change(widen(pack.lanes[l]), c) : Compute<S>(0);
    }
  }
}

template <class P, class S, class Tile>
__device__ void load_both(Tile& t, const GradientTask<S>& task, const Parameters<Compute<S>>& k,
                          int64_t first) {
  using T = Compute<S>;
  load_transposed<P, S, Tile>(task.p, task.grad_y, first, t.g, [](T value, int) { return value; });
  load_transposed<P, S, Tile>(task.p, task.x, first, t.v,
                              [&](T value, int c) { return value + k.pre(c); });
}

// Adds the sums of all teams to those of the first one, half of the teams at a time, one row of 8
// through `scratch` at a time.
template <class Tile, class T>
__device__ void join_teams(T (&sum)[9][8], T* scratch) {
  const int team = threadIdx.x / Tile::kTeam;
  for (int half = Tile::kTeams / 2; half > 0; half /= 2) {
#pragma unroll
    for (int r = 0; r < 9; ++r) {
      __syncthreads();
      if (team >= half && team < 2 * half) {
#pragma unroll
        for (int l = 0; l < 8; ++l) scratch[threadIdx.x * 8 + l] = sum[r][l];
      }
      __syncthreads();
      if (team < half) {
        const int other = threadIdx.x + half * Tile::kTeam;
#pragma unroll
        for (int l = 0; l < 8; ++l) sum[r][l] += scratch[other * 8 + l];
      }
    }
  }
}

// Adds the products of a tile's pixels to this thread's 8 x 8 sums, and the sums of its rows.
template <class Tile, class T>
__device__ __forceinline__ void add_pixels(const Tile& t, int team, int row, int column,
                                           T (&sum)[9][8]) {
#pragma unroll 2
  for (int p = team; p < Tile::kPixels; p += Tile::kTeams) {
    T a[8], b[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) a[r] = t.g[p][row + r];
#pragma unroll
    for (int l = 0; l < 8; ++l) b[l] = t.v[p][column + l];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      sum[8][r] += a[r];
#pragma unroll
      for (int l = 0; l < 8; ++l) sum[r][l] += a[r] * b[l];
    }
  }
}

// This block's share of the sum of grad_log_det; `shares` holds a number for each thread.
template <class Tile, class S>
__device__ void sum_log_dets(const GradientTask<S>& task, double* shares, double* out) {
  __syncthreads();
  double share = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * Tile::kThreads;
  int64_t n = static_cast<int64_t>(blockIdx.x) * Tile::kThreads + threadIdx.x;
  for (; n < task.samples; n += step) share += task.grad_log_det[n];
  shares[threadIdx.x] = share;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  for (int i = threadIdx.x + 32; i < Tile::kThreads; i += 32) share += shares[i];
  share = lanes_sum(share);
  if (threadIdx.x == 0) *out = share;
}

template <class S, int kGroups>
__global__ void __launch_bounds__(GradientTile<S, kGroups>::kThreads, 1)
    gradient_kernel(const GradientTask<S> task, const Parameters<Compute<S>> k) {
  using Tile = GradientTile<S, kGroups>;
  using T = Compute<S>;
  __shared__ __align__(16) Tile t;
  const int team = threadIdx.x / Tile::kTeam, member = threadIdx.x % Tile::kTeam;
  const int row = member / kGroups * 8, column = member % kGroups * 8;
  T sum[9][8] = {};  // the last row is g of these rows
  const int64_t tiles = (task.p.count + Tile::kPixels - 1) / Tile::kPixels;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    __syncthreads();
    if (task.p.wide) {
      load_both<Pack<S, true>, S>(t, task, k, tile * Tile::kPixels);
    } else {
      load_both<Pack<S, false>, S>(t, task, k, tile * Tile::kPixels);
    }
    __syncthreads();
    add_pixels(t, team, row, column, sum);
  }
  join_teams<Tile>(sum, &t.g[0][0]);
  double* out = task.partial + blockIdx.x * task.outputs();
  const int64_t c = task.p.channels, width = c + 1;
  if (team == 0) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int l = 0; l < 8; ++l) {
        if (row + r < c && column + l < c) out[(row + r) * width + column + l] = sum[r][l];
      }
      if (column == 0 && row + r < c) out[(row + r) * width + c] = sum[8][r];
    }
  }
  sum_log_dets<Tile>(task, reinterpret_cast<double*>(&t), out + task.outputs() - 1);
}

// Block (., s) adds up the s-th part of the blocks' sums.
__global__ void __launch_bounds__(kThreads)
    join_kernel(const double* partial, int64_t blocks, int64_t outputs, double* segments) {
  const int64_t o = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (o >= outputs) return;
  const int64_t each = (blocks + kSegments - 1) / kSegments, begin = blockIdx.y * each;
  const int64_t end = min(blocks, begin + each);
  double sum = 0;
#pragma unroll 8
  for (int64_t b = begin; b < end; ++b) sum += partial[b * outputs + o];
  segments[blockIdx.y * outputs + o] = sum;
}

__device__ double joined(const double* segments, int64_t outputs, int64_t o) {
  double sum = 0;
#pragma unroll
  for (int s = 0; s < kSegments; ++s) sum += segments[s * outputs + o];
  return sum;
}

template <class T>
struct ParameterGradients {
  T* weight;
  T* log_abs_det;
  T* log_scale;
  T* bias;
};

// Block c finishes column c of the gradient of W and the gradients of the parameters of channel c;
// each thread has one other channel.
template <class T>
__global__ void __launch_bounds__(kMost)
    finish_kernel(const double* segments, int channels, double space, const Parameters<T> k,
                  const ParameterGradients<T> grad) {
  __shared__ double scales[kMost], befores[kMost];
  const int c = blockIdx.x, other = threadIdx.x, width = channels + 1;
  const int64_t outputs = static_cast<int64_t>(channels) * width + 1;
  double scale = 0, before = 0;
  if (other < channels) {
    const int64_t at = other * channels + c;
    const double factor = k.scale(k.map.scaled(other, c)), folded = k.weight[at] * factor;
    const double total = joined(segments, outputs, other * width + c);
    grad.weight[at] = static_cast<T>(total * factor);
    before = folded * joined(segments, outputs, other * width + channels);
    scale = k.map.inverse ? joined(segments, outputs, c * width + other) *
                                k.weight[c * channels + other] * k.scale(c)
                          : total * folded;
  }
  scales[other] = scale;
  befores[other] = before;
  for (int half = kMost / 2; half > 0; half /= 2) {
    __syncthreads();
    if (other < half) {
      scales[other] += scales[other + half];
      befores[other] += befores[other + half];
    }
  }
  if (other != 0) return;
  const double from_log_det = joined(segments, outputs, outputs - 1) * space;
  const double after = joined(segments, outputs, c * width + channels), sign = k.map.sign();
  grad.log_scale[c] = static_cast<T>(sign * (scales[0] + from_log_det));
  grad.bias[c] = static_cast<T>(sign * (k.map.bias_before() ? befores[0] : after));
  if (c == 0) *grad.log_abs_det = static_cast<T>(sign * from_log_det);
}

}  // namespace
PFK_END
