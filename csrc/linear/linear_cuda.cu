// SPDX-License-Identifier: Apache-2.0
// Channel mixing on a GPU, C <= 128.
//
// Floor: bytes as in linear_cpu.cpp over the copy bandwidth; flops over the float32 (not tensor
// core: TF32 would cost 13 bits) rate.  On an H100 the two meet at C = 80, so small C is bound by
// memory and the product must run well above half the peak.
//
// mix_kernel is a product with everything folded into its loads and stores: scale into the matrix
// (shared, loaded once a block), pre and post into the data.  A thread owns 8 channels of 16 bytes
// of pixels.  Backward runs it on grad_y with the transposed matrix; gradient_kernel then sums
// grad_y v^T over a block's share of the pixels, 8 x 8 channels a thread, and two short kernels
// join the blocks in a fixed order.  grad_y is so read twice (16 bytes an element instead of 12):
// one kernel for both products would need the registers of both.  Not measured yet.
#include <type_traits>

#include "core/teams.cuh"
#include "linear/linear_gradient.cuh"

PFK_BEGIN
namespace {

struct Plan {
  Canonical x;
  ImageShape shape;
  Pixels p;
  Tensor weight, log_scale, bias;  // contiguous
  bool scaled, biased, inverse;
};

Plan plan_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& log_scale,
             const std::optional<Tensor>& bias, bool inverse) {
  Plan plan{
      canonical(x),          image_shape(x),   {},     torch::stable::contiguous(weight), {}, {},
      log_scale.has_value(), bias.has_value(), inverse};
  if (plan.scaled) plan.log_scale = torch::stable::contiguous(*log_scale);
  if (plan.biased) plan.bias = torch::stable::contiguous(*bias);
  const ImageShape& s = plan.shape;
  STD_TORCH_CHECK(s.channels <= kMost, "pyflowkern: channel_mix takes at most 128 channels, got ",
                  s.channels);
  plan.p = {s.samples * s.space, s.channels, plan.x.channels_last || s.space == 1 ? 0 : s.space,
            false};
  return plan;
}

template <class T>
Parameters<T> parameters_of(const Plan& p) {
  auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  return {{p.scaled, p.inverse},
          data(p.weight),
          p.scaled ? data(p.log_scale) : nullptr,
          p.biased ? data(p.bias) : nullptr};
}

// Pixels whose 16-byte packs are aligned in both tensors.
template <class S>
Pixels pixels_of(const Plan& plan, const void* a, const void* b) {
  Pixels p = plan.p;
  const int64_t run = p.inner == 0 ? p.channels : p.inner;
  p.wide = run % (16 / static_cast<int64_t>(sizeof(S))) == 0 && aligned16(a) && aligned16(b);
  return p;
}

// Calls f with the number of 8-channel groups that hold `channels`, as a constant.
template <class S, class F>
void each_size(int64_t channels, F f) {
#define PFK_SIZE(groups) \
  if (channels <= 8 * groups) return f(std::integral_constant<int, groups>{})
  PFK_SIZE(2);
  if constexpr (sizeof(S) == 4) {
    PFK_SIZE(3);
    PFK_SIZE(4);
    PFK_SIZE(6);
    PFK_SIZE(8);
    PFK_SIZE(12);
  } else {
    PFK_SIZE(4);
    PFK_SIZE(8);
  }
  f(std::integral_constant<int, 16>{});
#undef PFK_SIZE
}

unsigned blocks_of(int64_t pixels, int64_t tile, int64_t most) {
  const int64_t tiles = (pixels + tile - 1) / tile;
  return static_cast<unsigned>(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

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

template <class S>
void launch_gradients(const Plan& plan, const Tensor& grad_y, const Tensor& grad_log_det,
                      const ParameterGradients<Compute<S>>& grad, cudaStream_t stream) {
  using T = Compute<S>;
  const int64_t c = plan.shape.channels;
  const Parameters<T> k = parameters_of<T>(plan);
  Tensor sums;  // must outlive its last launch only on the host: memory is reused in stream order
  GradientTask<S> task{pixels_of<S>(plan, grad_y.const_data_ptr(), plan.x.tensor.const_data_ptr()),
                       static_cast<const S*>(grad_y.const_data_ptr()),
                       static_cast<const S*>(plan.x.tensor.const_data_ptr()),
                       static_cast<const T*>(grad_log_det.const_data_ptr()),
                       plan.shape.samples,
                       nullptr};
  const int64_t outputs = c * (c + 1) + 1;
  int64_t blocks = 0;
  each_size<S>(c, [&](auto groups) {
    using Tile = GradientTile<S, groups.value>;
    blocks = blocks_of(plan.p.count, Tile::kPixels, groups.value > 6 ? 132 : 264);
    sums = empty(plan.weight, {(blocks + kSegments) * outputs}, ScalarType::Double);
    task.partial = static_cast<double*>(sums.mutable_data_ptr());
    PFK_LAUNCH((gradient_kernel<S, groups.value>), static_cast<unsigned>(blocks), Tile::kThreads,
               stream, task, k);
  });
  double* segments = task.partial + blocks * outputs;
  const dim3 grid(static_cast<unsigned>((outputs + kThreads - 1) / kThreads), kSegments);
  PFK_LAUNCH(join_kernel, grid, kThreads, stream, task.partial, blocks, outputs, segments);
  PFK_LAUNCH(finish_kernel<T>, static_cast<unsigned>(c), kMost, stream, segments,
             static_cast<int>(c), static_cast<double>(plan.shape.space), k, grad);
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
  const Tensor gl = torch::stable::contiguous(grad_log_det);
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
    if (!need_parameters || plan.shape.channels == 0) return;
    auto data = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    launch_gradients<S>(plan, gy, gl, {data(gw), data(gd), data(gs), data(gb)}, current_stream(x));
  });
  return {grad_x, gw, gd, gs, gb};
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("channel_mix", TORCH_BOX(&pfk::mix_cuda));
  m.impl("channel_mix_backward", TORCH_BOX(&pfk::mix_grad_cuda));
}
