// SPDX-License-Identifier: Apache-2.0
// The normal log-density on a GPU.
//
// Lower bound of the time: the bytes of density_cpu.cpp over the copy bandwidth.  Rows are read in
// 16-byte packs where every row starts on one, else in single elements.  The gradient of a
// parameter that samples share is a sum over the batch: a block takes some columns of a group of
// rows, its threads go down the rows side by side, and a second kernel adds up the partial sums in
// order.
#include "core/teams.cuh"
#include "density/density_host.h"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMinGroup = 8, kMaxGroup = 1024;  // rows of a group

// Element i of a sample, which is element e of the batch.
template <class S>
__device__ Compute<S> parameter(const NormalArgs& a, const void* p, int kind, int64_t e,
                                int64_t i) {
  using T = Compute<S>;
  if (kind == kNone) return T(0);
  if (kind == kElement) return widen(static_cast<const S*>(p)[e]);
  return static_cast<const T*>(p)[a.shared_index(i)];
}

// The parameters of a pack of elements.
template <class P, class S, class T>
__device__ void parameters(const NormalArgs& a, const void* p, int kind, int64_t e, int64_t i,
                           T (&to)[P::kCount]) {
  if (kind == kElement) {
    const P pack = P::load(static_cast<const S*>(p) + e);
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) to[j] = widen(pack.lanes[j]);
  } else {
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) to[j] = parameter<S>(a, p, kind, e + j, i + j);
  }
}

// ---- forward -----------------------------------------------------------------------------------
template <class S, bool kWide, bool kBlock>
__global__ void __launch_bounds__(kThreads, kResident)
    normal_kernel(const NormalArgs a, const TeamPlan plan, const TeamSums<Compute<S>> sums) {
  using T = Compute<S>;
  using P = Pack<S, kWide>;
  __shared__ double scratch[kThreads / 32];
  const Team<kBlock> t(plan);
  const int64_t start = t.row * plan.features;
  T sum = T(0);
  for (int64_t i = t.begin + t.rank * P::kCount; i < t.end; i += t.size * P::kCount) {
    const P z = P::load(static_cast<const S*>(a.z) + start + i);
    T mean[P::kCount], log_std[P::kCount];
    parameters<P, S>(a, a.mean, a.mean_kind, start + i, i, mean);
    parameters<P, S>(a, a.log_std, a.log_std_kind, start + i, i, log_std);
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      const T d = normal_distance(T(widen(z.lanes[j])), mean[j], exp_(-log_std[j]));
      sum += normal_term(d) - log_std[j];
    }
  }
  sums.put(t, plan, t.sum(static_cast<double>(sum), scratch));
}

// ---- backward, of elements ---------------------------------------------------------------------
template <class S, bool kWide, bool kBlock>
__global__ void __launch_bounds__(kThreads, kResident)
    normal_grad_kernel(const NormalArgs a, const TeamPlan plan) {
  using T = Compute<S>;
  using P = Pack<S, kWide>;
  const Team<kBlock> t(plan);
  if (t.row >= plan.rows) return;
  const T grad = static_cast<const T*>(a.grad)[t.row];
  const int64_t start = t.row * plan.features;
  for (int64_t i = t.begin + t.rank * P::kCount; i < t.end; i += t.size * P::kCount) {
    const int64_t e = start + i;
    P z = P::load(static_cast<const S*>(a.z) + e), mean_out, std_out;
    T mean[P::kCount], log_std[P::kCount];
    parameters<P, S>(a, a.mean, a.mean_kind, e, i, mean);
    parameters<P, S>(a, a.log_std, a.log_std_kind, e, i, log_std);
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      const T scale = exp_(-log_std[j]);
      const T d = normal_distance(T(widen(z.lanes[j])), mean[j], scale);
      const NormalGrad<T> g = normal_vjp(d, scale, grad);
      z.lanes[j] = narrow<S>(g.z);
      mean_out.lanes[j] = narrow<S>(-g.z);
      std_out.lanes[j] = narrow<S>(g.log_std);
    }
    if (a.grad_z != nullptr) z.store(static_cast<S*>(a.grad_z) + e);
    if (a.grad_mean != nullptr) mean_out.store(static_cast<S*>(a.grad_mean) + e);
    if (a.grad_log_std != nullptr) std_out.store(static_cast<S*>(a.grad_log_std) + e);
  }
}

// ---- backward, summed over the batch -----------------------------------------------------------
// A thread has a pack of columns.  Where rows are shorter than a block, `lanes` threads share a
// pack and take rows in turn.
struct ColumnPlan {
  int64_t group, groups;  // rows of a group; groups
  int columns, lanes;     // of a block: threads side by side, and threads that share a pack
  double* partial;        // [groups, 2, features], in memory order of a sample
};

