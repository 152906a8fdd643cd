// SPDX-License-Identifier: Apache-2.0
// Dequantization, quantization and the logit on a GPU.
//
// Lower bound of the time: the bytes of preprocess_cpu.cpp over the copy bandwidth.  A thread
// dequantizes one Philox block, 8 consecutive bytes to 8 floats.  Rows of floats are moved in
// 16-byte packs where every row starts on one, else in single elements.  Philox takes some 60
// integer instructions for 40 bytes, the logit of 8 levels about as many: less time than the memory
// needs.
#include "core/philox.h"
#include "core/teams.cuh"
#include "preprocess/preprocess_host.h"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

// ---- dequantize --------------------------------------------------------------------------------
struct alignas(8) Bytes8 {
  uint8_t lanes[8];
};

// Where a logical element of a sample lies in memory.
__device__ int64_t place_of(const PreprocessArgs& a, int64_t e) {
  return a.channels_last ? e % a.space * a.channels + e / a.space : e;
}

// Philox block `unit`: elements 8 unit .. 8 unit + 7 of the batch, of which this row has [begin,
// end).  Returns the sum of the log-det terms.
template <bool kLogit>
__device__ float dequantize_unit(const PreprocessArgs& a, uint64_t seed, int64_t unit,
                                 int64_t begin, int64_t end, int64_t row_start, bool aligned) {
  const PhiloxBlock<uint32_t> noise = philox_block(static_cast<uint64_t>(unit), seed);
  const LogitMap<float> map = logit_map<float>(a.alpha);
  const float scale = 1.0f / static_cast<float>(1 << (kNoiseBits + a.bits));
  const int low = a.edge, high = (1 << kNoiseBits) - 1 - a.edge;
  const int64_t first = unit * kPhiloxHalves;
  const bool whole = aligned && first >= begin && first + kPhiloxHalves <= end;
  const uint8_t* in = static_cast<const uint8_t*>(a.in);
  float* out = static_cast<float*>(a.out);
  Bytes8 x{};
  if (whole) {
    x = *reinterpret_cast<const Bytes8*>(in + first);
  } else {
#pragma unroll
    for (int j = 0; j < kPhiloxHalves; ++j) {
      const int64_t e = first + j;
      if (e >= begin && e < end) x.lanes[j] = in[row_start + place_of(a, e - row_start)];
    }
  }
  float y[kPhiloxHalves], term = 1.0f, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPhiloxHalves; ++j) {
    int u = noise.word[j / 2] >> (j % 2 * kNoiseBits) & 0xffff;
    if (kLogit) u = min(max(u, low), high);
    y[j] = static_cast<float>(x.lanes[j] << kNoiseBits | u) * scale;
    if (kLogit) {
      const LogitOut<float> o = logit_of_level(y[j], map);
      y[j] = o.y;
      const int64_t e = first + j;
      term *= whole || (e >= begin && e < end) ? o.term : 1.0f;
      if (j % 4 == 3) {
        sum -= log_(term);
        term = 1.0f;
      }
    }
  }
  if (whole) {
    using P = Pack<float, true>;
    P{{y[0], y[1], y[2], y[3]}}.store(out + first);
    P{{y[4], y[5], y[6], y[7]}}.store(out + first + 4);
  } else {
#pragma unroll
    for (int j = 0; j < kPhiloxHalves; ++j) {
      const int64_t e = first + j;
      if (e >= begin && e < end) out[row_start + place_of(a, e - row_start)] = y[j];
    }
  }
  return sum;
}

template <bool kBlock>
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_logit_kernel(const PreprocessArgs a, const TeamPlan plan, const int64_t* seed,
                            const TeamSums<float> sums, bool aligned) {
  __shared__ double scratch[kThreads / 32];
  const Team<kBlock> t(plan);
  const int64_t start = t.row * plan.features, begin = start + t.begin, end = start + t.end;
  const uint64_t key = static_cast<uint64_t>(*seed);
  double sum = 0;
  if (begin < end) {
    const int64_t last = (end - 1) / kPhiloxHalves;
    for (int64_t unit = begin / kPhiloxHalves + t.rank; unit <= last; unit += t.size) {
      sum += dequantize_unit<true>(a, key, unit, begin, end, start, aligned);
    }
  }
  sums.put(t, plan, t.sum(sum, scratch));
}

