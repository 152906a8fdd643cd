// SPDX-License-Identifier: Apache-2.0
// ActNorm on a GPU.
//
// Lower bound of the time: the bytes of actnorm_cpu.cpp over the copy bandwidth.  Forward is
// elementwise.  In the backward pass and for moments, a block has some channels (one, where pixels
// are innermost) of several outer rows.  A second kernel joins the results of blocks in order, so
// that the same input gives the same bits.  All use 16-byte packs where rows consist of whole ones.
#include "actnorm/actnorm_walk.cuh"

PFK_BEGIN
namespace {

// log_scale and bias are on the device: a' is computed where it is used.
template <class T>
struct Channels {
  const T* log_scale;
  const T* bias;
  bool inverse;
  __device__ T scale(int64_t c) const { return exp_(inverse ? -log_scale[c] : log_scale[c]); }
};

template <class S, bool kWide>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const ActNormArgs a, const Channels<Compute<S>> k, const Divider inner,
                   const Divider channels, int64_t elements) {
  using T = Compute<S>;
  using P = Pack<S, kWide>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * P::kCount;
  int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * P::kCount;
  for (; e < elements; e += step) {
    P x = P::load(static_cast<const S*>(a.in) + e);
    const int64_t row = inner.quotient(e);
    int64_t pixel = e - row * a.inner, c = row - channels.quotient(row) * a.channels;
    T scale = k.scale(c), bias = k.bias[c];
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      x.lanes[j] = narrow<S>(actnorm_apply(T(widen(x.lanes[j])), scale, bias, k.inverse));
      if (j + 1 < P::kCount && ++pixel == a.inner) {
        pixel = 0;
        c = c + 1 == a.channels ? 0 : c + 1;
        scale = k.scale(c), bias = k.bias[c];
      }
    }
    x.store(static_cast<S*>(a.out) + e);
  }
}

// Every sample has the same log-det; every block computes it.
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
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; n < samples; n += step) log_det[n] = static_cast<T>(total);
}

__device__ double* partial_of(const ActNormArgs& a, int64_t task, int64_t channel) {
  return a.partial + 2 * (task * a.channels + channel);
}

// The gradient of the log-dets; every task of the backward kernel adds up a share of it.
template <class T>
struct LogDetGradient {
  const T* of_sample;
  int64_t samples;
  double* share;  // [tasks]
};

template <class S, bool kWide, bool kFlat>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const ActNormArgs a, const Channels<Compute<S>> k, const WalkPlan plan,
                    const LogDetGradient<Compute<S>> d) {
  using T = Compute<S>;
  using W = Walk<S, kWide, kFlat>;
  using P = typename W::P;
  __shared__ double sums[kThreads], weights[kThreads];
  const W w(a, plan);
  const bool mine = w.channel() < a.channels;
  T scale[W::kLanes], bias[W::kLanes];
  double sum[W::kLanes] = {}, weighted[W::kLanes] = {};
#pragma unroll
  for (int l = 0; l < W::kLanes; ++l) {
    scale[l] = mine ? k.scale(w.channel() + l) : T(0);
    bias[l] = mine ? k.bias[w.channel() + l] : T(0);
  }
  w.each([&](int64_t e) {
    P g = P::load(static_cast<const S*>(a.grad_out) + e);
    const P in = P::load(static_cast<const S*>(a.in) + e);
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      const int l = kFlat ? j : 0;
      const T upstream = widen(g.lanes[j]);
      const T v = actnorm_shifted(T(widen(in.lanes[j])), bias[l], k.inverse);
      g.lanes[j] = narrow<S>(upstream * scale[l]);
      sum[l] += upstream;
      weighted[l] += upstream * v;
    }
    g.store_whole(static_cast<S*>(a.out) + e);
  });
