// SPDX-License-Identifier: Apache-2.0
// Gradients of the parameters of channel mixing on a GPU: see linear_cuda.cu.
#include "linear/linear_gradient.cuh"
#include "linear/linear_launch.cuh"

PFK_BEGIN
namespace {

template <class S>
void launch_gradients(const Plan& plan, const Tensor& grad_y, const Tensor& grad_log_det,
                      const ParameterGradients<Compute<S>>& grad, cudaStream_t stream) {
  using T = Compute<S>;
  const int64_t c = plan.shape.channels;
  const Parameters<T> k = parameters_of<T>(plan);
  Tensor sums;  // may be freed after the last launch: memory is reused in stream order
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

}  // namespace

void mix_parameter_gradients(const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x,
                             const Tensor& weight, const std::optional<Tensor>& log_scale,
                             const std::optional<Tensor>& bias, bool inverse, Tensor& grad_weight,
                             Tensor& grad_log_abs_det, Tensor& grad_log_scale, Tensor& grad_bias) {
  const Plan plan = plan_of(x, weight, log_scale, bias, inverse);
  each_storage(x, [&](auto type) {
    using T = Compute<decltype(type)>;
    auto data = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    launch_gradients<decltype(type)>(
        plan, grad_y, grad_log_det,
        {data(grad_weight), data(grad_log_abs_det), data(grad_log_scale), data(grad_bias)},
        current_stream(x));
  });
}

PFK_END