// Without a logit.  Rows need not be told apart unless channels are innermost; every log-det is the
// same number.
__global__ void __launch_bounds__(kThreads, kResident)
    dequantize_kernel(const PreprocessArgs a, int64_t rows, int64_t features, const int64_t* seed,
                      bool aligned) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < rows) static_cast<float*>(a.log_det)[i] = static_cast<float>(a.constant);
  const int64_t total = rows * features, first = i * kPhiloxHalves;
  if (first >= total) return;
  const uint64_t key = static_cast<uint64_t>(*seed);
  if (!a.channels_last) {
    dequantize_unit<false>(a, key, i, 0, total, 0, aligned);
    return;
  }
  const int64_t stop = min(total, first + kPhiloxHalves);
  for (int64_t e = first; e < stop;) {  // row by row
    const int64_t start = e / features * features, end = min(stop, start + features);
    dequantize_unit<false>(a, key, i, e, end, start, false);
    e = end;
  }
}

std::tuple<Tensor, Tensor> dequantize_cuda(const Tensor& x, const Tensor& seed, int64_t bits,
                                           std::optional<double> alpha) {
  const DeviceGuard guard(x.get_device_index());
  const PreprocessTensors t = dequantize_tensors(x, bits, alpha);
  const PreprocessArgs& a = t.args;
  const int64_t* key = static_cast<const int64_t*>(seed.const_data_ptr());
  const bool aligned = !a.channels_last && aligned16(a.in) && aligned16(a.out);
  const cudaStream_t stream = current_stream(x);
  if (t.rows == 0) return {t.out, t.log_det};
  if (!a.logit) {
    const int64_t units = (t.rows * t.features + kPhiloxHalves - 1) / kPhiloxHalves;
    PFK_LAUNCH(dequantize_kernel, grid_for(units > t.rows ? units : t.rows), kThreads, stream, a,
               t.rows, t.features, key, aligned);
    return {t.out, t.log_det};
  }
  const TeamPlan plan = plan_teams(t.rows, t.features, kPhiloxHalves);
  const Tensor partial = chunk_sums(x, plan);
  const TeamSums<float> sums{static_cast<float*>(a.log_det),
                             static_cast<double*>(partial.mutable_data_ptr()), a.constant, nullptr};
  auto kernel =
      plan.size == kThreads ? dequantize_logit_kernel<true> : dequantize_logit_kernel<false>;
  PFK_LAUNCH(kernel, grid_of(blocks_of(plan)), kThreads, stream, a, plan, key, sums, aligned);
  launch_sum_chunks(plan, sums, stream);
  return {t.out, t.log_det};
}

// ---- quantize ----------------------------------------------------------------------------------
template <class S, bool kWide>
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_kernel(const PreprocessArgs a, int64_t packs) {
  using T = Compute<S>;
  using P = Pack<S, kWide>;
  struct alignas(P::kCount) Levels {
    uint8_t lanes[P::kCount];
  };
  const LogitMap<T> map = logit_map<T>(a.alpha);
  const T levels = static_cast<T>(1 << a.bits), top = levels - T(1);
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= packs) return;
  const P y = P::load(static_cast<const S*>(a.in) + i * P::kCount);
  Levels x;
#pragma unroll
  for (int j = 0; j < P::kCount; ++j) {
    T v = widen(y.lanes[j]);
    if (a.logit) v = logit_inverse(v, map).y;
    x.lanes[j] = static_cast<uint8_t>(static_cast<int>(quantize_level(v, levels, top)));
  }
  *reinterpret_cast<Levels*>(static_cast<uint8_t*>(a.out) + i * P::kCount) = x;
}

Tensor quantize_cuda(const Tensor& y, int64_t bits, std::optional<double> alpha) {
  const DeviceGuard guard(y.get_device_index());
  const PreprocessTensors t = quantize_tensors(y, bits, alpha);
  if (y.numel() == 0) return t.out;
  each_storage(y, [&](auto type) {
    using S = decltype(type);
    constexpr int width = 16 / sizeof(S);
    const bool wide = y.numel() % width == 0 && aligned16(t.args.in) && aligned16(t.args.out);
    const int64_t packs = wide ? y.numel() / width : y.numel();
    auto kernel = wide ? quantize_kernel<S, true> : quantize_kernel<S, false>;
    PFK_LAUNCH(kernel, grid_for(packs), kThreads, current_stream(y), t.args, packs);
  });
  return t.out;
}

