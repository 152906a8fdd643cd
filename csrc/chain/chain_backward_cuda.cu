// SPDX-License-Identifier: Apache-2.0
// The gradients of a chain on a GPU: two launches, whatever the number of transforms.
//
// Lower bound of the time: three times that of the forward pass, which is made again for each step
// from its input before both gradients of its products.
//
// A task is some consecutive tiles of a block.  Its gradients of weights lie in memory of its own,
// where each number has one thread that changes it; the second launch adds up the tasks in their
// order.  Tiles and tasks depend on the sizes alone, so that results have the same bits every run
// and on every GPU.
#include "chain/chain_call.cuh"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;
using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <class T>
__device__ void backward_op(const ChainRun<T>& run, const ChainOp& o, ChainBlock<T>& b) {
  if ((o.flags & kForTensors && b.grads == nullptr) ||
      (o.flags & kForContext && run.grad_c == nullptr)) {
    return;
  }
  switch (o.kind) {
    case kElementsVjpOp:
      return o.flags & kAffine ? chain_affine_vjp(run, o, b) : chain_spline_vjp(run, o, b);
    case kOuterOp:
      return chain_outer(run, o, b);
    case kActNormVjpOp:
      return chain_actnorm_vjp(run, o, b);
    case kRowSumsOp:
      return add_row_sums(b, o.rows, o.grad, [&](int r, int s) { return b.at(o.in + r, s); });
    case kRowDotsOp:
      return chain_row_dots(run, o, b);
    case kNormalVjpOp:
      return each_number(o.rows, [&](int d, int s) {
        const T g = b.at(run.grad_log, s);
        b.at(o.out + d, s) += normal_vjp(b.at(o.in + d, s), T(1), g).z;
      });
    case kLoadOp:
      for (int i = threadIdx.x; i < o.rows * kChainSamples; i += kThreads) {
        b.rows[o.out * kChainSamples + i] = kept_block(run, o, b)[i];
      }
      return;
    default:
      return shared_op(run, o, b);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    chain_backward_kernel(const __grid_constant__ ChainRun<T> run) {
  PFK_SHARED_MEMORY(memory);
  ChainBlock<T> b = block_in(run, memory);
  if (run.grads != nullptr) b.grads = run.grads + blockIdx.x * run.size;
  const int64_t begin = blockIdx.x * run.tiles / run.tasks;
  const int64_t end = (blockIdx.x + int64_t{1}) * run.tiles / run.tasks;
  for (int64_t tile = begin; tile < end; ++tile) {
    b.first = tile == begin;
    start_tile(run, b, tile);
    load_samples(b, run.grad_z, run.features, 0);
    load_samples(b, run.grad_log_det, 1, run.grad_log);
    for (int i = threadIdx.x; i < run.context * kChainSamples; i += kThreads) {
      b.rows[run.grad_context * kChainSamples + i] = T(0);
    }
    __syncthreads();
    if (b.grads != nullptr) {
      add_row_sums(b, 1, 0, [&](int, int s) { return b.at(run.grad_log, s); });
    }
    each_op(run, ops_in(memory), [&](const ChainOp& o) { backward_op(run, o, b); });
    if (run.grad_x != nullptr) store_samples(b, run.grad_x, run.features, run.state);
    if (run.grad_c != nullptr) store_samples(b, run.grad_c, run.context, run.grad_context);
    __syncthreads();
  }
}

// The sum of a number over the tasks.
template <class T>
__device__ double sum_tasks(const ChainFinish& f, int64_t at) {
  const T* p = static_cast<const T*>(f.grads) + at;
  double sum = 0;
  for (int64_t t = 0; t < f.tasks; ++t) sum += static_cast<double>(p[t * f.size]);
  return sum;
}

// A thread has a number of a gradient; a block has numbers of one tensor.
template <class T>
__global__ void __launch_bounds__(kThreads)
    chain_finish_kernel(const __grid_constant__ ChainFinish f) {
  int low = 0, high = f.count - 1;  // the last tensor that begins at this block or before it
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (f.codes[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const ChainGradCode& g = f.codes[low];
  const int64_t e = (blockIdx.x - g.first_block) * kThreads + threadIdx.x;
  if (e >= static_cast<int64_t>(g.rows) * g.columns) return;
  const int r = static_cast<int>(e / g.columns), c = static_cast<int>(e - int64_t{r} * g.columns);
  const bool zero = g.flags & kGradZero || (g.flags & kGradLower && c >= r) ||
                    (g.flags & kGradUpper && c <= r) ||
                    (g.prefix >= 0 && c >= f.ints[g.prefix + r]);
  double sum = 0;
  if (!zero && !(g.flags & kGradNoSum)) sum = sum_tasks<T>(f, g.at + e);
  if (g.flags & kGradNegative) sum = -sum;
  if (g.flags & kGradWithLog) {
    const double of_log_det = sum_tasks<T>(f, 0);
    sum += f.inverse ? -of_log_det : of_log_det;
  }
  T* out = const_cast<T*>(tensor_at<T>(f.out, low));
  out[static_cast<int64_t>(ordered(f.ints, g.row_order, r)) * g.columns +
      ordered(f.ints, g.column_order, c)] = static_cast<T>(sum);
}

// As many tasks as there are tiles, unless their gradients would need more than 128 MiB.
int64_t count_tasks(const ChainCall& call, int64_t element_size) {
  const int64_t room = (int64_t{128} << 20) / (call.plan->l.size * element_size);
  return std::min(call.tiles, std::min<int64_t>(128, std::max<int64_t>(16, room)));
}

const void* gradient(const Maybe& grad, int64_t count, const Tensor& like, Tensor& own) {
  if (!grad) return nullptr;
  check_gradient(*grad, count, like);
  own = dense(*grad);
  return address_of(own);
}

// The gradients of the tensors from the sums of the tasks.
template <class T>
Tensors finish(const ChainCall& call, const ChainRun<T>& run, const Tensor& like,
               const Tensors& tensors) {
  const ChainListing& l = call.plan->l;
  Tensors grads;
  for (const Tensor& t : tensors) grads.push_back(empty(like, t.sizes()));
  if (l.grad_blocks == 0) return grads;
  Tensor many;
  const ChainFinish f{call.plan->at<ChainGradCode>(call.plan->grads),
                      static_cast<int>(tensors.size()),
                      l.inverse,
                      run.ints,
                      run.grads,
                      run.tasks,
                      run.size,
                      pointers_to(grads, like, call.stream, many)};
  PFK_LAUNCH(chain_finish_kernel<T>, grid_of(l.grad_blocks), kThreads, call.stream, f);
  return grads;
}

std::tuple<Tensor, Tensor, Tensors> chain_backward_cuda(
    const Maybe& grad_z, const Maybe& grad_log_det, const Tensor& x, const Tensor& kept,
    const Maybe& context, const Tensor& program, const Tensor& numbers, Tensors tensors,
    bool inverse, bool with_x, bool with_context, bool with_tensors) {
  const DeviceGuard guard(kept.get_device_index());
  check_features(program, x);
  const int64_t samples = x.sizes()[0];
  ChainCall call(kept, samples, context, program, numbers, tensors, inverse);
  const ChainListing& l = call.plan->l;
  STD_TORCH_CHECK(
      kept.is_contiguous() && kept.numel() == l.blocks * l.features * chain_columns(samples),
      "pyflowkern::chain_backward: needs what a forward pass kept");
  with_context = with_context && context;
  Tensor grad_x = empty(kept, {with_x ? samples : 0, l.features});
  Tensor grad_c = empty(kept, {with_context ? samples : 0, l.context});
  Tensor of_z, of_log_det;
  Tensors grads(with_tensors ? 0 : tensors.size(), empty(kept, {0}));
  with_compute_type(dtype_of(kept), [&](auto type) {
    using T = decltype(type);
    ChainRun<T> run = call.run<T>(true);
    run.grad_z = static_cast<const T*>(gradient(grad_z, samples * l.features, kept, of_z));
    run.grad_log_det = static_cast<const T*>(gradient(grad_log_det, samples, kept, of_log_det));
    run.kept = static_cast<T*>(data_of(kept));
    run.grad_x = with_x ? static_cast<T*>(data_of(grad_x)) : nullptr;
    run.grad_c = with_context ? static_cast<T*>(data_of(grad_c)) : nullptr;
    run.tasks = count_tasks(call, sizeof(T));
    const Tensor sums = empty(kept, {with_tensors ? run.tasks * run.size : 0});
    run.grads = with_tensors ? static_cast<T*>(data_of(sums)) : nullptr;
    if (samples > 0) {
      const size_t bytes = call.place_rows(run, kept, run.tasks);
      PFK_LAUNCH_SHARED(chain_backward_kernel<T>, grid_of(run.tasks), kThreads, bytes, call.stream,
                        run);
    }
    if (with_tensors) grads = finish(call, run, kept, tensors);
  });
  return {grad_x, grad_c, grads};
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("chain_backward", TORCH_BOX(&pfk::chain_backward_cuda));
}
