// SPDX-License-Identifier: Apache-2.0
// ActNorm on the CPU.
//
// Floor: forward reads and writes 8 bytes an element, backward 12 (grad_out, x; grad_x), with both
// channel sums in the same pass.  Images run row by row with one scale a row.  Vectors and
// channels_last run flat over whole Vecs against the channel constants repeated up to a multiple of
// the Vec width, so that 10 channels cost no tails.
#include "actnorm/actnorm.h"

#include "core/half.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void actnorm_forward(const ActNormArgs&, int, int64_t, int64_t);
                   void actnorm_backward(const ActNormArgs&, int, int64_t, int64_t);
                   void channel_moments(const ActNormArgs&, int, int64_t, int64_t))

PFK_BEGIN

namespace {  // every family is linked into one library: file-local names stay local

constexpr int64_t kFold = 256;  // lane additions between two transfers to double

struct Task {
  int64_t begin, end;  // outer rows
};
Task task_rows(const ActNormArgs& a, int64_t task) {
  const int64_t begin = task * a.rows;
  return {begin, begin + a.rows < a.outer ? begin + a.rows : a.outer};
}

// Elements until the channel pattern meets a Vec boundary: channels * lanes / gcd(channels, lanes).
int64_t pattern_length(int64_t channels, int64_t lanes) {
  int64_t a = channels, b = lanes;
  while (b != 0) {
    const int64_t r = a % b;
    a = b;
    b = r;
  }
  return channels * (lanes / a);
}

// ---- one channel a row
// -------------------------------------------------------------------------------------------
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

// ---- channels innermost: flat, against repeated constants
// ----------------------------------------------------------
template <class T>
void repeat_channels(const void* from, int64_t channels, int64_t length, T* to) {
  const T* values = static_cast<const T*>(from);
  for (int64_t i = 0; i < length; ++i) to[i] = values[i % channels];
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
  const int64_t end = t.end * a.channels;
  int64_t p = 0;
  for (int64_t i = t.begin * a.channels; i < end; i += V::kLanes, p += V::kLanes) {
    if (p == period) p = 0;
    const V scale = V::load(pattern + p), bias = V::load(pattern + period + p);
    if (i + V::kLanes <= end) {
      store_vec(actnorm_apply(load_vec(x + i), scale, bias, a.inverse), y + i);
    } else {
      const int n = static_cast<int>(end - i);
      store_vec_n(actnorm_apply(load_vec_n(x + i, n), scale, bias, a.inverse), y + i, n);
    }
  }
  delete[] pattern;
}

template <class S>
void backward_flat(const ActNormArgs& a, Task t, double* sums) {
  using T = Compute<S>;
  using V = Vec<T>;
  const int64_t period = pattern_length(a.channels, V::kLanes);
  T* scale = new T[4 * period];
  T *bias = scale + period, *sum = bias + period, *weighted = sum + period;
  repeat_channels(a.scale, a.channels, period, scale);
  repeat_channels(a.bias, a.channels, period, bias);
  const S *x = static_cast<const S*>(a.in), *gy = static_cast<const S*>(a.grad_out);
  S* gx = static_cast<S*>(a.out);
  const int64_t end = t.end * a.channels;
  for (int64_t begin = t.begin * a.channels; begin < end; begin += kFold * period) {
    const int64_t stop = begin + kFold * period < end ? begin + kFold * period : end;
    memset(sum, 0, 2 * period * sizeof(T));
    int64_t p = 0;
    for (int64_t i = begin; i < stop; i += V::kLanes, p += V::kLanes) {
      if (p == period) p = 0;
      const bool whole = i + V::kLanes <= stop;
      const int n = whole ? V::kLanes : static_cast<int>(stop - i);
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
    for (int64_t i = 0; i < period; ++i) {
      sums[2 * (i % a.channels)] += sum[i];
      sums[2 * (i % a.channels) + 1] += weighted[i];
    }
  }
  delete[] scale;
}

// ---- moments
// -------------------------------------------------------------------------------------------------------
// Mean, then squared deviations from it, of a piece that stays in L1; pieces merge in double.
template <class S>
Moments piece_moments(const S* x, int64_t n, int64_t step) {
  double mean = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) mean += static_cast<double>(widen(x[i * step]));
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(widen(x[i * step])) - mean;
    m2 += d * d;
  }
  return {static_cast<double>(n), mean, m2};
}

