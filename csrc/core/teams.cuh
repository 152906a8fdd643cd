// SPDX-License-Identifier: Apache-2.0
// Elementwise maps with a sum of terms for each sample, on a GPU; rows.h does this on the CPU.
//
// A team of threads works on a row, or on a chunk of a long one.  It is a block of threads, or, for
// short rows, some lanes of a warp, a power of two.  Its threads take units of the row (16-byte
// packs, Philox blocks) in turn and leave one sum.  The order of summation is the same every run
// and wherever in the batch the row is.
#pragma once

#include "core/cuda.cuh"

PFK_BEGIN

// Blocks of a kernel that must fit on one SM.  With this bound the compiler uses up to 64 registers
// and spills none; without it, it forces some kernels into 32.
constexpr int kResident = 4;

struct TeamPlan {
  int64_t rows, features;
  int64_t chunk, chunks;  // elements of a chunk; chunks of a row
  int size;               // threads of a team
};

// Teams of lanes of a warp, each with a row of so many units.
inline TeamPlan plan_lanes(int64_t rows, int64_t features, int64_t unit) {
  TeamPlan p{rows, features, features, 1, 1};
  while (p.size < 32 && p.size * 4 * unit < features) p.size *= 2;
  return p;
}

inline TeamPlan plan_teams(int64_t rows, int64_t features, int64_t unit) {
  constexpr int64_t kLong = 8192, kShort = 2048,
                    kFull = 1024;  // kFull blocks are enough for any GPU
  if (features <= 256 * unit && features <= kShort) return plan_lanes(rows, features, unit);
  const int64_t chunk = rows * (features / kLong) >= kFull ? kLong : kShort;
  return {rows, features, chunk, (features + chunk - 1) / chunk, kThreads};
}

// Calls f.template operator()<S, kWide, kBlock>(plan): the storage type of `t` and the shape of a
// launch as template arguments.  fits(n): whether rows consist of whole, aligned packs of n
// elements.
template <class Fits, class F>
void with_teams(const Tensor& t, int64_t rows, int64_t features, Fits fits, F f) {
  each_storage(t, [&](auto type) {
    using S = decltype(type);
    constexpr int64_t width = 16 / sizeof(S);
    const bool wide = fits(width);
    const TeamPlan plan = plan_teams(rows, features, wide ? width : 1);
    const bool block = plan.size == kThreads;
    if (wide) {
      block ? f.template operator()<S, true, true>(plan)
            : f.template operator()<S, true, false>(plan);
    } else {
      block ? f.template operator()<S, false, true>(plan)
            : f.template operator()<S, false, false>(plan);
    }
  });
}

inline int64_t blocks_of(const TeamPlan& p) {
  return p.size == kThreads ? p.rows * p.chunks : (p.rows * p.size + kThreads - 1) / kThreads;
}

template <bool kBlock>
struct Team {
  int64_t row, chunk;
  int64_t begin, end;  // within the row; empty for the lanes beyond the last row, which still take
                       // part in shuffles
  int rank, size;

  __device__ explicit Team(const TeamPlan& p) {
    if constexpr (kBlock) {
      row = blockIdx.x / p.chunks;
      chunk = blockIdx.x % p.chunks;
      rank = threadIdx.x;
      size = kThreads;
    } else {
      row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / p.size;
      chunk = 0;
      rank = threadIdx.x % p.size;
      size = p.size;
    }
    begin = row < p.rows ? chunk * p.chunk : 0;
    end = row < p.rows ? min(p.features, begin + p.chunk) : 0;
  }

  // Rank 0 has the sum of the team.
  __device__ double sum(double value, double* scratch) const {
    if constexpr (kBlock) {
      return block_sum(value, scratch);
    } else {
      return lanes_sum(value, size);
    }
  }
};

// Where the sum of a row goes: to its result, or if the row has several chunks to partial, for
// sum_chunks_kernel.
template <class T>
struct TeamSums {
  T* out;
  double* partial;  // [rows, chunks]
  double constant;  // of every row
  const T* add;     // of each row, or null

  __device__ void finish(int64_t row, double total) const {
    out[row] = static_cast<T>(total + constant + (add != nullptr ? double(add[row]) : 0.0));
  }
  template <bool kBlock>
  __device__ void put(const Team<kBlock>& t, const TeamPlan& p, double total) const {
    if (t.rank != 0 || t.row >= p.rows) return;
    if (p.chunks == 1) {
      finish(t.row, total);
    } else {
      partial[t.row * p.chunks + t.chunk] = total;
    }
  }
};

namespace {

// A warp adds up a row: a single thread would wait for memory at every chunk.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(const TeamPlan p, const TeamSums<T> sums) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / 32;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % 32;
  double total = 0;
  for (int64_t c = lane; c < p.chunks; c += 32) total += sums.partial[row * p.chunks + c];
  total = lanes_sum(total);
  if (lane == 0) sums.finish(row, total);
}

inline unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "pyflowkern: too many elements for one launch");
  return static_cast<unsigned>(blocks);
}
inline unsigned grid_for(int64_t threads) { return grid_of((threads + kThreads - 1) / kThreads); }

// Memory for the sums of chunks.  It may be freed once its last kernel is launched: torch's
// allocator reuses memory in stream order.
inline Tensor chunk_sums(const Tensor& like, const TeamPlan& p) {
  return empty(like, {p.chunks > 1 ? p.rows * p.chunks : 0}, ScalarType::Double);
}

template <class T>
void launch_sum_chunks(const TeamPlan& p, const TeamSums<T>& sums, cudaStream_t stream) {
  if (p.chunks == 1) return;
  PFK_LAUNCH(sum_chunks_kernel<T>, grid_for(32 * p.rows), kThreads, stream, p, sums);
}

}  // namespace

PFK_END