#pragma unroll
  for (int l = 0; l < W::kLanes; ++l) {
    __syncthreads();
    sums[threadIdx.x] = sum[l];
    weights[threadIdx.x] = weighted[l];
    for (int half = w.members() / 2; half > 0; half /= 2) {
      __syncthreads();
      if (w.member() < half) {
        sums[threadIdx.x] += sums[w.slot(w.member() + half)];
        weights[threadIdx.x] += weights[w.slot(w.member() + half)];
      }
    }
    if (w.member() != 0 || !mine) continue;
    w.partial(l)[0] = sums[threadIdx.x];
    w.partial(l)[1] = weights[threadIdx.x];
  }
  if (blockIdx.x != 0) return;
  double share = 0;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
  int64_t n = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  for (; n < d.samples; n += step) share += d.of_sample[n];
  __syncthreads();
  share = block_sum(share, sums);
  if (threadIdx.x == 0) d.share[blockIdx.y] = share;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const ActNormArgs a, const Channels<T> k, int64_t tasks, const double* shares,
                  double space, T* grad_log_scale, T* grad_bias) {
  __shared__ double scratch[kThreads / 32];
  __shared__ double total;
  double sum = 0;
  for (int64_t task = threadIdx.x; task < tasks; task += kThreads) sum += shares[task];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) total = sum * space;
  __syncthreads();
  constexpr int kWarps = kThreads / 32;  // a warp has a channel
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; c < a.channels;
       c += step) {
    double plain = 0, weighted = 0;
    for (int64_t task = lane; task < tasks; task += 32) {
      plain += partial_of(a, task, c)[0];
      weighted += partial_of(a, task, c)[1];
    }
    plain = lanes_sum(plain);
    weighted = lanes_sum(weighted);
    if (lane != 0) continue;
    const ActNormGrad g = actnorm_finish(plain, weighted, k.scale(c), total, k.inverse);
    grad_log_scale[c] = static_cast<T>(g.log_scale);
    grad_bias[c] = static_cast<T>(g.bias);
  }
}

// Each thread sums the differences to the first value that it reads, and their squares: accurate
// for any mean, without a division for each element.
template <class S, bool kWide, bool kFlat>
__global__ void __launch_bounds__(kThreads, 2)
    moments_kernel(const ActNormArgs a, const WalkPlan plan) {
  using W = Walk<S, kWide, kFlat>;
  using P = typename W::P;
  __shared__ double counts[kThreads], means[kThreads], squares[kThreads];
  const W w(a, plan);
  double origin[W::kLanes] = {}, sum[W::kLanes] = {}, square[W::kLanes] = {};
  int64_t count = 0;
  w.each([&](int64_t e) {
    const P in = P::load(static_cast<const S*>(a.in) + e);
    if (count == 0) {
#pragma unroll
      for (int l = 0; l < W::kLanes; ++l) origin[l] = widen(in.lanes[l]);
    }
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      const int l = kFlat ? j : 0;
      const double d = widen(in.lanes[j]) - origin[l];
      sum[l] += d;
      square[l] += d * d;
    }
    count += P::kCount / W::kLanes;
  });
#pragma unroll
  for (int l = 0; l < W::kLanes; ++l) {
    const double n = static_cast<double>(count), mean = count > 0 ? sum[l] / n : 0;
    Moments m{n, origin[l] + mean, square[l] - sum[l] * mean};
    __syncthreads();
    counts[threadIdx.x] = m.count, means[threadIdx.x] = m.mean, squares[threadIdx.x] = m.m2;
    for (int half = w.members() / 2; half > 0; half /= 2) {
      __syncthreads();
      if (w.member() < half) {
        const int other = w.slot(w.member() + half);
        m = merge(m, {counts[other], means[other], squares[other]});
        counts[threadIdx.x] = m.count, means[threadIdx.x] = m.mean, squares[threadIdx.x] = m.m2;
      }
    }
    if (w.member() != 0 || w.channel() >= a.channels) continue;
    w.partial(l)[0] = m.mean;
    w.partial(l)[1] = m.m2;
  }
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

