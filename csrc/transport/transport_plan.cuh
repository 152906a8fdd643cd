// SPDX-License-Identifier: Apache-2.0
// A plan on a GPU whose potentials are given: its product with a matrix, and draws from its rows.
#pragma once

#include "transport/transport_kernels.cuh"

PFK_BEGIN
namespace {

// A plan does not change if a number goes from f to g: a block makes those of a problem as small as
// it can make them.
__global__ void __launch_bounds__(kThreads) balance_kernel(const DeviceProblems d) {
  __shared__ double scratch[kThreads];
  const int64_t p = blockIdx.x;
  const DeviceCloud &x = d.cloud[0], &y = d.cloud[1];
  double *f = x.potential + p * x.count, *g = y.potential + p * y.count, sum = 0;
  for (int64_t i = threadIdx.x; i < x.count; i += kThreads) sum += f[i];
  const double mean = block_join(sum, scratch, Plus()) / x.count;
  for (int64_t i = threadIdx.x; i < x.count; i += kThreads) f[i] -= mean;
  for (int64_t j = threadIdx.x; j < y.count; j += kThreads) g[j] += mean;
}

template <class T>
struct PlanMatrix {
  const T* matrix;       // [problems, columns, width]
  T* out;                // [problems, rows, width]
  int64_t width, parts;  // parts of 64 columns of the matrix, a block each
};

// What is added to the scores of a row, such that the power of two is an entry of the plan.
__device__ inline double row_weight(const DeviceCloud& c, int64_t at, double epsilon) {
  return c.log_mass[at] + (c.potential[at] - c.squares[at]) / (epsilon * kLog2);
}

// sum += a tile of the plan times `left` rows of the matrix, which pass through `step` a few at a
// time.
template <class T>
__device__ void multiply_tile(const T (&plan)[kTile][kTile + 1],
                              T (&step)[kDepthChunk][kTileStride], const T* matrix, int64_t left,
                              int64_t wide, int64_t stride, double (&sum)[kPart][kPart]) {
  const int row = threadIdx.x / kSide * kPart, column = threadIdx.x % kSide * kPart;
  T product[kPart][kPart] = {};
  for (int k = 0; k < kTile; k += kDepthChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDepthChunk * kTile; i += kThreads) {
      const int at = k + i / kTile, c = i % kTile;
      step[i / kTile][c] = at < left && c < wide ? matrix[at * stride + c] : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kDepthChunk; ++s) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
#pragma unroll
        for (int c = 0; c < kPart; ++c) product[i][c] += plan[row + i][k + s] * step[s][column + c];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
#pragma unroll
    for (int c = 0; c < kPart; ++c) sum[i][c] += static_cast<double>(product[i][c]);
  }
}

// 64 rows of the product with 64 columns of the matrix, by a block.  A tile of the plan goes to
// shared memory and is multiplied with the rows of the matrix, a few at a time.
template <class T, bool kDirect>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const DeviceProblems d, const PlanMatrix<T> m) {
  __shared__ PairTile<T, kDirect> tile;
  __shared__ T plan[kTile][kTile + 1];
  const DeviceCloud &rows = d.cloud[0], &columns = d.cloud[1];
  const int64_t part = blockIdx.x % m.parts, task = blockIdx.x / m.parts;
  const int64_t p = task / rows.blocks, first = task % rows.blocks * kTile;
  const double epsilon = d.o.epsilon;
  const T kappa = static_cast<T>(d.coefficient(epsilon));
  const T* x = typed<T>(rows.points) + (p * rows.count + first) * d.depth;
  const T* y = typed<T>(columns.points) + p * columns.count * d.depth;
  const T* weights = typed<T>(columns.weights) + p * columns.count;
  const T* matrix = m.matrix + p * columns.count * m.width + part * kTile;
  const int row = threadIdx.x / kSide * kPart, column = threadIdx.x % kSide * kPart;
  T above[kPart];
  double sum[kPart][kPart] = {};
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const bool mine = first + row + i < rows.count;
    const int64_t at = p * rows.count + first + row + i;
    above[i] = mine ? static_cast<T>(row_weight(rows, at, epsilon)) : T(0);
  }
  for (int64_t j = 0; j < columns.count; j += kTile) {
    T r[kPart][kPart];
    tile.fill(x, rows.count - first, y + j * d.depth, columns.count - j, d.depth, r);
#pragma unroll
    for (int c = 0; c < kPart; ++c) {
      const bool mine = j + column + c < columns.count;
      const T w = mine ? weights[j + column + c] : T(-1e30);
#pragma unroll
      for (int i = 0; i < kPart; ++i)
        plan[row + i][column + c] = exp2_((w + above[i]) + kappa * r[i][c]);
    }
    multiply_tile(plan, tile.x, matrix + j * m.width, columns.count - j, m.width - part * kTile,
                  m.width, sum);
  }
  for (int i = 0; i < kPart; ++i) {
    if (first + row + i >= rows.count) continue;
    T* out = m.out + (p * rows.count + first + row + i) * m.width + part * kTile;
    for (int c = 0; c < kPart; ++c) {
      if (part * kTile + column + c < m.width) out[column + c] = static_cast<T>(sum[i][c]);
    }
  }
}

