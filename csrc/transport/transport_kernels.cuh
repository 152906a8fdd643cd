// SPDX-License-Identifier: Apache-2.0
// Entropic optimal transport on a GPU: kernels.
//
// A block has 64 rows and goes through all columns in tiles of 64; a thread has 4 x 4 pairs.  Their
// r_ij (transport.h) are summed over the coordinates from shared memory, a few coordinates at a
// time.  A thread keeps the largest score of each of its rows so far and the sum relative to it;
// sixteen lanes of a warp join theirs at the end.
#pragma once

#include "core/teams.cuh"
#include "transport/transport_tensors.h"

PFK_BEGIN
namespace {

constexpr int kTile = 64, kPart = 4, kSide = kTile / kPart, kDepthChunk = 8;
constexpr int kTileStride = kTile + 4;
static_assert(kSide * kSide == kThreads);

// What is known of a problem while it is solved, in the memory of the device.
struct ProblemState {
  double epsilon, extent, error, last_error;
  int64_t done, level;  // iterations; iterations with this epsilon
  int solved;           // nothing changes any more
  int memory;           // a ProlongMemory
};

// One cloud of all problems.
struct DeviceCloud {
  int64_t count;
  const void* given;   // [problems, count, depth], as the other points
  const double* mass;  // [problems, count], as all that follow
  void *points, *weights;
  double* mean;  // [problems, depth]
  double *squares, *log_mass, *origin, *potential, *next;
  double *last, *step;  // of y, if accelerated: the potentials and the step of the last iteration
  double* errors;       // [problems, blocks]
  int64_t blocks;
};

struct DeviceProblems {
  DeviceCloud cloud[2];
  int64_t problems, depth;
  double scale;
  bool direct;
  SinkhornOptions o;
  ProblemState* state;

  PFK_HD double coefficient(double epsilon) const {
    return (direct ? -1 : 2) * scale / (epsilon * kLog2);
  }
};

// Joins values of the block by `join`, in a fixed order; all threads have the result.
template <class F>
__device__ double block_join(double value, double* scratch, F join) {
  __syncthreads();
  scratch[threadIdx.x] = value;
  for (int size = kThreads / 2; size > 0; size /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(size))
      scratch[threadIdx.x] = join(scratch[threadIdx.x], scratch[threadIdx.x + size]);
  }
  __syncthreads();
  return scratch[0];
}
struct Plus {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// ---- once --------------------------------------------------------------------------------------
// The means of a problem's clouds, by a block.
template <class T>
__global__ void __launch_bounds__(kThreads) mean_kernel(const DeviceProblems d) {
  __shared__ double scratch[kThreads];
  const int64_t p = blockIdx.x / 2;
  const DeviceCloud& c = d.cloud[blockIdx.x % 2];
  const double* mass = c.mass + p * c.count;
  const T* x = typed<T>(c.given) + p * c.count * d.depth;
  double total = 0;
  for (int64_t i = threadIdx.x; i < c.count; i += kThreads) total += mass[i];
  total = block_join(total, scratch, Plus());
  for (int64_t k = 0; k < d.depth; ++k) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < c.count; i += kThreads)
      sum += mass[i] * static_cast<double>(x[i * d.depth + k]);
    sum = block_join(sum, scratch, Plus());
    if (threadIdx.x == 0) c.mean[p * d.depth + k] = sum / total;
  }
}

// The first state of a problem, by a block.  The extent is needed for larger epsilons alone.
template <class T>
__global__ void __launch_bounds__(kThreads) state_kernel(const DeviceProblems d) {
  __shared__ double scratch[kThreads];
  const int64_t p = blockIdx.x;
  double extent = 0;
  for (int64_t k = 0; d.o.scaling > 0 && k < d.depth; ++k) {
    double low = INFINITY, high = -INFINITY;
    for (const DeviceCloud& c : d.cloud) {
      const T* x = typed<T>(c.given) + p * c.count * d.depth + k;
      for (int64_t i = threadIdx.x; i < c.count; i += kThreads) {
        low = min(low, static_cast<double>(x[i * d.depth]));
        high = max(high, static_cast<double>(x[i * d.depth]));
      }
    }
    low = block_join(low, scratch, [](double a, double b) { return min(a, b); });
    high = block_join(high, scratch, [](double a, double b) { return max(a, b); });
    extent += (high - low) * (high - low);
  }
  if (threadIdx.x == 0)
    d.state[p] = {extent > d.o.epsilon ? extent : d.o.epsilon, extent, INFINITY, 0, 0, 0, 0};
}

