// SPDX-License-Identifier: Apache-2.0
// Channel mixing on a GPU, C <= 128.
//
// Lower bound of the time: the bytes of linear_cpu.cpp over the copy bandwidth, or the operations
// over the float32 rate (not that of tensor cores: TF32 has 13 bits less).  On an H100 both are
// equal at C = 80: below, memory decides.
//
// mix_kernel is a matrix product that multiplies the scale into the matrix when it loads it to
// shared memory, once a block, and adds pre and post when it loads and stores pixels.  A thread
// computes 8 channels of 16 bytes of pixels.  The backward pass runs it on grad_y with the
// transposed matrix. gradient_kernel then sums grad_y v^T over a block's share of the pixels, 8 x 8
// channels a thread, and two short kernels add up the blocks in a fixed order.  So grad_y is read
// twice (16 bytes an element instead of 12), because one kernel for both products would need the
// registers of both.  Not measured yet.
#include "linear/linear_launch.cuh"

PFK_BEGIN
namespace {

template <class S>
void launch_mix(const Plan& plan, const void* x, void* y, bool transposed,
                const LogDets<Compute<S>>& d, cudaStream_t stream) {
  each_size<S>(plan.shape.channels, [&](auto groups) {
    using Tile = MixTile<S, groups.value>;
    const MixTask<Tile> task{pixels_of<S>(plan, x, y), x, y, transposed};
    PFK_LAUNCH((mix_kernel<S, groups.value>), blocks_of(plan.p.count, Tile::kPixels, kBlocks),
               Tile::kThreads, stream, task, parameters_of<Compute<S>>(plan), d);
  });
}

using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> mix_cuda(const Tensor& x, const Tensor& weight,
                                    const Tensor& log_abs_det, std::optional<Tensor> log_scale,
                                    std::optional<Tensor> bias, bool inverse) {
  const DeviceGuard guard(x.get_device_index());
  const Plan plan = plan_of(x, weight, log_scale, bias, inverse);
  Tensor y = empty_like_canonical(plan.x), log_det = empty_per_sample(x, plan.shape.samples);
  if (plan.shape.samples == 0 || plan.shape.channels == 0) return {y, log_det};
  each_storage(x, [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    const LogDets<T> d{static_cast<const T*>(log_abs_det.const_data_ptr()),
                       static_cast<T*>(log_det.mutable_data_ptr()), plan.shape.samples,
                       static_cast<double>(plan.shape.space)};
    launch_mix<S>(plan, plan.x.tensor.const_data_ptr(), y.mutable_data_ptr(), false, d,
                  current_stream(x));
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mix_grad_cuda(
    const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x, const Tensor& weight,
    std::optional<Tensor> log_scale, std::optional<Tensor> bias, bool inverse, bool need_x,
    bool need_parameters) {
  const DeviceGuard guard(x.get_device_index());
  const Plan plan = plan_of(x, weight, log_scale, bias, inverse);
  const Tensor gy = with_format(grad_y, plan.x.channels_last);
  const Tensor gl = dense_sums(grad_log_det, x);
  const int64_t size = need_parameters ? plan.shape.channels : 0;
  Tensor grad_x = need_x ? empty_like_canonical(plan.x) : empty(x, {0});
  Tensor gw = empty(weight, {size, size});
  Tensor gd = empty(weight, {}), gs = empty(weight, {size});
  Tensor gb = empty(weight, {size});
  each_storage(x, [&](auto type) {
    using S = decltype(type);
    using T = Compute<S>;
    if (need_x && plan.shape.numel() > 0) {
      launch_mix<S>(plan, gy.const_data_ptr(), grad_x.mutable_data_ptr(), true, LogDets<T>{},
                    current_stream(x));
    }
  });
  if (need_parameters && plan.shape.channels > 0) {
    mix_parameter_gradients(gy, gl, x, weight, log_scale, bias, inverse, gw, gd, gs, gb);
  }
  return {grad_x, gw, gd, gs, gb};
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("linear_mix", TORCH_BOX(&pfk::mix_cuda));
  m.impl("linear_mix_backward", TORCH_BOX(&pfk::mix_grad_cuda));
}
