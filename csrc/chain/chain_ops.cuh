// SPDX-License-Identifier: Apache-2.0
// The other instructions of a chain: thread by thread, each with a sample and every 16th row.
#pragma once

#include "actnorm/actnorm.h"
#include "chain/chain_product.cuh"
#include "density/density.h"
#include "spline/spline_kinds.h"

PFK_BEGIN
namespace {

// Calls f(row, sample) for every number of n rows: by the same thread for the same number.
template <class F>
__device__ void each_number(int n, F f) {
  const int s = threadIdx.x % kChainSamples;
  for (int r = threadIdx.x / kChainSamples; r < n; r += kThreads / kChainSamples) f(r, s);
}

// ---- moving rows -------------------------------------------------------------------------------
// A permutation in the dtype of its tensor; `scale_kind` of the instruction says which: 0 int64,
// 1 float, 2 double.  Out of range it is -1: the host cannot look at what lies on the device.
template <class T>
__device__ int index_of(const ChainRun<T>& run, const ChainOp& o, int i) {
  double index = 0;
  if (o.scale_kind == 0) {
    index = static_cast<double>(tensor_at<int64_t>(run.tensors, o.tensor)[i]);
  } else {  // averages of equal indices may be off by a rounding
    index = o.scale_kind == 1 ? static_cast<double>(tensor_at<float>(run.tensors, o.tensor)[i])
                              : tensor_at<double>(run.tensors, o.tensor)[i];
    index = floor_(index + 0.5);
  }
  return index >= 0 && index < o.rows ? static_cast<int>(index) : -1;
}

template <class T>
__device__ void chain_gather(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  each_number(o.rows, [&](int r, int s) {
    const int from = index_of(run, o, r);
    b.at(o.out + r, s) = from < 0 ? static_cast<T>(NAN) : b.at(o.in + from, s);
  });
}

template <class T>
__device__ void chain_scatter(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  each_number(o.rows, [&](int r, int s) {
    T sum = T(0);
    for (int i = 0; i < o.rows; ++i) {
      const int to = index_of(run, o, i);
      if (to == r) sum += b.at(o.in + i, s);
      if (to < 0) sum = static_cast<T>(NAN);
    }
    b.at(o.out + r, s) = sum;
  });
}

// The rows of a tile in what is kept: one after the other.
template <class T>
__device__ T* kept_block(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  return run.kept + (b.tile * run.blocks + o.block) * run.features * kChainSamples;
}

// Numbers of this tile's samples, [count, columns], to and from rows.
template <class T>
__device__ void load_samples(const ChainBlock<T>& b, const T* from, int columns, int row) {
  const T* p = from == nullptr ? from : from + b.tile * kChainSamples * columns;
  for (int i = threadIdx.x; i < kChainSamples * columns; i += kThreads) {
    const int s = i / columns, d = i - s * columns;
    b.at(row + d, s) = from != nullptr && s < b.count ? p[i] : T(0);
  }
}
template <class T>
__device__ void store_samples(const ChainBlock<T>& b, T* to, int columns, int row) {
  T* p = to + b.tile * kChainSamples * columns;
  for (int i = threadIdx.x; i < b.count * columns; i += kThreads) {
    const int s = i / columns;
    p[i] = b.at(row + i - s * columns, s);
  }
}

// ---- sums over the samples of a tile -----------------------------------------------------------
// Calls f(row, sample) for the samples of each row and adds the sum of the results at `place` +
// row.
template <class T, class F>
__device__ void add_row_sums(const ChainBlock<T>& b, int rows, int64_t place, F f) {
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    T sum = T(0);
    for (int s = 0; s < b.count; ++s) sum += f(r, s);
    b.add_to(place + r, sum);
  }
}

template <class T>
__device__ void chain_row_dots(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  const Triangle<T> t = triangle_of(run, o);
  add_row_sums(b, o.rows, o.grad, [&](int r, int s) {
    return b.at(o.in + r, s) * b.at(o.add + r, s) * t.diagonal(r);
  });
}