// Centred points and what is known of each, by a thread a point.
template <class T>
__global__ void __launch_bounds__(kThreads)
    centre_kernel(const DeviceProblems d, int side, const double* potential) {
  const DeviceCloud& c = d.cloud[side];
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= d.problems * c.count) return;
  const int64_t p = at / c.count;
  const double *mean = c.mean + p * d.depth, *x_mean = d.cloud[0].mean + p * d.depth,
               *y_mean = d.cloud[1].mean + p * d.depth;
  const T* x = typed<T>(c.given) + at * d.depth;
  double square = 0, along = 0, offset = 0;
  for (int64_t k = 0; k < d.depth; ++k) {
    const T v = static_cast<T>(x[k] - mean[k]);
    const double apart = x_mean[k] - y_mean[k];
    typed<T>(c.points)[at * d.depth + k] = v;
    square += static_cast<double>(v) * v;
    along += apart * v;
    offset += apart * apart;
  }
  c.squares[at] = d.direct ? 0 : d.scale * square;
  c.log_mass[at] = ::log2(c.mass[at]);
  const double share = d.o.symmetric ? 0.5 : side;  // see transport_host.h
  c.origin[at] = d.scale * ((side == 0 ? 2 : -2) * along + share * offset);
  c.potential[at] = (potential ? potential[at] : 0) - c.origin[at];
}

// ---- every iteration ---------------------------------------------------------------------------
// Takes over the next potentials, where the problem goes on, and makes the weights of its columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const DeviceProblems d, int side, bool accept, bool all) {
  const DeviceCloud& c = d.cloud[side];
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= d.problems * c.count) return;
  const ProblemState& s = d.state[at / c.count];
  if (accept && (all || !s.solved)) c.potential[at] = c.next[at];
  const double reduced = c.potential[at] - c.squares[at];
  const double w = c.log_mass[at] + reduced / (s.epsilon * kLog2);
  typed<T>(c.weights)[at] = static_cast<T>(w < -1e30 ? -1e30 : w);
}

// r_ij of 4 x 4 pairs for the threads of a block; rows and columns beyond the clouds count as
// zeros.
template <class T, bool kDirect>
struct PairTile {
  T x[kDepthChunk][kTileStride], y[kDepthChunk][kTileStride];

  __device__ void load(T (&to)[kDepthChunk][kTileStride], const T* from, int64_t left,
                       int64_t depth, int64_t k) {
    for (int i = threadIdx.x; i < kTile * kDepthChunk; i += kThreads) {
      const int row = i / kDepthChunk, step = i % kDepthChunk;
      to[step][row] = row < left && k + step < depth ? from[row * depth + k + step] : T(0);
    }
  }
  __device__ void fill(const T* rows, int64_t rows_left, const T* columns, int64_t columns_left,
                       int64_t depth, T (&r)[kPart][kPart]) {
    const int row = threadIdx.x / kSide * kPart, column = threadIdx.x % kSide * kPart;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) r[i][j] = T(0);
    }
    for (int64_t k = 0; k < depth; k += kDepthChunk) {
      __syncthreads();
      load(x, rows, rows_left, depth, k);
      load(y, columns, columns_left, depth, k);
      __syncthreads();
      const int steps = static_cast<int>(min(depth - k, static_cast<int64_t>(kDepthChunk)));
      for (int step = 0; step < steps; ++step) {
        T a[kPart], b[kPart];
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          a[i] = x[step][row + i];
          b[i] = y[step][column + i];
        }
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
#pragma unroll
          for (int j = 0; j < kPart; ++j) {
            const T difference = a[i] - b[j];
            r[i][j] += kDirect ? difference * difference : a[i] * b[j];
          }
        }
      }
    }
  }
};

PFK_HD float exp2_(float x) { return ::exp2f(x); }
PFK_HD double exp2_(double x) { return ::exp2(x); }

// The sum of powers of two of a row's scores, relative to the largest.
template <class T>
struct RowSum {
  T largest = T(-INFINITY);
  double sum = 0;

  template <int kCount>
  __device__ void add(const T (&t)[kCount]) {
    T most = t[0];
#pragma unroll
    for (int j = 1; j < kCount; ++j) most = t[j] > most ? t[j] : most;
    if (most > largest) {
      sum *= static_cast<double>(exp2_(largest - most));
      largest = most;
    }
    T part = T(0);
#pragma unroll
    for (int j = 0; j < kCount; ++j) part += exp2_(t[j] - largest);
    sum += static_cast<double>(part);
  }
  __device__ void join(T other_largest, double other_sum) {
    const T most = other_largest > largest ? other_largest : largest;
    sum = sum * static_cast<double>(exp2_(largest - most)) +
          other_sum * static_cast<double>(exp2_(other_largest - most));
    largest = most;
  }
  __device__ double log2() const { return static_cast<double>(largest) + ::log2(sum); }
};