template <class S, bool kWide>
__global__ void __launch_bounds__(kThreads, kResident / 2)
    normal_columns_kernel(const NormalArgs a, const ColumnPlan p) {
  using T = Compute<S>;
  using P = Pack<S, kWide>;
  constexpr int w = P::kCount;
  __shared__ double mean_sums[kThreads], std_sums[kThreads];
  const int column_in_block = threadIdx.x % p.columns, lane = threadIdx.x / p.columns;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(p.columns) + column_in_block) * w;
  const bool mine = lane < p.lanes && i < a.features;
  const bool sums_mean = a.mean_kind == kEvent, sums_std = a.log_std_kind == kEvent;
  const int64_t end = min(a.rows, (blockIdx.y + int64_t{1}) * p.group);
  T mean[w] = {}, log_std[w] = {}, mean_sum[w] = {}, std_sum[w] = {};
  if (mine && a.mean_kind != kElement) parameters<P, S>(a, a.mean, a.mean_kind, 0, i, mean);
  if (mine && a.log_std_kind != kElement)
    parameters<P, S>(a, a.log_std, a.log_std_kind, 0, i, log_std);
  for (int64_t row = blockIdx.y * p.group + lane; row < end; row += p.lanes) {
    if (!mine) break;
    const int64_t e = row * a.features + i;
    if (a.mean_kind == kElement) parameters<P, S>(a, a.mean, kElement, e, i, mean);
    if (a.log_std_kind == kElement) parameters<P, S>(a, a.log_std, kElement, e, i, log_std);
    P z = P::load(static_cast<const S*>(a.z) + e), mean_out, std_out;
    const T grad = static_cast<const T*>(a.grad)[row];
#pragma unroll
    for (int j = 0; j < w; ++j) {
      const T scale = exp_(-log_std[j]);
      const T d = normal_distance(T(widen(z.lanes[j])), mean[j], scale);
      const NormalGrad<T> g = normal_vjp(d, scale, grad);
      z.lanes[j] = narrow<S>(g.z);
      mean_out.lanes[j] = narrow<S>(-g.z);
      std_out.lanes[j] = narrow<S>(g.log_std);
      mean_sum[j] -= g.z;
      std_sum[j] += g.log_std;
    }
    if (a.grad_z != nullptr) z.store(static_cast<S*>(a.grad_z) + e);
    if (a.grad_mean != nullptr && !sums_mean) mean_out.store(static_cast<S*>(a.grad_mean) + e);
    if (a.grad_log_std != nullptr && !sums_std) std_out.store(static_cast<S*>(a.grad_log_std) + e);
  }
#pragma unroll
  for (int j = 0; j < w; ++j) {
    __syncthreads();
    mean_sums[threadIdx.x] = static_cast<double>(mean_sum[j]);
    std_sums[threadIdx.x] = static_cast<double>(std_sum[j]);
    __syncthreads();
    if (!mine || lane != 0) continue;
    double mean_total = 0, std_total = 0;
    for (int l = 0; l < p.lanes; ++l) {
      mean_total += mean_sums[l * p.columns + column_in_block];
      std_total += std_sums[l * p.columns + column_in_block];
    }
    double* to = p.partial + 2 * blockIdx.y * a.features + i + j;
    to[0] = mean_total;
    to[a.features] = std_total;
  }
}

// Adds up the groups of each column in a fixed order, and writes the sums where the parameter has
// them. `team` lanes share a column: where there are few columns, there are many groups.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    join_columns_kernel(const NormalArgs a, const ColumnPlan p, int team) {
  const int64_t i = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / team;
  const int rank = threadIdx.x % team;
  double mean = 0, log_std = 0;
  for (int64_t g = i < a.features ? rank : p.groups; g < p.groups; g += team) {
    mean += p.partial[2 * g * a.features + i];
    log_std += p.partial[(2 * g + 1) * a.features + i];
  }
  mean = lanes_sum(mean, team);
  log_std = lanes_sum(log_std, team);
  if (rank != 0 || i >= a.features) return;
  const int64_t at = a.shared_index(i);
  if (a.grad_mean != nullptr && a.mean_kind == kEvent) {
    static_cast<T*>(a.grad_mean)[at] = static_cast<T>(mean);
  }
  if (a.grad_log_std != nullptr && a.log_std_kind == kEvent) {
    static_cast<T*>(a.grad_log_std)[at] = static_cast<T>(log_std);
  }
}

// ---- host --------------------------------------------------------------------------------------
// Whether every row starts on a 16-byte pack and is made of whole ones.
bool fits_packs(const NormalArgs& a, int64_t width) {
  for (const void* p :
       {a.z, a.mean, a.log_std, static_cast<const void*>(a.grad_z),
        static_cast<const void*>(a.grad_mean), static_cast<const void*>(a.grad_log_std)}) {
    if (!aligned16(p)) return false;
  }
  return a.features % width == 0;
}

