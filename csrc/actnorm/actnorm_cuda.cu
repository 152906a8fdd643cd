// SPDX-License-Identifier: Apache-2.0
// ActNorm on a GPU.
//
// Floor: the bytes of actnorm_cpu.cpp over the copy bandwidth.  Forward is elementwise.  Backward
// and the moments give every block 32 channels (or one, where pixels are innermost) of a run of
// outer rows; blocks leave partial results that a second kernel joins in order, so the same input
// gives the same bits.
#include "actnorm/actnorm.h"
#include "core/cuda.cuh"

PFK_BEGIN
namespace {

// log_scale and bias stay on the device, so a' is exponentiated where it is used.
template <class T>
struct Channels {
  const T* log_scale;
  const T* bias;
  bool inverse;
  __device__ T scale(int64_t c) const { return exp_(inverse ? -log_scale[c] : log_scale[c]); }
};

template <class S, bool kWide>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const ActNormArgs a, const Channels<Compute<S>> k, int64_t elements) {
  using P = Pack<S, kWide>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * P::kCount;
  int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * P::kCount;
  for (; e < elements; e += step) {
    P x = P::load(static_cast<const S*>(a.in) + e);
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      const int64_t c = (e + j) / a.inner % a.channels;
      x.lanes[j] = narrow<S>(actnorm_apply(widen(x.lanes[j]), k.scale(c), k.bias[c], k.inverse));
    }
    x.store(static_cast<S*>(a.out) + e);
  }
}

// Every sample's log-det is the same number.
template <class T>
__global__ void __launch_bounds__(kThreads)
    log_det_kernel(const Channels<T> k, int64_t channels, int64_t space, int64_t samples,
                   T* log_det) {
  __shared__ double scratch[kThreads / 32];
  __shared__ double total;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) sum += k.log_scale[c];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) total = sum * static_cast<double>(k.inverse ? -space : space);
  __syncthreads();
  for (int64_t n = threadIdx.x; n < samples; n += kThreads) log_det[n] = static_cast<T>(total);
}

// Which channel and which elements a thread sees: element(i) for i = first(), first() + stride(),
// ... below count(). Pixels innermost: the block walks the pixels of one channel.  Channels
// innermost: 32 channels by 8 rows.
struct Walk {
  int64_t begin, end, channels, inner;
  __device__ bool flat() const { return inner == 1; }
  __device__ int64_t channel() const {
    return flat() ? blockIdx.x * int64_t{32} + threadIdx.x % 32 : blockIdx.x;
  }
  __device__ int64_t first() const { return flat() ? threadIdx.x / 32 : threadIdx.x; }
  __device__ int64_t stride() const { return flat() ? kThreads / 32 : kThreads; }
  __device__ int64_t count() const { return channel() < channels ? (end - begin) * inner : 0; }
  __device__ int64_t element(int64_t i) const {
    return ((begin + i / inner) * channels + channel()) * inner + i % inner;
  }
  // The threads that share a channel and their place among them.
  __device__ int members() const { return flat() ? kThreads / 32 : kThreads; }
  __device__ int member() const { return flat() ? threadIdx.x / 32 : threadIdx.x; }
  __device__ int slot(int m) const { return flat() ? m * 32 + threadIdx.x % 32 : m; }
};

