// SPDX-License-Identifier: Apache-2.0
// ActNorm on the CPU.
//
// Lower bound of the time: forward reads and writes 8 bytes an element, backward 12 (grad_out, x,
// grad_x) with both sums of a channel in the same pass.  In images each row has one scale.  In
// vectors and channels_last, whole Vecs are computed with constants that are repeated to whole Vecs
// (actnorm_moments.h).
#include "actnorm/actnorm.h"

#include "actnorm/actnorm_moments.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void actnorm_forward(const ActNormArgs&, DType, int64_t, int64_t);
                   void actnorm_backward(const ActNormArgs&, DType, int64_t, int64_t);
                   void channel_moments(const ActNormArgs&, DType, int64_t, int64_t))

PFK_BEGIN

namespace {  // all families are linked into one library

constexpr int64_t kFold = 256;  // additions to a lane before its sum is added in double

// ---- one channel a row --------------------------------------------------------------------------
template <class S>
void forward_row(const ActNormArgs& a, int64_t row, int64_t channel) {
  using T = Compute<S>;
  using V = Vec<T>;
  const S* x = static_cast<const S*>(a.in) + row * a.inner;
  S* y = static_cast<S*>(a.out) + row * a.inner;
  const V scale = static_cast<const T*>(a.scale)[channel],
          bias = static_cast<const T*>(a.bias)[channel];
  int64_t i = 0;
  for (; i + V::kLanes <= a.inner; i += V::kLanes) {
    store_vec(actnorm_apply(load_vec(x + i), scale, bias, a.inverse), y + i);
  }
  if (i < a.inner) {
    const int n = static_cast<int>(a.inner - i);
    store_vec_n(actnorm_apply(load_vec_n(x + i, n), scale, bias, a.inverse), y + i, n);
  }
}

template <class S>
void backward_row(const ActNormArgs& a, int64_t row, int64_t channel, double* sums) {
  using T = Compute<S>;
  using V = Vec<T>;
  const S* x = static_cast<const S*>(a.in) + row * a.inner;
  const S* gy = static_cast<const S*>(a.grad_out) + row * a.inner;
  S* gx = static_cast<S*>(a.out) + row * a.inner;
  const V scale = static_cast<const T*>(a.scale)[channel],
          bias = static_cast<const T*>(a.bias)[channel];
  for (int64_t begin = 0; begin < a.inner; begin += kFold * V::kLanes) {
    const int64_t end = begin + kFold * V::kLanes < a.inner ? begin + kFold * V::kLanes : a.inner;
    V sum = T(0), weighted = T(0);
    int64_t i = begin;
    for (; i + V::kLanes <= end; i += V::kLanes) {
      const V g = load_vec(gy + i);
      sum += g;
      weighted += g * actnorm_shifted(load_vec(x + i), bias, a.inverse);
      store_vec(g * scale, gx + i);
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      const V g = load_vec_n(gy + i, n);
      const V w = actnorm_shifted(load_vec_n(x + i, n), bias, a.inverse);
      sum += g;  // lanes beyond n are zero here, but w is the bias there and 0 * bias may be NaN
      weighted += select(first_lanes<T>(n), g * w, V(T(0)));
      store_vec_n(g * scale, gx + i, n);
    }
    sums[0] += sum_lanes(sum);
    sums[1] += sum_lanes(weighted);
  }
}

// ---- channels innermost: flat, against repeated constants ---------------------------------------
template <class T>
void repeat_channels(const void* from, int64_t channels, int64_t length, T* to) {
  const T* values = static_cast<const T*>(from);
  for (int64_t i = 0, c = 0; i < length; ++i, c = c + 1 == channels ? 0 : c + 1) to[i] = values[c];
}

template <class S>
void forward_flat(const ActNormArgs& a, Task t) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t period = pattern_length(a.channels, V::kLanes);
  T* pattern = new T[2 * period];
  repeat_channels(a.scale, a.channels, period, pattern);
  repeat_channels(a.bias, a.channels, period, pattern + period);
  const S* x = static_cast<const S*>(a.in);
  S* y = static_cast<S*>(a.out);
  const int64_t last = t.end * a.channels;
  for (int64_t begin = t.begin * a.channels, end; begin < last; begin = end) {
    end = a.channels < kWide ? last : begin + a.channels;
    int64_t p = 0;
    for (int64_t i = begin; i < end; i += V::kLanes, p += V::kLanes) {
      if (p == period) p = 0;
      const V scale = V::load(pattern + p), bias = V::load(pattern + period + p);
      if (i + V::kLanes <= end) {
        store_vec(actnorm_apply(load_vec(x + i), scale, bias, a.inverse), y + i);
      } else {
        const int n = static_cast<int>(end - i);
        store_vec_n(actnorm_apply(load_vec_n(x + i, n), scale, bias, a.inverse), y + i, n);
      }
    }
  }
  delete[] pattern;
}