template <class S>
void moments_task(const ActNormArgs& a, Task t, double* out) {
  constexpr int64_t kPiece = 1024;
  const S* x = static_cast<const S*>(a.in);
  for (int64_t c = 0; c < a.channels; ++c) {
    Moments m{0, 0, 0};
    if (a.inner == 1) {
      for (int64_t row = t.begin; row < t.end; row += kPiece) {
        const int64_t n = t.end - row < kPiece ? t.end - row : kPiece;
        m = merge(m, piece_moments(x + row * a.channels + c, n, a.channels));
      }
    } else {
      for (int64_t row = t.begin; row < t.end; ++row) {
        for (int64_t i = 0; i < a.inner; i += kPiece) {
          const int64_t n = a.inner - i < kPiece ? a.inner - i : kPiece;
          m = merge(m, piece_moments(x + (row * a.channels + c) * a.inner + i, n, 1));
        }
      }
    }
    out[2 * c] = m.mean;
    out[2 * c + 1] = m.m2;
  }
}

// ---- tasks
// ---------------------------------------------------------------------------------------------------------
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
    moments_task<S>(a, task_rows(a, task), a.partial + 2 * task * a.channels);
  }
}

}  // namespace

#define PFK_BY_DTYPE(function)                  \
  switch (dtype) {                              \
    case 0:                                     \
      return function<float>(a, begin, end);    \
    case 1:                                     \
      return function<double>(a, begin, end);   \
    case 2:                                     \
      return function<BFloat16>(a, begin, end); \
    default:                                    \
      return function<Float16>(a, begin, end);  \
  }
void actnorm_forward(const ActNormArgs& a, int dtype, int64_t begin, int64_t end) {
  PFK_BY_DTYPE(forward_tasks)
}
void actnorm_backward(const ActNormArgs& a, int dtype, int64_t begin, int64_t end) {
  PFK_BY_DTYPE(backward_tasks)
}
void channel_moments(const ActNormArgs& a, int dtype, int64_t begin,
                     int64_t end){PFK_BY_DTYPE(moments_tasks)}

PFK_END
#if PFK_SIMD_LEVEL == 0
#include <cmath>

