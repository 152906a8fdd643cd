// SPDX-License-Identifier: Apache-2.0
// Dequantization, quantization and the logit on the CPU.
//
// Lower bound of the time: dequantize reads 1 byte and writes 4, quantize the reverse; logit moves
// 8 bytes in float32, its backward pass 12.  Beside that, in AVX2 instructions an element:
// Philox 1.8 (8 a round for 4 blocks of 8 elements), dequantize without a logit 1.5, the logit of a
// level 5 (one logarithm, and a quarter of one for the log-det), logit 6.
#include "preprocess/preprocess.h"

#include "core/half.h"
#include "core/philox.h"
#include "core/rows.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void dequantize_tasks(const PreprocessArgs&, const RowPlan&, int64_t, int64_t);
                   void quantize_range(const PreprocessArgs&, DType, int64_t, int64_t);
                   void logit_tasks(const PreprocessArgs&, const RowPlan&, DType, int64_t, int64_t);
                   void logit_grad_tasks(const PreprocessArgs&, const RowPlan&, DType, int64_t,
                                         int64_t))

PFK_BEGIN

// ---- dequantize --------------------------------------------------------------------------------
// Logical elements [begin, begin + n) of a channels_last tensor, in runs `channels` apart in
// memory.
template <class F>
static void each_channel_run(const PreprocessArgs& a, int64_t begin, int64_t n, F f) {
  const int64_t features = a.channels * a.space;
  for (int64_t at = 0; at < n;) {
    const int64_t e = begin + at, sample = e / features, in_sample = e % features;
    const int64_t channel = in_sample / a.space, place = in_sample % a.space;
    const int64_t room = a.space - place, m = room < n - at ? room : n - at;
    f(sample * features + place * a.channels + channel, at, m);
    at += m;
  }
}

// Minus the sum of the logarithms of the terms, with one logarithm of the product of four.
static double sum_logs(const float* terms, int64_t n) {
  using V = Vec<float>;
  constexpr int w = V::kLanes;
  V sum = 0.0f;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    const V a = V::load(terms + i) * V::load(terms + i + w);
    const V b = V::load(terms + i + 2 * w) * V::load(terms + i + 3 * w);
    sum += log_normal(a * b);
  }
  if (i < n) {
    V product = 1.0f;
    each_vector<float>(
        n - i, [&](int64_t j, auto part) { product = product * load(terms + i + j, part, 1.0f); });
    sum += log_normal(product);
  }
  return -sum_lanes(sum);
}

// Between integers and floats, in plain loops: compilers convert whole vectors here, but lane by
// lane where vector types of different sizes are converted.
static void levels_to_reals(const uint8_t* __restrict x, const uint16_t* __restrict noise,
                            int64_t n, int low, int high, float scale, float* __restrict v) {
  for (int64_t i = 0; i < n; ++i) {
    int u = noise[i];
    u = u < low ? low : u;
    u = u > high ? high : u;
    v[i] = static_cast<float>((x[i] << kNoiseBits) | u) * scale;
  }
}
template <class T>
static void reals_to_levels(const T* __restrict v, int64_t n, uint8_t* __restrict x) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<uint8_t>(static_cast<int32_t>(v[i]));
}

template <bool kLogit>
static void dequantize_task(const PreprocessArgs& a, const RowPlan& plan, int64_t task) {
  using V = Vec<float>;
  alignas(64) uint16_t noise[kRowBlock + 2 * kPhiloxHalves + philox_padding()];
  alignas(64) uint8_t bytes[kRowBlock];
  alignas(64) float values[kRowBlock], terms[kRowBlock];
  const LogitMap<float> map = logit_map<float>(a.alpha);
  const float scale = 1.0f / static_cast<float>(1 << (kNoiseBits + a.bits));
  const int low = a.edge, high = (1 << kNoiseBits) - 1 - a.edge;
  const uint8_t* in = static_cast<const uint8_t*>(a.in);
  float* out = static_cast<float*>(a.out);
  const RowSums<float> sums{static_cast<float*>(a.log_det), a.partial, a.constant, nullptr};

  auto element = [&](int64_t begin, int64_t n) {
    const int64_t first = begin / kPhiloxHalves;
    philox_fill(first, (begin + n - 1) / kPhiloxHalves - first + 1, a.seed, noise);
    const uint16_t* r = noise + begin % kPhiloxHalves;
    const uint8_t* x = in + begin;
    float* y = out + begin;
    if (a.channels_last) {
      x = bytes, y = values;
      each_channel_run(a, begin, n, [&](int64_t from, int64_t at, int64_t m) {
        for (int64_t i = 0; i < m; ++i) bytes[at + i] = in[from + i * a.channels];
      });
    }
    levels_to_reals(x, r, n, low, high, scale, y);
    if (kLogit) {
      each_vector<float>(n, [&](int64_t i, auto part) {
        const LogitOut<V> o = logit_of_level(load(y + i, part), map);
        store(o.y, y + i, part);
        store(o.term, terms + i, part);
      });
    }
    if (a.channels_last) {
      each_channel_run(a, begin, n, [&](int64_t to, int64_t at, int64_t m) {
        scatter(values + at, a.channels, m, out + to);
      });
    }
  };
  walk_rows(
      plan, task, element,
      [&](int64_t at, int64_t n) { return kLogit ? sum_logs(terms + at, n) : 0.0; },
      [&](int64_t row, int64_t chunk, double total) { put_row(plan, sums, row, chunk, total); });
}