// Elements [begin, end), whose first belongs to channel 0; adds to the sums of every position of
// the pattern.
template <class S, class T = Compute<S>>
void backward_run(const ActNormArgs& a, int64_t begin, int64_t end, int64_t period, const T* scale,
                  const T* bias, T* sum, T* weighted) {
  using V = Vec<T>;
  const S *x = static_cast<const S*>(a.in), *gy = static_cast<const S*>(a.grad_out);
  S* gx = static_cast<S*>(a.out);
  int64_t p = 0;
  for (int64_t i = begin; i < end; i += V::kLanes, p += V::kLanes) {
    if (p == period) p = 0;
    const bool whole = i + V::kLanes <= end;
    const int n = whole ? V::kLanes : static_cast<int>(end - i);
    const V g = whole ? load_vec(gy + i) : load_vec_n(gy + i, n);
    const V v = whole ? load_vec(x + i) : load_vec_n(x + i, n);
    V product = g * actnorm_shifted(v, V::load(bias + p), a.inverse);
    const V out = g * V::load(scale + p);
    if (whole) {
      store_vec(out, gx + i);
    } else {
      product = select(first_lanes<T>(n), product, V(T(0)));
      store_vec_n(out, gx + i, n);
    }
    (V::load(sum + p) + g).store(sum + p);
    (V::load(weighted + p) + product).store(weighted + p);
  }
}

template <class S>
void backward_flat(const ActNormArgs& a, Task t, double* sums) {
  using T = Compute<S>;
  const int64_t c = a.channels, period = pattern_length(c, Vec<T>::kLanes);
  T* scale = new T[4 * period];
  T *bias = scale + period, *sum = bias + period, *weighted = sum + period;
  repeat_channels(a.scale, c, period, scale);
  repeat_channels(a.bias, c, period, bias);
  const int64_t last = t.end * c, fold = kFold * (c < kWide ? period : c);
  for (int64_t begin = t.begin * c; begin < last;) {
    const int64_t stop = begin + fold < last ? begin + fold : last;
    memset(sum, 0, 2 * period * sizeof(T));
    for (int64_t end; begin < stop; begin = end) {
      end = c < kWide ? stop : begin + c;
      backward_run<S>(a, begin, end, period, scale, bias, sum, weighted);
    }
    for (int64_t j = 0; j < c; ++j) {
      for (int64_t i = j; i < period; i += c) {  // beyond the channels of a wide row are zeros
        sums[2 * j] += sum[i];
        sums[2 * j + 1] += weighted[i];
      }
    }
  }
  delete[] scale;
}

// ---- tasks --------------------------------------------------------------------------------------
template <class S>
void forward_tasks(const ActNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const Task t = task_rows(a, task);
    if (a.inner == 1) {
      forward_flat<S>(a, t);
      continue;
    }
    for (int64_t row = t.begin * a.channels; row < t.end * a.channels; ++row) {
      forward_row<S>(a, row, row % a.channels);
    }
  }
}

template <class S>
void backward_tasks(const ActNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const Task t = task_rows(a, task);
    double* sums = a.partial + 2 * task * a.channels;
    memset(sums, 0, 2 * a.channels * sizeof(double));
    if (a.inner == 1) {
      backward_flat<S>(a, t, sums);
      continue;
    }
    for (int64_t row = t.begin * a.channels; row < t.end * a.channels; ++row) {
      backward_row<S>(a, row, row % a.channels, sums + 2 * (row % a.channels));
    }
  }
}