// ---- elementwise steps -------------------------------------------------------------------------
template <class T>
struct ChainScale {
  T scale, bias;
};
template <class T>
__device__ ChainScale<T> scale_at(const ChainRun<T>& run, const ChainOp& o, int d) {
  const T log_scale = tensor_at<T>(run.tensors, o.tensor)[d];
  return {exp_(o.flags & kBackwards ? -log_scale : log_scale),
          tensor_at<T>(run.tensors, o.second)[d]};
}

// The gradients of the scale and the bias are sums over samples: a thread has all of a feature.
template <class T>
__device__ void chain_actnorm_vjp(const ChainRun<T>& run, const ChainOp& o,
                                  const ChainBlock<T>& b) {
  const bool backwards = o.flags & kBackwards;
  for (int d = threadIdx.x; d < o.rows; d += kThreads) {
    const ChainScale<T> a = scale_at(run, o, d);
    T sum = T(0), weighted = T(0);
    for (int s = 0; s < kChainSamples; ++s) {
      T& g = b.at(o.out + d, s);
      const T scaled = g * a.scale;
      if (s < b.count) {
        sum += backwards ? g : scaled;
        weighted += scaled * actnorm_shifted(b.at(o.in + d, s), a.bias, backwards);
      }
      g = scaled;
    }
    if (b.grads == nullptr) continue;
    b.add_to(o.grad + d, weighted);
    b.add_to(o.grad_bias + d, sum);
  }
}

template <class T>
__device__ void chain_shift(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  const T bound = run.maps[o.map].bound;
  each_number(o.rows, [&](int d, int s) {
    const T shift = tensor_at<T>(run.tensors, o.tensor)[d];
    b.at(o.out + d, s) =
        on_circle(b.at(o.in + d, s) + (o.flags & kBackwards ? -shift : shift), bound);
  });
}

// ---- elements ----------------------------------------------------------------------------------
// The parameters of an element, and behind them room for what a spline computes.
template <class T>
struct ElementColumn {
  T *p, *scratch;
  int step, columns;
  __device__ T& at(int c) const {
    return c < columns ? p[c * step] : scratch[(c - columns) * kChainSamples];
  }
  __device__ T get(int c) const { return at(c); }
  __device__ void put(int c, T v) const { at(c) = v; }
};

template <class T>
__device__ ElementColumn<T> column_of(const ChainOp& o, const ChainBlock<T>& b,
                                      const SplineMap<T>& m, int j, int s) {
  return {&b.at(o.params + j * o.feature_step, s), &b.at(o.scratch + j * m.scratch, s),
          o.param_step * kChainSamples, m.columns};
}

template <class T>
__device__ void chain_affine(const ChainRun<T>& run, const ChainOp& o, ChainBlock<T>& b) {
  const AffineMap<T> m = run.maps[o.map].affine;
  const int raw = o.scale_kind == kAdditive ? 0 : o.param_step * kChainSamples;
  each_number(o.rows, [&](int j, int s) {
    const T* p = &b.at(o.params + j * o.feature_step, s);
    const Scale<T> scale = scale_of_kind(o.scale_kind, p[raw], m);
    T& x = b.at(o.out + run.ints[o.in_order + j], s);
    x = affine_apply(x, scale.factor, p[0], m);
    b.log_det += static_cast<double>(scale.log_factor);
  });
}

template <class T>
__device__ void chain_affine_vjp(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  const AffineMap<T> m = run.maps[o.map].affine;
  const int raw = o.scale_kind == kAdditive ? 0 : o.param_step * kChainSamples;
  each_number(o.rows, [&](int j, int s) {
    T* p = &b.at(o.params + j * o.feature_step, s);
    const int d = run.ints[o.in_order + j];
    T& g = b.at(o.out + d, s);
    const Scale<T> scale = scale_of_kind(o.scale_kind, p[raw], m);
    const AffineGrad<T> r = affine_vjp(b.at(o.in + d, s), p[0], g, b.at(run.grad_log, s), scale, m);
    g = r.in;
    p[raw] = r.raw;
    p[0] = r.shift;  // the last one, as the additive map has it alone
  });
}