// The next potential of a row, and the error of its marginal with the present one.
__device__ inline double finish_row(const DeviceProblems& d, int side, int64_t at, double epsilon,
                                    double log2, double blend) {
  const DeviceCloud& c = d.cloud[side];
  const double penalty = d.o.penalty[side], old = c.potential[at];
  const double soft = c.squares[at] - epsilon * kLog2 * log2;
  const double origin = penalty > 0 ? c.origin[at] : 0;
  const double damp = penalty > 0 ? penalty / (penalty + epsilon) : 1;
  c.next[at] = old + blend * (damp * (soft + origin) - origin - old);
  const double wanted = penalty > 0 ? ::exp(-(old + origin) / penalty) : 1;
  const double ratio = ::fabs(::exp((old - soft) / epsilon) - wanted);
  return c.mass[at] == 0 ? 0 : c.mass[at] * ratio;  // without mass it may be infinite
}

// Half an iteration: the next potentials of one side.
template <class T, bool kDirect>
__global__ void __launch_bounds__(kThreads, 1)
    softmin_kernel(const DeviceProblems d, int side, double blend, bool all) {
  __shared__ PairTile<T, kDirect> tile;
  __shared__ double errors[kTile];
  const DeviceCloud &rows = d.cloud[side], &columns = d.cloud[1 - side];
  const int64_t p = blockIdx.x / rows.blocks, block = blockIdx.x % rows.blocks;
  if (!all && d.state[p].solved) return;
  const double epsilon = d.state[p].epsilon;
  const T kappa = static_cast<T>(d.coefficient(epsilon));
  const int64_t first = block * kTile;
  const T* x = typed<T>(rows.points) + (p * rows.count + first) * d.depth;
  const T* y = typed<T>(columns.points) + p * columns.count * d.depth;
  const T* weights = typed<T>(columns.weights) + p * columns.count;
  const int row = threadIdx.x / kSide * kPart, column = threadIdx.x % kSide * kPart;
  RowSum<T> sums[kPart];
  for (int64_t j = 0; j < columns.count; j += kTile) {
    T r[kPart][kPart], w[kPart];
    tile.fill(x, rows.count - first, y + j * d.depth, columns.count - j, d.depth, r);
#pragma unroll
    for (int c = 0; c < kPart; ++c)
      w[c] = j + column + c < columns.count ? weights[j + column + c] : T(-1e30);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
#pragma unroll
      for (int c = 0; c < kPart; ++c) r[i][c] = w[c] + kappa * r[i][c];
      sums[i].add(r[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    for (int offset = kSide / 2; offset > 0; offset /= 2) {
      const T largest = __shfl_down_sync(0xffffffffu, sums[i].largest, offset, kSide);
      const double sum = __shfl_down_sync(0xffffffffu, sums[i].sum, offset, kSide);
      sums[i].join(largest, sum);
    }
    if (column == 0) {
      const bool mine = first + row + i < rows.count;
      errors[row + i] = mine ? finish_row(d, side, p * rows.count + first + row + i, epsilon,
                                          sums[i].log2(), blend)
                             : 0;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double error = 0;
    for (int i = 0; i < kTile; ++i) error += errors[i];
    rows.errors[p * rows.blocks + block] = error;
  }
}

// ---- results -----------------------------------------------------------------------------------
// The dual objective, by a block: see dual_cost in transport_solve.h.
__global__ void __launch_bounds__(kThreads)
    cost_kernel(const DeviceProblems d, double* cost, double* error, int64_t* iterations) {
  __shared__ double scratch[kThreads];
  const int64_t p = blockIdx.x;
  double value = 0, totals = 1, plan = 0;  // totals: the product of both
  for (int side = 0; side < 2; ++side) {
    const DeviceCloud& c = d.cloud[side];
    const double penalty = d.o.penalty[side];
    double sum = 0, mass = 0, decayed = 0;
    for (int64_t i = threadIdx.x; i < c.count; i += kThreads) {
      const int64_t at = p * c.count + i;
      const double f = c.potential[at] + c.origin[at];
      sum += c.mass[at] * (penalty > 0 ? -penalty * ::expm1(-f / penalty) : f);
      decayed += c.mass[at] * (penalty > 0 ? ::exp(-f / penalty) : 1);
      mass += c.mass[at];
    }
    value += block_join(sum, scratch, Plus());
    totals *= block_join(mass, scratch, Plus());
    decayed = block_join(decayed, scratch, Plus());
    if (side == 0) plan = decayed;
  }
  if (threadIdx.x != 0) return;
  cost[p] = value - d.o.epsilon * (plan - totals);
  error[p] = d.state[p].error;
  iterations[p] = d.state[p].done;
}

__global__ void __launch_bounds__(kThreads)
    potential_kernel(const DeviceProblems d, int side, double* out) {
  const DeviceCloud& c = d.cloud[side];
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at < d.problems * c.count) out[at] = c.potential[at] + c.origin[at];
}

}  // namespace
PFK_END
