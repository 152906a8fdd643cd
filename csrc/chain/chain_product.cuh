// SPDX-License-Identifier: Apache-2.0
// Products of a tile of a chain: a matrix times rows, the product of two sets of rows over the
// samples, and triangles by substitution.
//
// All threads of a block work on one product.  Matrices are read as they lie in their tensors, with
// the masks and orders of a masked layer; a part of the matrix and of the rows is put into shared
// memory, where every thread takes what it needs.  A number of the result is one sum in ascending
// order by one thread: it depends on nothing but its sample.
#pragma once

#include "chain/chain_code.h"
#include "core/activations.h"
#include "core/cuda.cuh"
#include "matrix/matrix.h"

PFK_BEGIN
namespace {

constexpr int kQuad = 4;  // numbers of a thread, side by side
constexpr int kPanelRows =
    2 * kThreads / (kChainSamples / kQuad);  // of a product at a time: two of a thread
constexpr int kOuterSide = 64;               // rows, and columns, of a product of rows
constexpr int kOuterStep = kOuterSide + kQuad;
template <class T>
constexpr int kPanelDepth = 128 / sizeof(T);

template <class T>
constexpr int kPanelNumbers = kPanelRows * (kPanelDepth<T> + 1);
template <class T>
constexpr size_t kPanelBytes = (kPanelNumbers<T> + kPanelDepth<T> * kChainSamples) * sizeof(T);
static_assert(2 * kChainSamples * kOuterStep <= kPanelNumbers<double>);

template <class T>
struct alignas(16) Quad {
  T lanes[kQuad];
  static __device__ const Quad& at(const T* p) { return *reinterpret_cast<const Quad*>(p); }
};

// What a block works with.
template <class T>
struct ChainBlock {
  T *rows, *panel;
  int64_t tile;
  int count;       // samples of the tile
  T* grads;        // of the task, or null
  bool first;      // the task's first tile: its sums begin
  double log_det;  // this thread's part of it, for sample threadIdx.x % kChainSamples