__device__ Walk walk_of(const ActNormArgs& a) {
  const int64_t begin = blockIdx.y * a.rows;
  return {begin, min(a.outer, begin + a.rows), a.channels, a.inner};
}
__device__ double* partial_of(const ActNormArgs& a, int64_t task, int64_t channel) {
  return a.partial + 2 * (task * a.channels + channel);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const ActNormArgs a, const Channels<Compute<S>> k) {
  using T = Compute<S>;
  __shared__ double sums[kThreads], weights[kThreads];
  const Walk w = walk_of(a);
  const bool mine = w.channel() < a.channels;
  const T scale = mine ? k.scale(w.channel()) : T(0), bias = mine ? k.bias[w.channel()] : T(0);
  double sum = 0, weighted = 0;
  for (int64_t i = w.first(); i < w.count(); i += w.stride()) {
    const int64_t e = w.element(i);
    const T g = widen(static_cast<const S*>(a.grad_out)[e]);
    const T v = actnorm_shifted(T(widen(static_cast<const S*>(a.in)[e])), bias, k.inverse);
    static_cast<S*>(a.out)[e] = narrow<S>(g * scale);
    sum += g;
    weighted += g * v;
  }
  sums[threadIdx.x] = sum;
  weights[threadIdx.x] = weighted;
  for (int half = w.members() / 2; half > 0; half /= 2) {
    __syncthreads();
    if (w.member() < half) {
      sums[threadIdx.x] += sums[w.slot(w.member() + half)];
      weights[threadIdx.x] += weights[w.slot(w.member() + half)];
    }
  }
  if (w.member() != 0 || !mine) return;
  double* out = partial_of(a, blockIdx.y, w.channel());
  out[0] = sums[threadIdx.x];
  out[1] = weights[threadIdx.x];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const ActNormArgs a, const Channels<T> k, int64_t tasks, const T* grad_log_det,
                  int64_t samples, double space, T* grad_log_scale, T* grad_bias) {
  __shared__ double scratch[kThreads / 32];
  __shared__ double total;
  double sum = 0;
  for (int64_t n = threadIdx.x; n < samples; n += kThreads) sum += grad_log_det[n];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) total = sum * space;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < a.channels; c += kThreads) {
    double plain = 0, weighted = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      plain += partial_of(a, task, c)[0];
      weighted += partial_of(a, task, c)[1];
    }
    const ActNormGrad g = actnorm_finish(plain, weighted, k.scale(c), total, k.inverse);
    grad_log_scale[c] = static_cast<T>(g.log_scale);
    grad_bias[c] = static_cast<T>(g.bias);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) moments_kernel(const ActNormArgs a) {
  __shared__ double counts[kThreads], means[kThreads], squares[kThreads];
  const Walk w = walk_of(a);
  Moments m{0, 0, 0};
  for (int64_t i = w.first(); i < w.count(); i += w.stride()) {
    const double v = widen(static_cast<const S*>(a.in)[w.element(i)]);
    m = merge(m, {1, v, 0});
  }
  counts[threadIdx.x] = m.count, means[threadIdx.x] = m.mean, squares[threadIdx.x] = m.m2;
  for (int half = w.members() / 2; half > 0; half /= 2) {
    __syncthreads();
    if (w.member() < half) {
      const int other = w.slot(w.member() + half);
      m = merge(m, {counts[other], means[other], squares[other]});
      counts[threadIdx.x] = m.count, means[threadIdx.x] = m.mean, squares[threadIdx.x] = m.m2;
    }
  }
  if (w.member() != 0 || w.channel() >= a.channels) return;
  double* out = partial_of(a, blockIdx.y, w.channel());
  out[0] = m.mean;
  out[1] = m.m2;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    join_moments_kernel(const ActNormArgs a, int64_t tasks, T* mean, T* variance) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= a.channels) return;
  Moments m{0, 0, 0};
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t rows = min(a.rows, a.outer - task * a.rows);
    const double* p = partial_of(a, task, c);
    m = merge(m, {static_cast<double>(rows * a.inner), p[0], p[1]});
  }
  mean[c] = static_cast<T>(m.count > 0 ? m.mean : NAN);
  variance[c] = static_cast<T>(m.count > 0 ? m.m2 / m.count : NAN);
}

// ---- host
// ----------------------------------------------------------------------------------------------------------
struct Plan {
  Canonical x;
  ImageShape shape;
  ActNormArgs args{};
  int64_t tasks;
  dim3 grid;
  Tensor partial;
};

// Enough blocks to fill any GPU, few enough for the last pass over them to be short.
Plan plan_of(const Tensor& x, bool sums) {
  Plan p{canonical(x), image_shape(x), {}, 0, {}, {}};
  ActNormArgs& a = p.args;
  const bool flat = p.x.channels_last || p.shape.space == 1;
  a.channels = p.shape.channels;
  a.outer = flat ? p.shape.samples * p.shape.space : p.shape.samples;
  a.inner = flat ? 1 : p.shape.space;
  a.in = p.x.tensor.const_data_ptr();
  const int64_t across = flat ? (a.channels + 31) / 32 : a.channels;
  const int64_t wanted = across >= 2048 ? 1 : 2048 / (across > 0 ? across : 1);
  a.rows = (a.outer + wanted - 1) / wanted;
  if (a.rows < 1) a.rows = 1;
  p.tasks = (a.outer + a.rows - 1) / a.rows;
  p.grid = dim3(static_cast<unsigned>(across), static_cast<unsigned>(p.tasks));
  if (sums) {
    p.partial = empty(x, {2 * p.tasks * a.channels}, ScalarType::Double);
    a.partial = static_cast<double*>(p.partial.mutable_data_ptr());
  }
  return p;
}

template <class S>
void launch_forward(const Plan& p, Channels<Compute<S>> k, Tensor& log_det, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(S);
  const int64_t elements = p.shape.numel();
  const bool wide = elements % width == 0 && aligned16(p.args.in) && aligned16(p.args.out);
  const int64_t blocks = (elements / (wide ? width : 1) + kThreads - 1) / kThreads;
  auto kernel = wide ? forward_kernel<S, true> : forward_kernel<S, false>;
  if (elements > 0) {
    PFK_LAUNCH(kernel, static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, stream,
               p.args, k, elements);
  }
  if (p.shape.samples == 0) return;
  PFK_LAUNCH(log_det_kernel<Compute<S>>, 1, kThreads, stream, k, p.shape.channels, p.shape.space,
             p.shape.samples, static_cast<Compute<S>*>(log_det.mutable_data_ptr()));
}