void dequantize_tasks(const PreprocessArgs& a, const RowPlan& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    a.logit ? dequantize_task<true>(a, p, task) : dequantize_task<false>(a, p, task);
  }
}

// ---- quantize ----------------------------------------------------------------------------------
template <bool kLogit, class S>
static void quantize_blocks(const PreprocessArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  using V = Vec<T>;
  alignas(64) T values[kRowBlock];
  const LogitMap<T> map = logit_map<T>(a.alpha);
  const T levels = static_cast<T>(1 << a.bits), top = levels - 1;
  for (; begin < end; begin += kRowBlock) {
    const int64_t n = end - begin < kRowBlock ? end - begin : kRowBlock;
    const T* from = values;
    if constexpr (sizeof(S) == sizeof(T)) {
      from = static_cast<const T*>(a.in) + begin;
    } else {
      gather(static_cast<const S*>(a.in) + begin, 1, n, values);
    }
    each_vector<T>(n, [&](int64_t i, auto part) {
      V v = load(from + i, part);
      if (kLogit) v = logit_inverse(v, map).y;
      store(quantize_level(v, levels, top), values + i, part);
    });
    reals_to_levels(values, n, static_cast<uint8_t*>(a.out) + begin);
  }
}

template <class S>
static void quantize_typed(const PreprocessArgs& a, int64_t begin, int64_t end) {
  a.logit ? quantize_blocks<true, S>(a, begin, end) : quantize_blocks<false, S>(a, begin, end);
}

void quantize_range(const PreprocessArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { quantize_typed<decltype(element)>(a, begin, end); });
}

// ---- logit -------------------------------------------------------------------------------------
// A block of the forward direction.  kNormal takes all p and q for positive normal numbers, and the
// function returns false if some were not.
template <bool kNormal, class T>
static bool logit_block(const T* x, int64_t n, const LogitMap<T>& map, T* y, T* terms) {
  using V = Vec<T>;
  const V tiny = Float<T>::kTiny;
  Mask<T> all = tiny == tiny;
  each_vector<T>(n, [&](int64_t i, auto part) {
    const Odds<V> p = odds(load(x + i, part, T(0.5)), map);
    const Mask<T> normal = mask_and(p.p >= tiny, p.q >= tiny);
    const LogitOut<V> o = kNormal ? logit_forward_normal(p) : logit_forward_mixed(p, normal);
    if (kNormal) all = mask_and(all, normal);
    store(o.y, y + i, part);
    store(o.term, terms + i, part);
  });
  return sum_lanes(select(all, V(T(0)), V(T(1)))) == 0;
}

template <bool kInverse, class S>
static void logit_task(const PreprocessArgs& a, const RowPlan& plan, int64_t task) {
  using T = Compute<S>;
  constexpr bool kDirect = sizeof(S) == sizeof(T);
  alignas(64) T inputs[kRowBlock], outputs[kRowBlock], terms[kRowBlock];
  const LogitMap<T> map = logit_map<T>(a.alpha);
  const RowSums<T> sums{static_cast<T*>(a.log_det), a.partial, a.constant, nullptr};
  const S* in = static_cast<const S*>(a.in);
  S* out = static_cast<S*>(a.out);

  auto element = [&](int64_t begin, int64_t n) {
    const T* x = inputs;
    T* y = outputs;
    if constexpr (kDirect) {
      x = in + begin, y = out + begin;
    } else {
      gather(in + begin, 1, n, inputs);
    }
    if constexpr (kInverse) {
      each_vector<T>(n, [&](int64_t i, auto part) {
        const LogitOut<Vec<T>> o = logit_inverse(load(x + i, part), map);
        store(o.y, y + i, part);
        store(o.term, terms + i, part);
      });
    } else if (!logit_block<true>(x, n, map, y, terms)) {
      logit_block<false>(x, n, map, y, terms);
    }
    if constexpr (!kDirect) scatter(outputs, 1, n, out + begin);
  };
  walk_rows(
      plan, task, element, [&](int64_t at, int64_t n) { return sum_terms(terms + at, n); },
      [&](int64_t row, int64_t chunk, double total) { put_row(plan, sums, row, chunk, total); });
}

