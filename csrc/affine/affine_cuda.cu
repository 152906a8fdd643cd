// SPDX-License-Identifier: Apache-2.0
// Affine transforms on a GPU.
//
// Lower bound of the time: the bytes of affine_cpu.cpp over the copy bandwidth.  A team (a block,
// or some lanes of a warp for short samples) computes one chunk of one sample and its log-det, in
// 16-byte packs where every row starts on one, else in single elements.  Where a sample has several
// chunks, a second kernel adds up their log-dets in order, so that results have the same bits every
// run.  The scale map and the size of the teams are chosen at run time: all threads take the same
// branch, which costs nothing beside memory, and sixteen kernels are enough.
#include "affine/affine_host.h"
#include "core/teams.cuh"

PFK_BEGIN
namespace {

template <class S, bool kWide>
struct Pointers {
  using P = Pack<S, kWide>;
  static __device__ P load(const void* base, int64_t offset) {
    return P::load(static_cast<const S*>(base) + offset);
  }
  static __device__ void store(const P& pack, void* base, int64_t offset) {
    pack.store(static_cast<S*>(base) + offset);
  }
};

// A Team whose size is known at run time.
struct AnyTeam {
  int64_t n, chunk;
  int rank, size;

  __device__ explicit AnyTeam(const TeamPlan& p) : size(p.size) {
    if (size == kThreads) {
      n = blockIdx.x / p.chunks;
      chunk = blockIdx.x % p.chunks;
    } else {
      n = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) >> (__ffs(size) - 1);
      chunk = 0;
    }
    rank = threadIdx.x & (size - 1);
  }
  // Rank 0 has the sum; every thread of the block takes part.
  __device__ double sum(double value, double* scratch) const {
    if (size == kThreads) return block_sum(value, scratch);
    return lanes_sum(value, size);
  }
};

// Copies the elements of a sample that are not transformed; each of its teams copies a share.
template <class S, bool kWide>
__device__ void copy_passing(const AffineArgs& a, const AnyTeam& t, int64_t teams) {
  using Q = Pointers<S, kWide>;
  const AffineGeometry& g = a.g;
  const int64_t total = g.copy_rows * g.copy_length / Q::P::kCount;
  const void* from = a.grad_out != nullptr ? a.grad_out : a.in;
  const int64_t base = t.n * g.x_sample + g.copy_start;
  for (int64_t i = t.chunk * t.size + t.rank; i < total; i += teams * t.size) {
    const int64_t e = i * Q::P::kCount;
    const int64_t at =
        base + (g.copy_rows == 1 ? e : e / g.copy_length * g.copy_row + e % g.copy_length);
    Q::store(Q::load(from, at), a.out, at);
  }
}