  __device__ T& at(int row, int sample) const { return rows[row * kChainSamples + sample]; }
  __device__ void add_to(int64_t place, T value) const {
    grads[place] = first ? value : grads[place] + value;
  }
};

template <class T>
__device__ const T* tensor_at(const ChainPointers& tensors, int i) {
  if (i < 0) return nullptr;
  return static_cast<const T*>(tensors.many != nullptr ? tensors.many[i] : tensors.few[i]);
}

// An integer of a list, or the place itself where there is none.
__device__ inline int ordered(const int32_t* ints, int order, int i) {
  return order < 0 ? i : ints[order + i];
}

template <class T>
__device__ T activated(int activation, T v) {
  if (activation == static_cast<int>(Activation::kIdentity)) return v;
  T value = T(0);
  with_activation(static_cast<Activation>(activation),
                  [&](auto which) { value = activation_curve<decltype(which)::value>(v).value; });
  return value;
}
template <class T>
__device__ T slope_at(int activation, T v) {
  T slope = T(1);
  with_activation(static_cast<Activation>(activation),
                  [&](auto which) { slope = activation_curve<decltype(which)::value>(v).slope; });
  return slope;
}

// ---- matrices ----------------------------------------------------------------------------------
// The triangle of an instruction.
template <class T>
__device__ Triangle<T> triangle_of(const ChainRun<T>& run, const ChainOp& o) {
  const Triangle<T> t{tensor_at<T>(run.tensors, o.tensor),
                      o.stride,
                      1,
                      (o.flags & kLower) != 0,
                      tensor_at<T>(run.tensors, o.second),
                      tensor_at<T>(run.tensors, o.third)};
  return o.flags & kTurned ? t.transposed() : t;
}

// Number k of row i of the matrix, or of its transpose.
template <class T>
__device__ T weight_at(const ChainRun<T>& run, const ChainOp& o, const T* weight, int i, int k) {
  if (o.flags & (kLower | kUpper)) {
    const Triangle<T> t = triangle_of(run, o);
    return i == k ? t.diagonal(i) : t.holds(i, k) ? *t.at(i, k) : T(0);
  }
  const int r = o.flags & kTurned ? k : i, c = o.flags & kTurned ? i : k;
  if (o.prefix >= 0 && c >= run.ints[o.prefix + r]) return T(0);
  return weight[static_cast<int64_t>(ordered(run.ints, o.row_order, r)) * o.stride +
                ordered(run.ints, o.column_order, c)];
}

struct ChainDepth {
  int begin, end;
};

// What rows [first, first + count) of a product read: rows of a masked layer read its first inputs,
// and an input is read by its last rows.
template <class T>
__device__ ChainDepth depth_of(const ChainRun<T>& run, const ChainOp& o, int first, int count) {
  if (o.prefix < 0) return {0, o.depth};
  const int32_t* prefix = run.ints + o.prefix;
  if (!(o.flags & kTurned)) return {0, prefix[first + count - 1]};
  int begin = 0, end = o.depth;  // of the first row whose prefix is beyond `first`
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (prefix[middle] > first) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return {begin, o.depth};
}

// Puts a part of the matrix, and of the rows that it meets, into shared memory.
template <class T>
__device__ void stage_product(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b,
                              int first, int count, int at, int depth) {
  constexpr int most = kPanelDepth<T>;
  const T* weight = tensor_at<T>(run.tensors, o.tensor);
  // neighbouring threads take neighbouring numbers of the tensor
  const bool turned = o.flags & kTurned;
  const int area = turned ? kPanelRows * depth : count * most;
  for (int i = threadIdx.x; i < area; i += kThreads) {
    const int r = turned ? i % kPanelRows : i / most, k = turned ? i / kPanelRows : i % most;
    if (r < count && k < depth) {
      b.panel[r * (most + 1) + k] = weight_at(run, o, weight, first + r, at + k);
    }
  }
  T* inputs = b.panel + kPanelNumbers<T>;
  for (int i = threadIdx.x; i < depth * kChainSamples; i += kThreads) {
    const int row = o.in + ordered(run.ints, o.in_order, at + i / kChainSamples);
    inputs[i] = activated(o.activation, b.at(row, i % kChainSamples));
  }
}

// Finishes number `r` of the result for four samples.
template <class T>
__device__ void put_product(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b, int r,
                            int sample, const T (&sum)[kQuad]) {
  const T* bias = tensor_at<T>(run.tensors, o.bias);
  const T base = bias == nullptr ? T(0) : bias[ordered(run.ints, o.row_order, r)];
  const int out = o.out + ordered(run.ints, o.out_order, r);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    T value = sum[i];
    if (o.before >= 0) value *= slope_at(o.slope, b.at(o.before + r, sample + i));
    value += base;
    if (o.add >= 0) value += b.at(o.add + r, sample + i);
    T& to = b.at(out, sample + i);
    to = o.flags & kAdds ? to + value : value;
  }
}

template <class T>
__device__ void chain_product(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  constexpr int half = kPanelRows / 2, step = kPanelDepth<T> + 1;
  constexpr int quads = kChainSamples / kQuad;
  const int row = threadIdx.x / quads, sample = threadIdx.x % quads * kQuad;
  const T* inputs = b.panel + kPanelNumbers<T> + sample;
  for (int first = 0; first < o.rows; first += kPanelRows) {
    const int count = min(kPanelRows, o.rows - first);
    const bool one = row < count, both = row + half < count;
    const ChainDepth read = depth_of(run, o, first, count);
    T sum[kQuad] = {}, other[kQuad] = {};
    for (int at = read.begin; at < read.end; at += kPanelDepth<T>) {
      const int depth = min(kPanelDepth<T>, read.end - at);
      stage_product(run, o, b, first, count, at, depth);
      __syncthreads();
      const T *w = b.panel + row * step, *v = w + half * step;
      if (both) {
#pragma unroll 4
        for (int k = 0; k < depth; ++k) {
          const Quad<T> x = Quad<T>::at(inputs + k * kChainSamples);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            sum[i] += w[k] * x.lanes[i];
            other[i] += v[k] * x.lanes[i];
          }
        }
      } else if (one) {
#pragma unroll 4
        for (int k = 0; k < depth; ++k) {
          const Quad<T> x = Quad<T>::at(inputs + k * kChainSamples);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) sum[i] += w[k] * x.lanes[i];
        }
      }
      __syncthreads();
    }
    if (one) put_product(run, o, b, first + row, sample, sum);
    if (both) put_product(run, o, b, first + row + half, sample, other);
  }
}

