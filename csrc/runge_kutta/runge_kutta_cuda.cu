// SPDX-License-Identifier: Apache-2.0
// Runge-Kutta combinations and error norms on a GPU.
//
// Lower bound of the time: the bytes of runge_kutta_cpu.cpp over the copy bandwidth.  Steps may be
// on the device, and nothing is read back.  Teams (core/teams.cuh) sum the squares of chunks of a
// segment; a second kernel adds up the chunks in order and takes the largest segment.
#include "core/teams.cuh"
#include "runge_kutta/runge_kutta_host.h"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

// sum_i w_i k_i of a pack; copies the fresh slope to its row.
template <class S, class P>
__device__ __forceinline__ void weighted(const RungeKuttaArgs& a, int64_t i, S (&sum)[P::kCount]) {
#pragma unroll
  for (int u = 0; u < P::kCount; ++u) sum[u] = S(0);
#pragma unroll 4
  for (int j = 0; j < a.count; ++j) {
    const P slope = P::load(static_cast<const S*>(a.slopes[j]) + i);
    const S weight = static_cast<S>(a.weights[j]);
#pragma unroll
    for (int u = 0; u < P::kCount; ++u) sum[u] += weight * slope.lanes[u];
  }
  if (a.fresh == nullptr) return;
  const P slope = P::load(static_cast<const S*>(a.fresh) + i);
  slope.store_whole(static_cast<S*>(a.kept) + i);
  if (a.fresh_weight == 0) return;
  const S weight = static_cast<S>(a.fresh_weight);
#pragma unroll
  for (int u = 0; u < P::kCount; ++u) sum[u] += weight * slope.lanes[u];
}

// ---- combination -------------------------------------------------------------------------------
template <class S, bool kWide>
__global__ void __launch_bounds__(kThreads, kResident)
    combine_kernel(const RungeKuttaArgs a, const Divider features) {
  using P = Pack<S, kWide>;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * P::kCount;
  if (i >= a.rows * a.features) return;
  const S h = static_cast<S>(a.step_of(a.each_row ? features.quotient(i) : 0));
  S sum[P::kCount];
  weighted<S, P>(a, i, sum);
  P y = P::load(static_cast<const S*>(a.y) + i);
#pragma unroll
  for (int u = 0; u < P::kCount; ++u) y.lanes[u] += h * sum[u];
  y.store_whole(static_cast<S*>(a.out) + i);
}

// ---- error -------------------------------------------------------------------------------------
// A strip is a segment of a row.  All have as many chunks as the longest; those beyond the end are
// zero.
template <class S, bool kWide, bool kBlock>
__global__ void __launch_bounds__(kThreads, kResident)
    error_kernel(const RungeKuttaArgs a, const TeamPlan plan, double* partial) {
  using P = Pack<S, kWide>;
  __shared__ double scratch[kThreads / 32];
  const Team<kBlock> t(plan);
  const int64_t row = t.row / a.segments;
  const int segment = static_cast<int>(t.row % a.segments);
  const int64_t length = a.begins[segment + 1] - a.begins[segment];
  const int64_t start = row * a.features + a.begins[segment], end = min(t.end, length);
  const S h = t.begin < end ? static_cast<S>(a.step_of(row)) : S(0);
  const S rtol = static_cast<S>(a.rtol), atol = static_cast<S>(a.atol);
  double total = 0;
  for (int64_t i = t.begin + t.rank * P::kCount; i < end; i += t.size * P::kCount) {
    S sum[P::kCount];
    weighted<S, P>(a, start + i, sum);
    const P y = P::load(static_cast<const S*>(a.y) + start + i);
    const P y1 = P::load(static_cast<const S*>(a.y1) + start + i);
#pragma unroll
    for (int u = 0; u < P::kCount; ++u) {
      const double r = runge_kutta_ratio(h * sum[u], y.lanes[u], y1.lanes[u], rtol, atol);
      total += r * r;
    }
  }
  total = t.sum(total, scratch);
  if (t.rank == 0 && t.row < plan.rows) partial[t.row * plan.chunks + t.chunk] = total;
}

