// SPDX-License-Identifier: Apache-2.0
// ActNorm on the host: from tensors to ActNormArgs.
#pragma once

#include <algorithm>
#include <cmath>

#include "actnorm/actnorm.h"
#include "core/host.h"

namespace pfk {

// The constants of the channels in the type of the computation, and how the work is cut into tasks.
struct ActNormPlan {
  Canonical x;
  ImageShape shape;
  DType dtype;
  std::vector<double> factor;  // of the direction that runs
  std::vector<char> constants;
  double log_det = 0;  // of every sample
  int64_t tasks = 0;
  ActNormArgs args{};

  explicit ActNormPlan(const Tensor& t)
      : x(canonical(t)), shape(image_shape(t)), dtype(dtype_of(t)) {
    const bool flat = x.channels_last || shape.space == 1;
    args.outer = flat ? shape.samples * shape.space : shape.samples;
    args.channels = shape.channels;
    args.inner = flat ? 1 : shape.space;
    args.in = x.tensor.const_data_ptr();
    // at least 16,384 elements in a task, 32 of every channel, and few enough tasks to keep their
    // partial sums small
    const int64_t row = args.channels * args.inner > 0 ? args.channels * args.inner : 1;
    const int64_t inner = args.inner > 0 ? args.inner : 1;
    const int64_t rows = (16384 + row - 1) / row, many = (32 + inner - 1) / inner;
    const int64_t least = (args.outer + 1023) / 1024;
    args.rows = std::max({rows, many, least, int64_t{1}});
    tasks = shape.channels == 0 ? 0 : (args.outer + args.rows - 1) / args.rows;
  }

  void set_constants(const Tensor& log_scale, const Tensor& bias, bool inverse) {
    const Values s(log_scale), b(bias);
    factor.resize(shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) {
      log_det += s[c];
      factor[c] = std::exp(inverse ? -s[c] : s[c]);
    }
    log_det *= static_cast<double>(shape.space) * (inverse ? -1 : 1);
    args.inverse = inverse;
    dtype == kFloat64 ? put_constants<double>(b) : put_constants<float>(b);
  }
  template <class T>
  void put_constants(const Values& bias) {
    constants.resize(2 * shape.channels * sizeof(T));
    T* scale = reinterpret_cast<T*>(constants.data());
    for (int64_t c = 0; c < shape.channels; ++c) {
      scale[c] = static_cast<T>(factor[c]);
      scale[shape.channels + c] = static_cast<T>(bias[c]);
    }
    args.scale = scale;
    args.bias = scale + shape.channels;
  }

  // The memory of two sums for each task and channel, which it must outlive.
  std::vector<double> partial() {
    std::vector<double> sums(2 * tasks * shape.channels);
    args.partial = sums.data();
    return sums;
  }
  double count_of(int64_t task) const {
    const int64_t left = args.outer - task * args.rows;
    return static_cast<double>((left < args.rows ? left : args.rows) * args.inner);
  }
};

}  // namespace pfk