#include "core/host.h"

    namespace pfk {
  namespace {

  // Channel constants in the type computed in, and the plan of tasks.
  struct Plan {
    Canonical x;
    ImageShape shape;
    DType dtype;
    std::vector<double> factor;  // of the direction that runs
    std::vector<float> scale32, bias32;
    std::vector<double> bias64;
    double log_det = 0;  // of every sample
    int64_t tasks = 0;
    ActNormArgs args{};
  };

  // At least 16,384 elements a task, and few enough tasks for their partial sums to stay small.
  int64_t rows_per_task(const ActNormArgs& a) {
    const int64_t row = a.channels * a.inner;
    const int64_t rows = (16384 + row - 1) / (row > 0 ? row : 1);
    const int64_t least = (a.outer + 1023) / 1024;
    return rows > least ? (rows > 0 ? rows : 1) : (least > 0 ? least : 1);
  }

  void plan_shape(Plan& p, const Tensor& x) {
    p.x = canonical(x);
    p.shape = image_shape(x);
    p.dtype = dtype_of(x);
    const bool flat = p.x.channels_last || p.shape.space == 1;
    p.args.outer = flat ? p.shape.samples * p.shape.space : p.shape.samples;
    p.args.channels = p.shape.channels;
    p.args.inner = flat ? 1 : p.shape.space;
    p.args.rows = rows_per_task(p.args);
    p.tasks = p.shape.channels == 0 ? 0 : (p.args.outer + p.args.rows - 1) / p.args.rows;
    p.args.in = p.x.tensor.const_data_ptr();
  }

  std::vector<double> to_doubles(const Tensor& t) {
    const Tensor c = torch::stable::contiguous(t);
    std::vector<double> v(c.numel());
    for (size_t i = 0; i < v.size(); ++i) {
      v[i] = c.scalar_type() == ScalarType::Double
                 ? static_cast<const double*>(c.const_data_ptr())[i]
                 : static_cast<const float*>(c.const_data_ptr())[i];
    }
    return v;
  }

  void plan(Plan& p, const Tensor& x, const Tensor& log_scale, const Tensor& bias, bool inverse) {
    plan_shape(p, x);
    p.factor = to_doubles(log_scale);
    p.bias64 = to_doubles(bias);
    for (double& value : p.factor) {
      p.log_det += value;
      value = std::exp(inverse ? -value : value);
    }
    p.log_det *= static_cast<double>(p.shape.space) * (inverse ? -1 : 1);
    p.args.inverse = inverse;
    if (p.dtype == kFloat64) {
      p.args.scale = p.factor.data(), p.args.bias = p.bias64.data();
    } else {
      p.scale32.assign(p.factor.begin(), p.factor.end());
      p.bias32.assign(p.bias64.begin(), p.bias64.end());
      p.args.scale = p.scale32.data(), p.args.bias = p.bias32.data();
    }
  }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& log_scale, const Tensor& bias,
                                     bool inverse) {
    Plan p;
    plan(p, x, log_scale, bias, inverse);
    Tensor y = empty_like_canonical(p.x), log_det = empty_per_sample(x, p.shape.samples);
    p.args.out = y.mutable_data_ptr();
    parallel_tasks(p.tasks, p.args.rows * p.args.channels * p.args.inner,
                   [&](int64_t begin, int64_t end) {
                     PFK_CALL_LEVEL(actnorm_forward, p.args, p.dtype, begin, end);
                   });
    torch::stable::fill_(log_det, p.log_det);
    return {y, log_det};
  }

  void store(const std::vector<double>& from, Tensor& to) {
    for (size_t i = 0; i < from.size(); ++i) {
      if (to.scalar_type() == ScalarType::Double) {
        static_cast<double*>(to.mutable_data_ptr())[i] = from[i];
      } else {
        static_cast<float*>(to.mutable_data_ptr())[i] = static_cast<float>(from[i]);
      }
    }
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_log_det,
                                              const Tensor& x, const Tensor& log_scale,
                                              const Tensor& bias, bool inverse) {
    Plan p;
    plan(p, x, log_scale, bias, inverse);
    const Tensor gy = with_format(grad_y, p.x.channels_last);
    Tensor grad_x = empty_like_canonical(p.x);
    std::vector<double> partial(2 * p.tasks * p.shape.channels);
    p.args.out = grad_x.mutable_data_ptr();
    p.args.grad_out = gy.const_data_ptr();
    p.args.partial = partial.data();
    parallel_tasks(p.tasks, p.args.rows * p.args.channels * p.args.inner,
                   [&](int64_t begin, int64_t end) {
                     PFK_CALL_LEVEL(actnorm_backward, p.args, p.dtype, begin, end);
                   });
    double from_log_det = 0;
    for (const double g : to_doubles(grad_log_det)) from_log_det += g;
    from_log_det *= static_cast<double>(p.shape.space);
    std::vector<double> grad_scale(p.shape.channels), grad_bias(p.shape.channels);
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      double sum = 0, weighted = 0;
      for (int64_t task = 0; task < p.tasks; ++task) {
        sum += partial[2 * (task * p.shape.channels + c)];
        weighted += partial[2 * (task * p.shape.channels + c) + 1];
      }
      const ActNormGrad g = actnorm_finish(sum, weighted, p.factor[c], from_log_det, inverse);
      grad_scale[c] = g.log_scale, grad_bias[c] = g.bias;
    }
    Tensor gs = torch::stable::new_empty(log_scale, log_scale.sizes());
    Tensor gb = torch::stable::new_empty(bias, bias.sizes());
    store(grad_scale, gs);
    store(grad_bias, gb);
    return {grad_x, gs, gb};
  }

  std::tuple<Tensor, Tensor> moments(const Tensor& x) {
    Plan p;
    plan_shape(p, x);
    std::vector<double> partial(2 * p.tasks * p.shape.channels);
    p.args.partial = partial.data();
    parallel_tasks(p.tasks, p.args.rows * p.args.channels * p.args.inner,
                   [&](int64_t begin, int64_t end) {
                     PFK_CALL_LEVEL(channel_moments, p.args, p.dtype, begin, end);
                   });
    std::vector<double> mean(p.shape.channels), variance(p.shape.channels);
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      Moments m{0, 0, 0};
      for (int64_t task = 0; task < p.tasks; ++task) {
        const int64_t left = p.args.outer - task * p.args.rows;
        const double count =
            static_cast<double>((left < p.args.rows ? left : p.args.rows) * p.args.inner);
        const double* q = partial.data() + 2 * (task * p.shape.channels + c);
        m = merge(m, {count, q[0], q[1]});
      }
      mean[c] = m.count > 0 ? m.mean : NAN;
      variance[c] = m.count > 0 ? m.m2 / m.count : NAN;
    }
    Tensor a = torch::stable::new_empty(x, {p.shape.channels}, accumulation_type(x));
    Tensor b = torch::stable::new_empty(x, {p.shape.channels}, accumulation_type(x));
    store(mean, a);
    store(variance, b);
    return {a, b};
  }

  }  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("actnorm", TORCH_BOX(&pfk::forward));
  m.impl("actnorm_backward", TORCH_BOX(&pfk::backward));
  m.impl("channel_moments", TORCH_BOX(&pfk::moments));
}
#endif