template <class S, bool kBackward, bool kWide>
__global__ void __launch_bounds__(kThreads,
                                  2)  // two blocks on an SM: up to 128 registers, no spills
    affine_kernel(const AffineArgs a, const AffineMap<Compute<S>> map, const TeamPlan plan,
                  const TeamSums<Compute<S>> sums) {
  using T = Compute<S>;
  using Q = Pointers<S, kWide>;
  using P = typename Q::P;
  constexpr int w = P::kCount;
  __shared__ double scratch[kThreads / 32];
  const AffineGeometry& g = a.g;
  const AnyTeam team(plan);
  const int64_t n = team.n;
  const bool any = n < plan.rows;
  const int64_t end = any ? min(plan.features, (team.chunk + 1) * plan.chunk) : 0;
  const bool reads_shift = !kBackward || vjp_reads_shift(map);
  const T grad_log = kBackward && any ? static_cast<const T*>(a.grad_log_det)[n] : T(0);
  T sum = T(0);
  for (int64_t e = team.chunk * plan.chunk + team.rank * w; e < end; e += team.size * w) {
    const int64_t row = g.rows == 1 ? 0 : e / g.length, i = e - row * g.length;
    const int64_t x = n * g.x_sample + g.x_start + row * g.x_row + i;
    const int64_t p = n * g.p_sample + row * g.p_row + i * g.p_step;
    const P in = Q::load(a.in, x);
    P raw{}, shift{}, grad{}, out, grad_raw, grad_shift;
    if (a.kind != kAdditive) raw = Q::load(a.raw, p + g.raw_start);
    if (reads_shift) shift = Q::load(a.shift, p + g.shift_start);
    if (kBackward) grad = Q::load(a.grad_out, x);
#pragma unroll
    for (int j = 0; j < w; ++j) {
      const Scale<T> s = scale_of_kind(a.kind, T(widen(raw.lanes[j])), map);
      const T v = widen(in.lanes[j]), t = widen(shift.lanes[j]), upstream = widen(grad.lanes[j]);
      const bool moved = a.mask == nullptr || a.mask[row * g.mask_row + (i + j) * g.mask_step] != 0;
      if constexpr (kBackward) {
        const AffineGrad<T> d = affine_vjp(v, t, upstream, grad_log, s, map);
        out.lanes[j] = narrow<S>(moved ? d.in : upstream);
        grad_raw.lanes[j] = narrow<S>(moved ? d.raw : T(0));
        grad_shift.lanes[j] = narrow<S>(moved ? d.shift : T(0));
      } else {
        out.lanes[j] = moved ? narrow<S>(affine_apply(v, s.factor, t, map)) : in.lanes[j];
        sum += moved ? s.log_factor : T(0);
      }
    }
    Q::store(out, a.out, x);
    if (kBackward) {
      Q::store(grad_shift, a.grad_shift, p + g.shift_start);
      if (a.kind != kAdditive) Q::store(grad_raw, a.grad_raw, p + g.raw_start);
    }
  }
  if (any) copy_passing<S, kWide>(a, team, plan.chunks);
  if constexpr (!kBackward) {
    const double total = team.sum(static_cast<double>(sum), scratch);
    if (team.rank != 0 || !any) return;
    if (plan.chunks == 1) {
      sums.finish(n, total);
    } else {
      sums.partial[n * plan.chunks + team.chunk] = total;
    }
  }
}

// Whether every row starts, and is as long as, whole 16-byte packs.
bool fits_packs(const AffineArgs& a, int64_t width) {
  const AffineGeometry& g = a.g;
  for (const int64_t n : {g.length, g.x_start, g.x_row, g.x_sample, g.copy_length, g.copy_start,
                          g.copy_row, g.shift_start, g.raw_start, g.p_row, g.p_sample}) {
    if (n % width != 0) return false;
  }
  for (const void* p :
       {a.in, a.raw, a.shift, static_cast<const void*>(a.out), a.grad_out,
        static_cast<const void*>(a.grad_raw), static_cast<const void*>(a.grad_shift)}) {
    if (!aligned16(p)) return false;
  }
  return g.p_step == 1;
}

template <class S>
void launch(const AffineArgs& a, const Tensor& out, Tensor* log_det) {
  using T = Compute<S>;
  constexpr int64_t width = 16 / sizeof(S);
  const AffineMap<T> map = affine_map<T>(a.numbers, a.flags);
  const cudaStream_t stream = current_stream(out);
  const bool wide = fits_packs(a, width);
  const TeamPlan plan = plan_teams(a.g.samples, a.g.rows * a.g.length, wide ? width : 1);
  const unsigned grid = grid_of(blocks_of(plan));
  if (log_det == nullptr) {
    auto kernel = wide ? affine_kernel<S, true, true> : affine_kernel<S, true, false>;
    PFK_LAUNCH(kernel, grid, kThreads, stream, a, map, plan, TeamSums<T>{});
    return;
  }
  const Tensor partial = chunk_sums(out, plan);
  const TeamSums<T> sums{static_cast<T*>(log_det->mutable_data_ptr()),
                         static_cast<double*>(partial.mutable_data_ptr()), 0.0, nullptr};
  auto kernel = wide ? affine_kernel<S, false, true> : affine_kernel<S, false, false>;
  PFK_LAUNCH(kernel, grid, kThreads, stream, a, map, plan, sums);
  launch_sum_chunks(plan, sums, stream);
}

void run_affine_cuda(AffineArgs& a, const Tensor& out, Tensor* log_det) {
  if (a.g.samples == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  each_storage(out, [&](auto type) { launch<decltype(type)>(a, out, log_det); });
}

}  // namespace
PFK_END

PFK_REGISTER_AFFINE(CUDA, pfk::run_affine_cuda)