// A warp has a row.
__global__ void __launch_bounds__(kThreads)
    join_kernel(const RungeKuttaArgs a, const int64_t chunks, const double* partial, double* out) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / 32;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % 32;
  double largest = 0;
  for (int s = 0; s < a.counted; ++s) {
    const double* from = partial + (row * a.segments + s) * chunks;
    double squares = 0;
    for (int64_t c = lane; c < chunks; c += 32) squares += from[c];
    squares = lanes_sum(squares);
    largest = runge_kutta_largest(largest, squares, a.begins[s + 1] - a.begins[s]);
  }
  if (lane == 0) out[row] = largest;
}

// ---- host --------------------------------------------------------------------------------------
// Whether all pointers and the starts of all strips are aligned to packs.
bool in_packs(const RungeKuttaTensors& t) {
  const RungeKuttaArgs& a = t.args;
  const int64_t width = t.wide ? 2 : 4;
  bool whole = a.rows * a.features % width == 0 && aligned16(a.y) && aligned16(a.y1) &&
               aligned16(a.out) && aligned16(a.fresh) && aligned16(a.kept);
  for (int j = 0; j < a.count; ++j) whole = whole && aligned16(a.slopes[j]);
  if (a.each_row) whole = whole && a.features % width == 0;
  for (int s = 1; s <= a.segments; ++s) whole = whole && a.begins[s] % width == 0;
  return whole;
}

// Calls f.template operator()<S, kWide>().
template <class F>
void with_packs(const RungeKuttaTensors& t, F f) {
  const bool packs = in_packs(t);
  if (t.wide) {
    packs ? f.template operator()<double, true>() : f.template operator()<double, false>();
  } else {
    packs ? f.template operator()<float, true>() : f.template operator()<float, false>();
  }
}

struct OnCuda {
  static Tensor combine(RungeKuttaTensors& t) {
    const DeviceGuard guard(t.y.get_device_index());
    Tensor out = empty(t.y, t.y.sizes());
    RungeKuttaArgs& a = t.args;
    a.out = out.mutable_data_ptr();
    const int64_t total = a.rows * a.features;
    if (total == 0) return out;
    with_packs(t, [&]<class S, bool kWide>() {
      auto kernel = combine_kernel<S, kWide>;
      PFK_LAUNCH(kernel, grid_for(total / Pack<S, kWide>::kCount), kThreads, current_stream(t.y), a,
                 Divider(a.features));
    });
    return out;
  }

  static Tensor error(RungeKuttaTensors& t) {
    const DeviceGuard guard(t.y.get_device_index());
    const RungeKuttaArgs& a = t.args;
    Tensor out = norms(t);
    if (a.rows == 0) return out;
    const cudaStream_t stream = current_stream(t.y);
    int64_t longest = 0;
    for (int s = 0; s < a.segments; ++s) {
      longest = longest > a.begins[s + 1] - a.begins[s] ? longest : a.begins[s + 1] - a.begins[s];
    }
    with_packs(t, [&]<class S, bool kWide>() {
      const TeamPlan plan = plan_teams(a.rows * a.segments, longest, Pack<S, kWide>::kCount);
      const Tensor partial = empty(t.y, {plan.rows * plan.chunks}, ScalarType::Double);
      double* sums = static_cast<double*>(partial.mutable_data_ptr());
      auto kernel =
          plan.size == kThreads ? error_kernel<S, kWide, true> : error_kernel<S, kWide, false>;
      PFK_LAUNCH(kernel, grid_of(blocks_of(plan)), kThreads, stream, a, plan, sums);
      PFK_LAUNCH(join_kernel, grid_for(32 * a.rows), kThreads, stream, a, plan.chunks, sums,
                 static_cast<double*>(out.mutable_data_ptr()));
    });
    return out;
  }
};

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) { pfk::implement_runge_kutta<pfk::OnCuda>(m); }