template <class F>
void with_plan(const Tensor& z, const NormalArgs& a, F f) {
  with_teams(z, a.rows, a.features, [&](int64_t width) { return fits_packs(a, width); }, f);
}

Tensor normal_log_prob_cuda(const Tensor& z, const std::optional<Tensor>& mean,
                            const std::optional<Tensor>& log_std,
                            const std::optional<Tensor>& log_det) {
  const DeviceGuard guard(z.get_device_index());
  const NormalTensors t = normal_tensors(z, mean, log_std);
  const NormalArgs& a = t.args;
  Tensor out = empty_per_sample(z, a.rows);
  if (a.rows == 0) return out;
  const Tensor add = log_det ? dense_sums(*log_det, z) : Tensor();
  with_plan(z, a, [&]<class S, bool kWide, bool kBlock>(const TeamPlan& plan) {
    using T = Compute<S>;
    const Tensor partial = chunk_sums(z, plan);
    const TeamSums<T> sums{static_cast<T*>(out.mutable_data_ptr()),
                           static_cast<double*>(partial.mutable_data_ptr()), a.constant,
                           log_det ? static_cast<const T*>(address_of(add)) : nullptr};
    auto kernel = normal_kernel<S, kWide, kBlock>;
    PFK_LAUNCH(kernel, grid_of(blocks_of(plan)), kThreads, current_stream(z), a, plan, sums);
    launch_sum_chunks(plan, sums, current_stream(z));
  });
  return out;
}

ColumnPlan plan_columns(const NormalArgs& a, int64_t packs) {
  ColumnPlan p{};
  p.columns = static_cast<int>(packs < kThreads ? packs : kThreads);
  p.lanes = kThreads / p.columns;
  const int64_t tiles = (packs + p.columns - 1) / p.columns;
  p.group = a.rows * tiles / 1024;  // about 1,024 blocks
  p.group = p.group < kMinGroup ? kMinGroup : p.group > kMaxGroup ? kMaxGroup : p.group;
  if (p.group < p.lanes) p.group = p.lanes;
  // a grid has at most 65,535 blocks on its second axis
  if (p.group < (a.rows + 65534) / 65535) p.group = (a.rows + 65534) / 65535;
  p.groups = (a.rows + p.group - 1) / p.group;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> normal_grad_cuda(const Tensor& grad, const Tensor& z,
                                                    const std::optional<Tensor>& mean,
                                                    const std::optional<Tensor>& log_std,
                                                    int64_t wanted) {
  const DeviceGuard guard(z.get_device_index());
  NormalTensors t = normal_tensors(z, mean, log_std);
  NormalGrads grads = normal_grads(t, wanted);
  const Tensor upstream = dense_sums(grad, z);
  t.args.grad = upstream.const_data_ptr();
  const NormalArgs& a = t.args;
  const cudaStream_t stream = current_stream(z);
  const bool sums = (a.grad_mean != nullptr && a.mean_kind == kEvent) ||
                    (a.grad_log_std != nullptr && a.log_std_kind == kEvent);
  if (a.features == 0 || (a.rows == 0 && !sums)) return {grads.z, grads.mean, grads.log_std};
  if (!sums) {
    with_plan(z, a, [&]<class S, bool kWide, bool kBlock>(const TeamPlan& plan) {
      auto kernel = normal_grad_kernel<S, kWide, kBlock>;
      PFK_LAUNCH(kernel, grid_of(blocks_of(plan)), kThreads, stream, a, plan);
    });
    return {grads.z, grads.mean, grads.log_std};
  }
  each_storage(z, [&](auto type) {
    using S = decltype(type);
    constexpr int64_t width = 16 / sizeof(S);
    const bool wide = fits_packs(a, width);
    const int64_t packs = wide ? a.features / width : a.features;
    ColumnPlan p = plan_columns(a, packs);
    const Tensor partial = empty(z, {p.groups * 2 * a.features}, ScalarType::Double);
    p.partial = static_cast<double*>(partial.mutable_data_ptr());
    const dim3 grid(grid_of((packs + p.columns - 1) / p.columns), grid_of(p.groups));
    auto kernel = wide ? normal_columns_kernel<S, true> : normal_columns_kernel<S, false>;
    if (a.rows > 0) PFK_LAUNCH(kernel, grid, kThreads, stream, a, p);
    int team = 1;
    while (team < 32 && 4 * team < p.groups) team *= 2;
    PFK_LAUNCH(join_columns_kernel<Compute<S>>, grid_for(team * a.features), kThreads, stream, a, p,
               team);
  });
  return {grads.z, grads.mean, grads.log_std};
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("normal_log_prob", TORCH_BOX(&pfk::normal_log_prob_cuda));
  m.impl("normal_log_prob_backward", TORCH_BOX(&pfk::normal_grad_cuda));
}