// The score of a column in a row of the block's.
template <class T>
__device__ T score_of(const DeviceProblems& d, const T* x, const T* y, T weight, T kappa) {
  T r = T(0);
  for (int64_t k = 0; k < d.depth; ++k) {
    const T difference = x[k] - y[k];
    r += d.direct ? difference * difference : x[k] * y[k];
  }
  return weight + kappa * r;
}

// A column of a row, by a block: the sum of the row first, then running sums until they exceed the
// share that the uniform number says.
template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(const DeviceProblems d, const double* uniforms, int64_t* out) {
  __shared__ double scratch[kThreads];
  __shared__ int chosen, last;
  const DeviceCloud &rows = d.cloud[0], &columns = d.cloud[1];
  const int64_t at = blockIdx.x, p = at / rows.count;
  const T kappa = static_cast<T>(d.coefficient(d.o.epsilon));
  const T* x = typed<T>(rows.points) + at * d.depth;
  const T* y = typed<T>(columns.points) + p * columns.count * d.depth;
  const T* weights = typed<T>(columns.weights) + p * columns.count;
  RowSum<T> mine;
  for (int64_t j = threadIdx.x; j < columns.count; j += kThreads) {
    const T t[1] = {score_of(d, x, y + j * d.depth, weights[j], kappa)};
    mine.add(t);
  }
  const double largest = block_join(static_cast<double>(mine.largest), scratch,
                                    [](double a, double b) { return a < b ? b : a; });
  const double share =
      mine.sum * static_cast<double>(exp2_(mine.largest - static_cast<T>(largest)));
  const double wanted = uniforms[at] * block_join(share, scratch, Plus());
  double before = 0;  // the sum of the chunks so far
  int64_t found = 0;
  for (int64_t j = 0; j < columns.count; j += kThreads) {
    const int64_t column = j + threadIdx.x;
    double term = 0;
    if (column < columns.count) {
      const T t = score_of(d, x, y + column * d.depth, weights[column], kappa);
      term = static_cast<double>(exp2_(t - static_cast<T>(largest)));
    }
    __syncthreads();
    if (threadIdx.x == 0) chosen = kThreads, last = -1;
    scratch[threadIdx.x] = term;
    for (int offset = 1; offset < kThreads; offset *= 2) {
      __syncthreads();
      const double add =
          threadIdx.x >= static_cast<unsigned>(offset) ? scratch[threadIdx.x - offset] : 0;
      __syncthreads();
      scratch[threadIdx.x] += add;
    }
    __syncthreads();
    if (wanted < before + scratch[threadIdx.x]) atomicMin(&chosen, static_cast<int>(threadIdx.x));
    if (term > 0) atomicMax(&last, static_cast<int>(threadIdx.x));
    __syncthreads();
    if (chosen < kThreads) {
      found = j + chosen;
      break;
    }
    if (last >= 0) found = j + last;  // should rounding leave something over
    before += scratch[kThreads - 1];
  }
  if (threadIdx.x == 0) out[at] = found;
}

}  // namespace
PFK_END