template <class S>
void moments_tasks(const ActNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    double* out = a.partial + 2 * task * a.channels;
    memset(out, 0, 2 * a.channels * sizeof(double));
    if (a.inner == 1) {
      moments_flat<S>(a, task_rows(a, task), out);
    } else {
      moments_rows<S>(a, task_rows(a, task), out);
    }
  }
}

}  // namespace

void actnorm_forward(const ActNormArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { forward_tasks<decltype(element)>(a, begin, end); });
}
void actnorm_backward(const ActNormArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { backward_tasks<decltype(element)>(a, begin, end); });
}
void channel_moments(const ActNormArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { moments_tasks<decltype(element)>(a, begin, end); });
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "actnorm/actnorm_host.h"

namespace pfk {
namespace {

template <class F>
void run_tasks(const ActNormPlan& p, const F& f) {
  parallel_tasks(p.tasks, p.args.rows * p.args.channels * p.args.inner, f);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& log_scale, const Tensor& bias,
                                   bool inverse) {
  ActNormPlan p(x);
  p.set_constants(log_scale, bias, inverse);
  Tensor y = empty_like_canonical(p.x), log_det = empty_per_sample(x, p.shape.samples);
  p.args.out = y.mutable_data_ptr();
  run_tasks(p, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(actnorm_forward, p.args, p.dtype, begin, end);
  });
  Values(log_det).fill(p.log_det);
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_det,
                                            const Tensor& x, const Tensor& log_scale,
                                            const Tensor& bias, bool inverse) {
  ActNormPlan p(x);
  p.set_constants(log_scale, bias, inverse);
  const Tensor gy = with_format(grad_y, p.x.channels_last);
  Tensor grad_x = empty_like_canonical(p.x);
  const std::vector<double> partial = p.partial();
  p.args.out = grad_x.mutable_data_ptr();
  p.args.grad_out = gy.const_data_ptr();
  run_tasks(p, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(actnorm_backward, p.args, p.dtype, begin, end);
  });
  const double from_log_det = Values(grad_log_det).sum() * static_cast<double>(p.shape.space);
  Tensor gs = empty(log_scale, {p.shape.channels}), gb = empty(bias, {p.shape.channels});
  const Values grad_scale(gs), grad_bias(gb);
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    double sum = 0, weighted = 0;
    for (int64_t task = 0; task < p.tasks; ++task) {
      sum += partial[2 * (task * p.shape.channels + c)];
      weighted += partial[2 * (task * p.shape.channels + c) + 1];
    }
    const ActNormGrad g = actnorm_finish(sum, weighted, p.factor[c], from_log_det, inverse);
    grad_scale.put(c, g.log_scale);
    grad_bias.put(c, g.bias);
  }
  return {grad_x, gs, gb};
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  ActNormPlan p(x);
  const std::vector<double> partial = p.partial();
  run_tasks(p, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(channel_moments, p.args, p.dtype, begin, end);
  });
  Tensor mean = empty(x, {p.shape.channels}, accumulation_type(x));
  Tensor variance = empty(x, {p.shape.channels}, accumulation_type(x));
  const Values means(mean), variances(variance);
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    Moments m{0, 0, 0};
    for (int64_t task = 0; task < p.tasks; ++task) {
      const double* q = partial.data() + 2 * (task * p.shape.channels + c);
      m = merge(m, {p.count_of(task), q[0], q[1]});
    }
    means.put(c, m.count > 0 ? m.mean : NAN);
    variances.put(c, m.count > 0 ? m.m2 / m.count : NAN);
  }
  return {mean, variance};
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("actnorm", TORCH_BOX(&pfk::forward));
  m.impl("actnorm_backward", TORCH_BOX(&pfk::backward));
  m.impl("channel_moments", TORCH_BOX(&pfk::moments));
}
#endif