template <class T>
__device__ void chain_spline(const ChainRun<T>& run, const ChainOp& o, ChainBlock<T>& b) {
  const SplineMap<T> m = run.maps[o.map].spline;  // a copy: tiles of T might change it
  with_spline_kind(m.kind, [&](auto kind) {
    each_number(o.rows, [&](int j, int s) {
      ElementColumn<T> column = column_of(o, b, m, j, s);
      T& x = b.at(o.out + run.ints[o.in_order + j], s);
      const SplineValue<T> r = spline_apply<decltype(kind)::value, AnySpline, T>(m, column, x);
      x = r.out;
      b.log_det += static_cast<double>(r.log_slope);
    });
  });
}

template <class T>
__device__ void chain_spline_vjp(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  const SplineMap<T> m = run.maps[o.map].spline;
  with_spline_kind(m.kind, [&](auto kind) {
    each_number(o.rows, [&](int j, int s) {
      ElementColumn<T> column = column_of(o, b, m, j, s);
      const int d = run.ints[o.in_order + j];
      T& g = b.at(o.out + d, s);
      g = spline_vjp<decltype(kind)::value, AnySpline, T>(m, column, b.at(o.in + d, s), g,
                                                          b.at(run.grad_log, s));
    });
  });
}

// ---- one instruction that either pass has ------------------------------------------------------
template <class T>
__device__ void shared_op(const ChainRun<T>& run, const ChainOp& o, const ChainBlock<T>& b) {
  switch (o.kind) {
    case kProductOp:
      return chain_product(run, o, b);
    case kSolveOp:
      return chain_solve(run, o, b);
    case kMoveOp:
      return each_number(o.rows, [&](int r, int s) {
        b.at(o.out + ordered(run.ints, o.out_order, r), s) =
            b.at(o.in + ordered(run.ints, o.in_order, r), s);
      });
    case kGatherOp:
      return chain_gather(run, o, b);
    case kScatterOp:
      return chain_scatter(run, o, b);
    default:  // kSpreadOp
      return each_number(o.rows, [&](int r, int s) {
        b.at(o.out + r, s) = tensor_at<T>(run.tensors, o.tensor)[r];
      });
  }
}

// The instructions in their order; each is in shared memory while it runs.
template <class T, class F>
__device__ void each_op(const ChainRun<T>& run, ChainOp* shared, F f) {
  constexpr int words = sizeof(ChainOp) / sizeof(int32_t);
  static_assert(words <= kThreads && sizeof(ChainOp) % 16 == 0);
  const int32_t* from = reinterpret_cast<const int32_t*>(run.ops);
  int32_t* to = reinterpret_cast<int32_t*>(shared);
  const int w = threadIdx.x;
  auto fetch = [&](int i) {
    if (w < words && i < run.count) to[i % 2 * words + w] = from[i * words + w];
  };
  fetch(0);
  __syncthreads();
  for (int i = 0; i < run.count; ++i) {
    fetch(i + 1);  // its place was the last one's
    f(shared[i % 2]);
    __syncthreads();
  }
}

// The shared memory of a block: parts of sums in double, two instructions, what products use; then
// the rows, where they fit.
template <class T>
constexpr size_t kChainShared = kThreads * sizeof(double) + 2 * sizeof(ChainOp) + kPanelBytes<T>;

template <class T>
__device__ ChainBlock<T> block_in(const ChainRun<T>& run, unsigned char* memory) {
  ChainBlock<T> b{};
  b.panel = reinterpret_cast<T*>(memory + kThreads * sizeof(double) + 2 * sizeof(ChainOp));
  const int64_t numbers = static_cast<int64_t>(run.rows) * kChainSamples;
  b.rows = run.scratch == nullptr ? reinterpret_cast<T*>(memory + kChainShared<T>)
                                  : run.scratch + blockIdx.x * numbers;
  return b;
}
template <class T>
__device__ void start_tile(const ChainRun<T>& run, ChainBlock<T>& b, int64_t tile) {
  b.tile = tile;
  b.count = static_cast<int>(
      min(static_cast<int64_t>(kChainSamples), run.samples - tile * kChainSamples));
  if (run.context > 0) load_samples(b, run.c, run.context, 2 * run.features);
}
__device__ inline ChainOp* ops_in(unsigned char* memory) {
  return reinterpret_cast<ChainOp*>(memory + kThreads * sizeof(double));
}

}  // namespace
PFK_END