// ---- logit -------------------------------------------------------------------------------------
template <class S, bool kWide, bool kBlock>
__global__ void __launch_bounds__(kThreads, kResident)
    logit_kernel(const PreprocessArgs a, const TeamPlan plan, const TeamSums<Compute<S>> sums) {
  using T = Compute<S>;
  using P = Pack<S, kWide>;
  __shared__ double scratch[kThreads / 32];
  const Team<kBlock> t(plan);
  const LogitMap<T> map = logit_map<T>(a.alpha);
  const int64_t start = t.row * plan.features;
  T sum = T(0);
  for (int64_t e = t.begin + t.rank * P::kCount; e < t.end; e += t.size * P::kCount) {
    P pack = P::load(static_cast<const S*>(a.in) + start + e);
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      const T v = widen(pack.lanes[j]);
      const LogitOut<T> o = a.inverse ? logit_inverse(v, map) : logit_forward(odds(v, map));
      pack.lanes[j] = narrow<S>(o.y);
      sum += o.term;
    }
    pack.store(static_cast<S*>(a.out) + start + e);
  }
  sums.put(t, plan, t.sum(static_cast<double>(sum), scratch));
}

template <class S, bool kWide, bool kBlock>
__global__ void __launch_bounds__(kThreads, kResident)
    logit_grad_kernel(const PreprocessArgs a, const TeamPlan plan) {
  using T = Compute<S>;
  using P = Pack<S, kWide>;
  const Team<kBlock> t(plan);
  if (t.row >= plan.rows) return;
  const LogitMap<T> map = logit_map<T>(a.alpha);
  const T grad_term = static_cast<const T*>(a.grad_log_det)[t.row];
  const int64_t start = t.row * plan.features;
  for (int64_t e = t.begin + t.rank * P::kCount; e < t.end; e += t.size * P::kCount) {
    const P pack = P::load(static_cast<const S*>(a.in) + start + e);
    P grad = P::load(static_cast<const S*>(a.grad_out) + start + e);
#pragma unroll
    for (int j = 0; j < P::kCount; ++j) {
      const T v = widen(pack.lanes[j]), g = widen(grad.lanes[j]);
      grad.lanes[j] = narrow<S>(a.inverse ? logit_inverse_vjp(v, g, grad_term, map)
                                          : logit_forward_vjp(v, g, grad_term, map));
    }
    grad.store(static_cast<S*>(a.out) + start + e);
  }
}

template <class F>
void with_plan(const Tensor& x, const PreprocessTensors& t, F f) {
  const PreprocessArgs& a = t.args;
  const bool aligned = aligned16(a.in) && aligned16(a.out) && aligned16(a.grad_out);
  auto fits = [&](int64_t width) { return aligned && t.features % width == 0; };
  with_teams(x, t.rows, t.features, fits, f);
}

std::tuple<Tensor, Tensor> logit_cuda(const Tensor& x, double alpha, bool inverse) {
  const DeviceGuard guard(x.get_device_index());
  const PreprocessTensors t = logit_tensors(x, alpha, inverse);
  if (t.rows == 0) return {t.out, t.log_det};
  with_plan(x, t, [&]<class S, bool kWide, bool kBlock>(const TeamPlan& plan) {
    using T = Compute<S>;
    const Tensor partial = chunk_sums(x, plan);
    const TeamSums<T> sums{static_cast<T*>(t.args.log_det),
                           static_cast<double*>(partial.mutable_data_ptr()), t.args.constant,
                           nullptr};
    auto kernel = logit_kernel<S, kWide, kBlock>;
    PFK_LAUNCH(kernel, grid_of(blocks_of(plan)), kThreads, current_stream(x), t.args, plan, sums);
    launch_sum_chunks(plan, sums, current_stream(x));
  });
  return {t.out, t.log_det};
}

Tensor logit_grad_cuda(const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x,
                       double alpha, bool inverse) {
  const DeviceGuard guard(x.get_device_index());
  const LogitGradTensors t = logit_grad_tensors(grad_y, grad_log_det, x, alpha, inverse);
  if (x.numel() == 0) return t.out;
  with_plan(x, t, [&]<class S, bool kWide, bool kBlock>(const TeamPlan& plan) {
    auto kernel = logit_grad_kernel<S, kWide, kBlock>;
    PFK_LAUNCH(kernel, grid_of(blocks_of(plan)), kThreads, current_stream(x), t.args, plan);
  });
  return t.out;
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("dequantize", TORCH_BOX(&pfk::dequantize_cuda));
  m.impl("quantize", TORCH_BOX(&pfk::quantize_cuda));
  m.impl("logit", TORCH_BOX(&pfk::logit_cuda));
  m.impl("logit_backward", TORCH_BOX(&pfk::logit_grad_cuda));
}