template <class S>
void launch_backward(const Plan& p, Channels<Compute<S>> k, const Tensor& grad_log_det, Tensor& gs,
                     Tensor& gb, cudaStream_t stream) {
  using T = Compute<S>;
  if (p.shape.numel() > 0) PFK_LAUNCH(backward_kernel<S>, p.grid, kThreads, stream, p.args, k);
  PFK_LAUNCH(finish_kernel<T>, 1, kThreads, stream, p.args, k, p.shape.numel() > 0 ? p.tasks : 0,
             static_cast<const T*>(grad_log_det.const_data_ptr()), p.shape.samples,
             static_cast<double>(p.shape.space), static_cast<T*>(gs.mutable_data_ptr()),
             static_cast<T*>(gb.mutable_data_ptr()));
}

template <class S>
void launch_moments(const Plan& p, Tensor& mean, Tensor& variance, cudaStream_t stream) {
  using T = Compute<S>;
  if (p.shape.channels == 0) return;
  const bool any = p.shape.numel() > 0;
  if (any) PFK_LAUNCH(moments_kernel<S>, p.grid, kThreads, stream, p.args);
  const unsigned blocks = static_cast<unsigned>((p.shape.channels + kThreads - 1) / kThreads);
  PFK_LAUNCH(join_moments_kernel<T>, blocks, kThreads, stream, p.args, any ? p.tasks : 0,
             static_cast<T*>(mean.mutable_data_ptr()),
             static_cast<T*>(variance.mutable_data_ptr()));
}

// Calls f with a value of the storage type of `t`.
template <class F>
void by_dtype(const Tensor& t, F f) {
  switch (dtype_of(t)) {
    case kFloat32:
      return f(float{});
    case kFloat64:
      return f(double{});
    case kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(__half{});
  }
}

template <class T>
Channels<T> channels_of(const Tensor& log_scale, const Tensor& bias, bool inverse) {
  return {static_cast<const T*>(log_scale.const_data_ptr()),
          static_cast<const T*>(bias.const_data_ptr()), inverse};
}

using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> actnorm_cuda(const Tensor& x, const Tensor& log_scale,
                                        const Tensor& bias, bool inverse) {
  const DeviceGuard guard(x.get_device_index());
  Plan p = plan_of(x, false);
  Tensor y = empty_like_canonical(p.x), log_det = empty_per_sample(x, p.shape.samples);
  const Tensor s = torch::stable::contiguous(log_scale), b = torch::stable::contiguous(bias);
  p.args.out = y.mutable_data_ptr();
  by_dtype(x, [&](auto type) {
    using S = decltype(type);
    launch_forward<S>(p, channels_of<Compute<S>>(s, b, inverse), log_det, current_stream(x));
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor> actnorm_grad_cuda(const Tensor& grad_y,
                                                     const Tensor& grad_log_det, const Tensor& x,
                                                     const Tensor& log_scale, const Tensor& bias,
                                                     bool inverse) {
  const DeviceGuard guard(x.get_device_index());
  Plan p = plan_of(x, true);
  const Tensor gy = with_format(grad_y, p.x.channels_last);
  const Tensor gl = torch::stable::contiguous(grad_log_det);
  const Tensor s = torch::stable::contiguous(log_scale), b = torch::stable::contiguous(bias);
  Tensor grad_x = empty_like_canonical(p.x);
  Tensor gs = empty(s, s.sizes()), gb = empty(b, b.sizes());
  p.args.out = grad_x.mutable_data_ptr();
  p.args.grad_out = gy.const_data_ptr();
  by_dtype(x, [&](auto type) {
    using S = decltype(type);
    launch_backward<S>(p, channels_of<Compute<S>>(s, b, inverse), gl, gs, gb, current_stream(x));
  });
  return {grad_x, gs, gb};
}

std::tuple<Tensor, Tensor> moments_cuda(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  const Plan p = plan_of(x, true);
  Tensor mean = empty(x, {p.shape.channels}, accumulation_type(x));
  Tensor variance = empty(x, {p.shape.channels}, accumulation_type(x));
  by_dtype(
      x, [&](auto type) { launch_moments<decltype(type)>(p, mean, variance, current_stream(x)); });
  return {mean, variance};
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("actnorm", TORCH_BOX(&pfk::actnorm_cuda));
  m.impl("actnorm_backward", TORCH_BOX(&pfk::actnorm_grad_cuda));
  m.impl("channel_moments", TORCH_BOX(&pfk::moments_cuda));
}