// ---- host ---------------------------------------------------------------------------------------
template <class S>
void launch_forward(const Plan& p, Channels<Compute<S>> k, Tensor& log_det, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(S);
  const int64_t elements = p.shape.numel();
  const bool wide = elements % width == 0 && aligned16(p.args.in) && aligned16(p.args.out);
  const int64_t blocks = (elements / (wide ? width : 1) + kThreads - 1) / kThreads;
  auto kernel = wide ? forward_kernel<S, true> : forward_kernel<S, false>;
  if (elements > 0) {
    PFK_LAUNCH(kernel, static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, stream,
               p.args, k, Divider(p.args.inner), Divider(p.args.channels), elements);
  }
  if (p.shape.samples == 0) return;
  const unsigned each =
      static_cast<unsigned>(std::clamp<int64_t>(p.shape.samples / (8 * kThreads), 1, 256));
  PFK_LAUNCH(log_det_kernel<Compute<S>>, each, kThreads, stream, k, p.shape.channels, p.shape.space,
             p.shape.samples, static_cast<Compute<S>*>(log_det.mutable_data_ptr()));
}

template <class S>
void launch_backward(const Plan& p, Channels<Compute<S>> k, const Tensor& grad_log_det, Tensor& gs,
                     Tensor& gb, cudaStream_t stream) {
  using T = Compute<S>;
  const bool any = p.shape.numel() > 0;
  const Tensor shares = empty(p.x.tensor, {p.tasks}, ScalarType::Double);
  double* share = static_cast<double*>(shares.mutable_data_ptr());
  const LogDetGradient<T> d{static_cast<const T*>(grad_log_det.const_data_ptr()), p.shape.samples,
                            share};
  if (any) {
    with_walk(p, [&]<bool kWide, bool kFlat>() {
      auto kernel = backward_kernel<S, kWide, kFlat>;
      PFK_LAUNCH(kernel, p.grid, kThreads, stream, p.args, k, p.walk, d);
    });
  }
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>(p.args.channels / 8, 1, 1024));
  PFK_LAUNCH(finish_kernel<T>, blocks, kThreads, stream, p.args, k, any ? p.tasks : 0, share,
             static_cast<double>(p.shape.space), static_cast<T*>(gs.mutable_data_ptr()),
             static_cast<T*>(gb.mutable_data_ptr()));
}

template <class S>
void launch_moments(const Plan& p, Tensor& mean, Tensor& variance, cudaStream_t stream) {
  using T = Compute<S>;
  if (p.shape.channels == 0) return;
  const bool any = p.shape.numel() > 0;
  if (any) {
    with_walk(p, [&]<bool kWide, bool kFlat>() {
      auto kernel = moments_kernel<S, kWide, kFlat>;
      PFK_LAUNCH(kernel, p.grid, kThreads, stream, p.args, p.walk);
    });
  }
  const unsigned blocks = static_cast<unsigned>((p.shape.channels + kThreads - 1) / kThreads);
  PFK_LAUNCH(join_moments_kernel<T>, blocks, kThreads, stream, p.args, any ? p.tasks : 0,
             static_cast<T*>(mean.mutable_data_ptr()),
             static_cast<T*>(variance.mutable_data_ptr()));
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
  Plan p = plan_of(x);
  Tensor y = empty_like_canonical(p.x), log_det = empty_per_sample(x, p.shape.samples);
  const Tensor s = torch::stable::contiguous(log_scale), b = torch::stable::contiguous(bias);
  p.args.out = y.mutable_data_ptr();
  each_storage(x, [&](auto type) {
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
  Plan p = plan_of(x);
  const Tensor gy = with_format(grad_y, p.x.channels_last);
  const Tensor gl = dense_sums(grad_log_det, x);
  const Tensor s = torch::stable::contiguous(log_scale), b = torch::stable::contiguous(bias);
  Tensor grad_x = empty_like_canonical(p.x);
  Tensor gs = empty(s, s.sizes()), gb = empty(b, b.sizes());
  p.args.out = grad_x.mutable_data_ptr();
  p.args.grad_out = gy.const_data_ptr();
  plan_sums(p);
  each_storage(x, [&](auto type) {
    using S = decltype(type);
    launch_backward<S>(p, channels_of<Compute<S>>(s, b, inverse), gl, gs, gb, current_stream(x));
  });
  return {grad_x, gs, gb};
}

std::tuple<Tensor, Tensor> moments_cuda(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  Plan p = plan_of(x);
  plan_sums(p);
  Tensor mean = empty(x, {p.shape.channels}, accumulation_type(x));
  Tensor variance = empty(x, {p.shape.channels}, accumulation_type(x));
  each_storage(
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
