// SPDX-License-Identifier: Apache-2.0
// Steps of stochastic differential equations on a GPU.
//
// Lower bound of the time: the bytes of diffusion_cpu.cpp over the copy bandwidth.  A thread makes
// the four numbers of a Philox block, with some 70 integer and 130 other instructions for 48 bytes:
// less time than the memory needs.  The seed is read on the device.
#include "core/teams.cuh"
#include "diffusion/diffusion_host.h"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

// kDrifts: how many there are.  P: what is moved at once.
template <class S, int kDrifts, class P>
__device__ __forceinline__ void step_pack(const DiffusionArgs& a, int64_t i, const S* z) {
  const DiffusionStep<S> s(a);
  P x = P::load(static_cast<const S*>(a.x) + i), drift, other;
  if constexpr (kDrifts > 0) drift = P::load(static_cast<const S*>(a.drift) + i);
  if constexpr (kDrifts > 1) other = P::load(static_cast<const S*>(a.other) + i);
#pragma unroll
  for (int u = 0; u < P::kCount; ++u) {
    if constexpr (kDrifts == 0) x.lanes[u] = diffusion_step(x.lanes[u], z[u], s);
    if constexpr (kDrifts == 1) x.lanes[u] = diffusion_step(x.lanes[u], drift.lanes[u], z[u], s);
    if constexpr (kDrifts == 2) {
      x.lanes[u] = diffusion_step(x.lanes[u], drift.lanes[u], other.lanes[u], z[u], s);
    }
  }
  x.store_whole(static_cast<S*>(a.out) + i);
}

template <class S, int kDrifts>
__global__ void __launch_bounds__(kThreads, kResident)
    diffusion_kernel(const DiffusionArgs a, const int64_t* seed, bool wide) {
  const int64_t block = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t first = block * kNormals;
  if (first >= a.count) return;
  const PhiloxBlock<uint32_t> words =
      philox_block(static_cast<uint64_t>(block), static_cast<uint64_t>(*seed), a.stream);
  const NormalPair<S> p = box_muller<S>(words.word[0], words.word[1]);
  const NormalPair<S> q = box_muller<S>(words.word[2], words.word[3]);
  const S z[kNormals] = {p.first, p.second, q.first, q.second};
  if (wide && first + kNormals <= a.count) {
    using P = Pack<S, true>;
#pragma unroll
    for (int j = 0; j < kNormals; j += P::kCount) {
      step_pack<S, kDrifts, P>(a, first + j, z + j);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kNormals; ++j) {
    if (first + j < a.count) step_pack<S, kDrifts, Pack<S, false>>(a, first + j, z + j);
  }
}

template <class S>
void launch(const DiffusionTensors& t, const int64_t* seed, cudaStream_t stream) {
  const DiffusionArgs& a = t.args;
  const bool wide = aligned16(a.x) && aligned16(a.drift) && aligned16(a.other) && aligned16(a.out);
  const auto kernel = t.drifts == 0   ? diffusion_kernel<S, 0>
                      : t.drifts == 1 ? diffusion_kernel<S, 1>
                                      : diffusion_kernel<S, 2>;
  PFK_LAUNCH(kernel, grid_for((a.count + kNormals - 1) / kNormals), kThreads, stream, a, seed,
             wide);
}

Tensor diffusion_step_cuda(const Tensor& x, const std::optional<Tensor>& drift,
                           const std::optional<Tensor>& other, const Tensor& seed, int64_t stream,
                           double step, double scale) {
  const DeviceGuard guard(x.get_device_index());
  const DiffusionTensors t = diffusion_tensors(x, drift, other, seed, stream, step, scale);
  if (t.args.count == 0) return t.out;
  const int64_t* key = static_cast<const int64_t*>(seed.const_data_ptr());
  dtype_of(x) == kFloat64 ? launch<double>(t, key, current_stream(x))
                          : launch<float>(t, key, current_stream(x));
  return t.out;
}

}  // namespace

PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("diffusion_step", TORCH_BOX(&pfk::diffusion_step_cuda));
}