// ---- gradients of matrices ---------------------------------------------------------------------
// Rows [first, first + kOuterSide) turned: number s of row r at s kOuterStep + r.  Samples that the
// tile has not are zero, whatever stands there.
template <class T>
__device__ void stage_turned(const ChainRun<T>& run, const ChainBlock<T>& b, int rows, int order,
                             int activation, int first, int end, T* to) {
  for (int i = threadIdx.x; i < kOuterSide * kChainSamples; i += kThreads) {
    const int r = i / kChainSamples, s = i % kChainSamples;
    const bool there = first + r < end && s < b.count;
    const int row = there ? rows + ordered(run.ints, order, first + r) : 0;
    to[s * kOuterStep + r] = there ? activated(activation, b.at(row, s)) : T(0);
  }
}

// A thread has 4 x 4 numbers of the gradient of a matrix.
template <class T>
__device__ void add_outer(const ChainOp& o, const ChainBlock<T>& b, const T* left, const T* right,
                          int first_row, int first_column) {
  constexpr int side = kOuterSide / kQuad;
  const int r = threadIdx.x / side * kQuad, c = threadIdx.x % side * kQuad;
  T sum[kQuad][kQuad] = {};
#pragma unroll 4
  for (int s = 0; s < kChainSamples; ++s) {
    const Quad<T> x = Quad<T>::at(left + s * kOuterStep + r),
                  y = Quad<T>::at(right + s * kOuterStep + c);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sum[i][j] += x.lanes[i] * y.lanes[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const int row = first_row + r + i, column = first_column + c + j;
      if (row < o.rows && column < o.depth) {
        b.add_to(o.grad + static_cast<int64_t>(row) * o.depth + column, sum[i][j]);
      }
    }
  }
}

template <class T>
__device__ void chain_outer(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  T *left = b.panel, *right = left + kChainSamples * kOuterStep;
  const int identity = static_cast<int>(Activation::kIdentity);
  for (int row = 0; row < o.rows; row += kOuterSide) {
    const int last = min(row + kOuterSide, o.rows) - 1;
    const int depth = o.prefix < 0 ? o.depth : run.ints[o.prefix + last];
    stage_turned(run, b, o.in, -1, identity, row, o.rows, left);
    for (int column = 0; column < depth; column += kOuterSide) {
      stage_turned(run, b, o.add, o.in_order, o.activation, column, o.depth, right);
      __syncthreads();
      add_outer(o, b, left, right, row, column);
      __syncthreads();
    }
    __syncthreads();
    const int r = threadIdx.x;
    if (o.grad_bias >= 0 && r < kOuterSide && row + r < o.rows) {
      T sum = T(0);
      for (int s = 0; s < kChainSamples; ++s) sum += left[s * kOuterStep + r];
      b.add_to(o.grad_bias + row + r, sum);
    }
    __syncthreads();
  }
}

// ---- triangles ---------------------------------------------------------------------------------
// The threads of a sample change the rows that are still to be solved; the division by the diagonal
// waits for the end, as the row of a step is read by all of them.
template <class T>
__device__ void chain_solve(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  constexpr int lanes = kThreads / kChainSamples;
  const int s = threadIdx.x % kChainSamples, lane = threadIdx.x / kChainSamples, n = o.rows;
  const Triangle<T> t = triangle_of(run, o);
  for (int i = lane; i < n; i += lanes) b.at(o.out + i, s) = b.at(o.in + i, s);
  __syncthreads();
  for (int step = 0; step < n; ++step) {
    const int k = t.is_lower ? step : n - 1 - step;
    const T solved = b.at(o.out + k, s) / t.diagonal(k);
    for (int i = lane; i < n; i += lanes) {
      if (t.holds(i, k)) b.at(o.out + i, s) = eliminate(b.at(o.out + i, s), *t.at(i, k), solved);
    }
    __syncthreads();
  }
  for (int i = lane; i < n; i += lanes) b.at(o.out + i, s) /= t.diagonal(i);
}

}  // namespace
PFK_END
