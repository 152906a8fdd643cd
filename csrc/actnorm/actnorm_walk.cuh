// SPDX-License-Identifier: Apache-2.0
// How the kernels that sum over each channel go through memory, and their launches.
#pragma once

#include <algorithm>

#include "actnorm/actnorm.h"
#include "core/cuda.cuh"

PFK_BEGIN
namespace {

// What a block of these kernels sums.  Where channels are innermost (kFlat), `columns` threads side
// by side have kLanes adjacent channels each; else all threads have one channel.  The other threads
// take other packs of the same channels.
struct WalkPlan {
  int64_t rows;   // outer rows of a block
  int columns;    // a power of two; 1 where pixels are innermost
  Divider packs;  // of a row of pixels
};

template <class S, bool kWide, bool kFlat>
struct Walk {
  using P = Pack<S, kWide>;
  static constexpr int kLanes = kFlat ? P::kCount : 1;
  const ActNormArgs& a;
  const WalkPlan& p;
  int64_t begin, end;  // outer rows

  __device__ Walk(const ActNormArgs& args, const WalkPlan& plan)
      : a(args), p(plan), begin(blockIdx.y * plan.rows) {
    end = min(a.outer, begin + p.rows);
  }
  __device__ int64_t channel() const {
    return kFlat ? (blockIdx.x * int64_t{p.columns} + threadIdx.x % p.columns) * kLanes
                 : blockIdx.x;
  }
  // Calls f(e) with the place of each pack of this thread.
  template <class F>
  __device__ void each(F f) const {
    const int64_t c = channel();
    const int stride = kThreads / p.columns;
    if constexpr (kFlat) {
      if (c >= a.channels) return;
      for (int64_t r = begin + member(); r < end; r += stride) f(r * a.channels + c);
    } else {
      const int64_t count = (end - begin) * p.packs.divisor;
      for (int64_t i = member(); i < count; i += stride) {
        const int64_t r = p.packs.quotient(i);
        f(((begin + r) * a.channels + c) * a.inner + (i - r * p.packs.divisor) * P::kCount);
      }
    }
  }
  // The threads that share channels, and their place among them.
  __device__ int members() const { return kThreads / p.columns; }
  __device__ int member() const { return threadIdx.x / p.columns; }
  __device__ int slot(int m) const { return m * p.columns + threadIdx.x % p.columns; }
  __device__ double* partial(int lane) const {
    return a.partial + 2 * (blockIdx.y * a.channels + channel() + lane);
  }
};

// ---- host --------------------------------------------------------------------------------------
struct Plan {
  Canonical x;
  ImageShape shape;
  ActNormArgs args{};
  int64_t tasks = 0;
  dim3 grid;
  WalkPlan walk{};
  Tensor partial;
  bool flat = false, wide = false;
  DType dtype{};
};

Plan plan_of(const Tensor& x) {
  Plan p{canonical(x), image_shape(x)};
  p.dtype = dtype_of(x);
  ActNormArgs& a = p.args;
  p.flat = p.x.channels_last || p.shape.space == 1;
  a.channels = p.shape.channels;
  a.outer = p.flat ? p.shape.samples * p.shape.space : p.shape.samples;
  a.inner = p.flat ? 1 : p.shape.space;
  a.in = p.x.tensor.const_data_ptr();
  return p;
}

// Enough blocks for any GPU, few enough to be joined quickly, and some packs for every thread.
void plan_sums(Plan& p) {
  ActNormArgs& a = p.args;
  const int64_t width = p.dtype == kFloat64 ? 2 : p.dtype == kFloat32 ? 4 : 8;
  const int64_t row = p.flat ? a.channels : a.inner;
  p.wide = row % width == 0 && aligned16(a.in) && aligned16(a.out) && aligned16(a.grad_out);
  const int64_t packs = p.wide ? row / width : row;
  WalkPlan& w = p.walk;
  w.columns = 1;
  if (p.flat) {
    while (w.columns < 32 && w.columns < packs) w.columns *= 2;
  } else {
    w.packs = Divider(packs > 0 ? packs : 1);
  }
  const int64_t across = p.flat ? (packs + w.columns - 1) / w.columns : a.channels;
  const int64_t wanted = across >= 2048 ? 1 : 2048 / (across > 0 ? across : 1);
  const int64_t least = p.flat ? 8 * kThreads / w.columns : 4 * kThreads / (packs > 0 ? packs : 1);
  w.rows = std::max({(a.outer + wanted - 1) / wanted, least, int64_t{1}});
  p.tasks = (a.outer + w.rows - 1) / w.rows;
  p.grid = dim3(static_cast<unsigned>(across), static_cast<unsigned>(p.tasks));
  a.rows = w.rows;
  p.partial = empty(p.x.tensor, {2 * p.tasks * a.channels}, ScalarType::Double);
  a.partial = static_cast<double*>(p.partial.mutable_data_ptr());
}

// Calls f with the template arguments of a kernel that sums: f.template operator()<kWide, kFlat>().
template <class F>
void with_walk(const Plan& p, F f) {
  if (p.wide) {
    p.flat ? f.template operator()<true, true>() : f.template operator()<true, false>();
  } else {
    p.flat ? f.template operator()<false, true>() : f.template operator()<false, false>();
  }
}

}  // namespace
PFK_END