template <bool kInverse, class S>
static void logit_grad_task(const PreprocessArgs& a, const RowPlan& plan, int64_t task) {
  using T = Compute<S>;
  using V = Vec<T>;
  constexpr bool kDirect = sizeof(S) == sizeof(T);
  alignas(64) T values[kRowBlock], grads[kRowBlock], grad_terms[kRowBlock];
  const LogitMap<T> map = logit_map<T>(a.alpha);
  const S *in = static_cast<const S*>(a.in), *grad_out = static_cast<const S*>(a.grad_out);
  const T* grad_log_det = static_cast<const T*>(a.grad_log_det);
  S* out = static_cast<S*>(a.out);

  auto element = [&](int64_t begin, int64_t n) {
    const T *x = values, *g = grads;
    T* to = values;
    if constexpr (kDirect) {
      x = in + begin, g = grad_out + begin, to = out + begin;
    } else {
      gather(in + begin, 1, n, values);
      gather(grad_out + begin, 1, n, grads);
    }
    int64_t row = begin / plan.features, left = plan.features - begin % plan.features;
    for (int64_t at = 0; at < n; ++row, left = plan.features) {
      const int64_t m = left < n - at ? left : n - at;
      for (int64_t i = 0; i < m; ++i) grad_terms[at + i] = grad_log_det[row];
      at += m;
    }
    each_vector<T>(n, [&](int64_t i, auto part) {
      const V v = load(x + i, part), gy = load(g + i, part), gt = load(grad_terms + i, part);
      store(kInverse ? logit_inverse_vjp(v, gy, gt, map) : logit_forward_vjp(v, gy, gt, map),
            to + i, part);
    });
    if constexpr (!kDirect) scatter(values, 1, n, out + begin);
  };
  walk_rows(
      plan, task, element, [](int64_t, int64_t) { return 0.0; }, [](int64_t, int64_t, double) {});
}

template <bool kGrad, class S>
static void logit_typed(const PreprocessArgs& a, const RowPlan& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (kGrad) {
      a.inverse ? logit_grad_task<true, S>(a, p, task) : logit_grad_task<false, S>(a, p, task);
    } else {
      a.inverse ? logit_task<true, S>(a, p, task) : logit_task<false, S>(a, p, task);
    }
  }
}

void logit_tasks(const PreprocessArgs& a, const RowPlan& p, DType dtype, int64_t begin,
                 int64_t end) {
  each_dtype(dtype, [&](auto element) { logit_typed<false, decltype(element)>(a, p, begin, end); });
}
void logit_grad_tasks(const PreprocessArgs& a, const RowPlan& p, DType dtype, int64_t begin,
                      int64_t end) {
  each_dtype(dtype, [&](auto element) { logit_typed<true, decltype(element)>(a, p, begin, end); });
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "preprocess/preprocess_host.h"

namespace pfk {
namespace {

int64_t task_work(const RowPlan& p) { return p.group * p.chunk; }

std::tuple<Tensor, Tensor> dequantize(const Tensor& x, const Tensor& seed, int64_t bits,
                                      std::optional<double> alpha) {
  PreprocessTensors t = dequantize_tensors(x, bits, alpha);
  t.args.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const PreprocessArgs& a = t.args;
  const RowPlan plan = plan_rows(t.rows, t.features);
  std::vector<double> partial(plan.chunks > 1 ? plan.tasks : 0);
  t.args.partial = partial.data();
  parallel_tasks(plan.tasks, task_work(plan), [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(dequantize_tasks, a, plan, begin, end);
  });
  finish_rows(plan, RowSums<float>{static_cast<float*>(a.log_det), a.partial, a.constant, nullptr});
  return {t.out, t.log_det};
}

Tensor quantize(const Tensor& y, int64_t bits, std::optional<double> alpha) {
  PreprocessTensors t = quantize_tensors(y, bits, alpha);
  const PreprocessArgs& a = t.args;
  const DType dtype = dtype_of(y);
  torch::stable::parallel_for(0, y.numel(), kRowChunk, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(quantize_range, a, dtype, begin, end);
  });
  return t.out;
}

std::tuple<Tensor, Tensor> logit(const Tensor& x, double alpha, bool inverse) {
  PreprocessTensors t = logit_tensors(x, alpha, inverse);
  const PreprocessArgs& a = t.args;
  const DType dtype = dtype_of(x);
  const RowPlan plan = plan_rows(t.rows, t.features);
  std::vector<double> partial(plan.chunks > 1 ? plan.tasks : 0);
  t.args.partial = partial.data();
  parallel_tasks(plan.tasks, task_work(plan), [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(logit_tasks, a, plan, dtype, begin, end);
  });
  finish_rows(plan, dtype, a.log_det, a.partial, a.constant);
  return {t.out, t.log_det};
}

Tensor logit_grad(const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x, double alpha,
                  bool inverse) {
  const LogitGradTensors t = logit_grad_tensors(grad_y, grad_log_det, x, alpha, inverse);
  const PreprocessArgs& a = t.args;
  const DType dtype = dtype_of(x);
  const RowPlan plan = plan_rows(t.rows, t.features);
  parallel_tasks(plan.tasks, task_work(plan), [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(logit_grad_tasks, a, plan, dtype, begin, end);
  });
  return t.out;
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&pfk::dequantize));
  m.impl("quantize", TORCH_BOX(&pfk::quantize));
  m.impl("logit", TORCH_BOX(&pfk::logit));
  m.impl("logit_backward", TORCH_BOX(&pfk::logit_grad));
}
#endif
