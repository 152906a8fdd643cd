// SPDX-License-Identifier: Apache-2.0
// Channel mixing on the host: from tensors to MixArgs, and from sums to the gradients of
// parameters.
#pragma once

#include <cmath>

#include "core/host.h"
#include "linear/linear.h"

namespace pfk {

// Enough tasks for any processor, and few enough to keep their partial sums small.
constexpr int64_t kTaskPixels = 1024, kTasks = 64;

struct Plan {
  Canonical x;
  ImageShape shape;
  MixMap map;
  Values weight, log_scale, bias;
  std::vector<double> scale;    // exp(+-log_scale), or empty
  std::vector<char> constants;  // the matrix and the signed bias, in the type of the computation
  int64_t tasks = 0;
  MixArgs args{};

  Plan(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& log_scale_,
       const std::optional<Tensor>& bias_, bool inverse)
      : x(canonical(x_)),
        shape(image_shape(x_)),
        map{log_scale_.has_value(), inverse},
        weight(weight_),
        log_scale(log_scale_),
        bias(bias_) {
    const int64_t c = shape.channels;
    args.pixels = shape.samples * shape.space;
    args.channels = c;
    args.inner = x.channels_last || shape.space == 1 ? 0 : shape.space;
    args.stride = (c + 15) / 16 * 16;
    args.x = x.tensor.const_data_ptr();
    for (int64_t i = 0; log_scale.given && i < c; ++i) {
      scale.push_back(std::exp(map.sign() * log_scale[i]));
    }
  }

  double scale_of(int64_t i, int64_t j) const {
    return scale.empty() ? 1.0 : scale[map.scaled(i, j)];
  }
  double folded(int64_t i, int64_t j) const {
    return weight[i * shape.channels + j] * scale_of(i, j);
  }

  // Fills the constants.
  template <class T>
  void fold(bool transposed) {
    const int64_t c = shape.channels;
    constants.resize((c + 1) * args.stride * sizeof(T));
    T* m = reinterpret_cast<T*>(constants.data());
    T* b = m + c * args.stride;
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t j = 0; j < c; ++j) {
        m[transposed ? j * args.stride + i : i * args.stride + j] = static_cast<T>(folded(i, j));
      }
      if (bias.given) b[i] = static_cast<T>(map.sign() * bias[i]);
    }
    args.matrix = m;
    if (bias.given) (map.bias_before() ? args.pre : args.post) = b;
  }
  void fold(bool transposed) {
    accumulation_type(x.tensor) == ScalarType::Double ? fold<double>(transposed)
                                                      : fold<float>(transposed);
  }

  void cut(int64_t least, int64_t most) {
    const int64_t by_most = (args.pixels + most - 1) / most;
    args.task = by_most > least ? by_most : least;
    tasks = (args.pixels + args.task - 1) / args.task;
  }
};

// Adds up G and g of all tasks in order.
inline std::vector<double> sum_tasks(const std::vector<double>& partial, int64_t tasks,
                                     int64_t size) {
  std::vector<double> sum(partial.begin(), partial.begin() + (tasks ? size : 0));
  sum.resize(size);
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t i = 0; i < size; ++i) sum[i] += partial[task * size + i];
  }
  return sum;
}

// The gradients of the parameters from G and g: see linear.h.
inline void finish(const Plan& p, const std::vector<double>& sum, double grad_log_det,
                   const Values& grad_w, const Values& grad_s, const Values& grad_b) {
  const int64_t c = p.shape.channels;
  std::vector<double> s(c, grad_log_det), before(c, 0.0);
  for (int64_t i = 0; i < c; ++i) {
    const double* row = sum.data() + i * (c + 1);
    for (int64_t j = 0; j < c; ++j) {
      grad_w.put(i * c + j, row[j] * p.scale_of(i, j));
      s[p.map.scaled(i, j)] += row[j] * p.folded(i, j);
      before[j] += p.folded(i, j) * row[c];
    }
  }
  for (int64_t j = 0; j < c; ++j) {
    const double after = sum[j * (c + 1) + c];
    grad_s.put(j, p.map.sign() * s[j]);
    grad_b.put(j, p.map.sign() * (p.map.bias_before() ? before[j] : after));
  }
}

}  // namespace pfk
