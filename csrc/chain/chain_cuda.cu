// SPDX-License-Identifier: Apache-2.0
// Chains of transforms on a GPU, forward.
//
// Lower bound of the time of MAF, D = 6, 5 x (50, 50), batch 200: 13 tiles on as many
// multiprocessors, so that it is latency that counts: 15 products, each a read of the weight from
// L2 (0.4 us or so) and 50 steps of a sum, and 5 maps of elements, 10 us together; batch 4096 has
// 256 tiles and takes twice as long.  A launch for each of the 100 ops of the layers takes 300 us.
//
// A block takes a tile of 16 samples through all transforms.  A number of a tile, be it a feature
// or a unit of a network, is a row of 16 samples in shared memory, or in global memory where rows
// do not fit.  The block follows a list of instructions (chain_listing.h); a barrier parts one from
// the next.  Results depend on nothing but the sample: neither on its place nor on the GPU.
#include "chain/chain_call.cuh"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;
using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <class T>
__device__ void forward_op(const ChainRun<T>& run, const ChainOp& o, ChainBlock<T>& b) {
  switch (o.kind) {
    case kElementsOp:
      return o.flags & kAffine ? chain_affine(run, o, b) : chain_spline(run, o, b);
    case kActNormOp:
      return each_number(o.rows, [&](int d, int s) {
        const ChainScale<T> a = scale_at(run, o, d);
        T& x = b.at(o.out + d, s);
        x = actnorm_apply(x, a.scale, a.bias, (o.flags & kBackwards) != 0);
      });
    case kShiftOp:
      return chain_shift(run, o, b);
    case kLogOp:
      return each_number(o.rows, [&](int d, int) {
        const double term = static_cast<double>(tensor_at<T>(run.tensors, o.tensor)[d]);
        b.log_det += o.flags & kBackwards ? -term : term;
      });
    case kNormalOp:
      return each_number(o.rows, [&](int d, int s) {
        b.log_det += static_cast<double>(normal_term(b.at(o.in + d, s))) - kHalfLog2Pi;
      });
    case kKeepOp:
      if (run.kept == nullptr) return;
      for (int i = threadIdx.x; i < o.rows * kChainSamples; i += kThreads) {
        kept_block(run, o, b)[i] = b.rows[o.in * kChainSamples + i];
      }
      return;
    default:
      return shared_op(run, o, b);
  }
}

// A block may take several tiles.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    chain_forward_kernel(const __grid_constant__ ChainRun<T> run) {
  PFK_SHARED_MEMORY(memory);
  double* partial = reinterpret_cast<double*>(memory);
  ChainBlock<T> b = block_in(run, memory);
  for (int64_t tile = blockIdx.x; tile < run.tiles; tile += gridDim.x) {
    start_tile(run, b, tile);
    load_samples(b, run.x, run.features, 0);
    b.log_det = 0;
    each_op(run, ops_in(memory), [&](const ChainOp& o) { forward_op(run, o, b); });
    partial[threadIdx.x] = b.log_det;
    store_samples(b, run.z, run.features, run.state);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < b.count) {
      double sum = 0;
      for (int i = threadIdx.x; i < kThreads; i += kChainSamples) sum += partial[i];
      run.log_det[tile * kChainSamples + threadIdx.x] = static_cast<T>(sum);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> chain_cuda(const Tensor& x, const Maybe& context,
                                              const Tensor& program, const Tensor& numbers,
                                              Tensors tensors, int64_t blocks, bool inverse) {
  check_features(program, x);
  const DeviceGuard guard(x.get_device_index());
  const Tensor in = dense(x);
  const int64_t samples = in.sizes()[0];
  ChainCall call(in, samples, context, program, numbers, tensors, inverse);
  const ChainListing& l = call.plan->l;
  STD_TORCH_CHECK(blocks == 0 || blocks == l.blocks, "pyflowkern::chain: ", blocks, " blocks for ",
                  l.blocks);
  Tensor z = empty(in, {samples, in.sizes()[1]}), log_det = empty(in, {samples});
  Tensor kept = empty(in, {blocks * l.features * chain_columns(samples)});
  if (samples == 0) return {z, log_det, kept};
  with_compute_type(dtype_of(in), [&](auto type) {
    using T = decltype(type);
    ChainRun<T> run = call.run<T>(false);
    run.x = static_cast<const T*>(in.const_data_ptr());
    run.z = static_cast<T*>(data_of(z)), run.log_det = static_cast<T*>(data_of(log_det));
    run.kept = blocks > 0 ? static_cast<T*>(data_of(kept)) : nullptr;
    constexpr int64_t kMostBlocks = 512;  // where rows are in global memory
    const int64_t few = std::min(call.tiles, kMostBlocks);
    const size_t bytes = call.place_rows(run, in, few);
    const int64_t grid = run.scratch == nullptr ? call.tiles : few;
    PFK_LAUNCH_SHARED(chain_forward_kernel<T>, grid_of(grid), kThreads, bytes, call.stream, run);
  });
  return {z, log_det, kept};
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) { m.impl("chain", TORCH_BOX(&pfk::chain_cuda)); }
