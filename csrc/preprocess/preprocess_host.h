// SPDX-License-Identifier: Apache-2.0
// From tensors to PreprocessArgs, once for CPU and CUDA.
#pragma once

#include <cmath>

#include "core/host.h"
#include "preprocess/preprocess.h"

namespace pfk {

struct PreprocessTensors {
  Canonical in;  // kept alive while the kernel runs, as are the others
  Tensor out, log_det;
  int64_t rows, features;
  PreprocessArgs args;
};

// Must agree with _edge_steps in ops/preprocess.py: how far noise before a logit stays from the
// edges of a level.
inline int checked_bits(int64_t bits) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "pyflowkern: bits must be from 1 to 8, got ", bits);
  return static_cast<int>(bits);
}

inline int edge_steps(int64_t bits, double alpha) {
  const double steps = std::ceil(std::ldexp(8.0, static_cast<int>(bits) - 8) / (1 - 2 * alpha));
  return static_cast<int>(std::fmin(steps, (1 << (kNoiseBits - 1)) - 1));
}

inline PreprocessTensors preprocess_tensors(const Tensor& x, ScalarType out, ScalarType log_det) {
  const Canonical c = canonical(x);
  const int64_t rows = x.dim() > 0 ? x.sizes()[0] : 1;
  PreprocessTensors t{c,    empty_like_canonical(c, out),    empty(x, {rows}, log_det),
                      rows, rows > 0 ? x.numel() / rows : 0, {}};
  t.args.in = c.tensor.const_data_ptr();
  t.args.out = t.out.mutable_data_ptr();
  t.args.log_det = t.log_det.mutable_data_ptr();
  return t;
}

inline PreprocessTensors dequantize_tensors(const Tensor& x, int64_t bits,
                                            std::optional<double> alpha) {
  PreprocessTensors t = preprocess_tensors(x, ScalarType::Float, ScalarType::Float);
  const ImageShape shape = image_shape(x);
  PreprocessArgs& a = t.args;
  a.bits = checked_bits(bits);
  a.logit = alpha.has_value();
  a.alpha = alpha.value_or(0);
  a.edge = alpha ? edge_steps(bits, *alpha) : 0;
  const double slope = -static_cast<double>(bits) * std::log(2.0) + std::log(1 - 2 * a.alpha);
  a.constant = static_cast<double>(t.features) * slope;
  a.channels = shape.channels, a.space = shape.space;
  a.channels_last = t.in.channels_last;
  return t;
}

inline PreprocessTensors quantize_tensors(const Tensor& y, int64_t bits,
                                          std::optional<double> alpha) {
  PreprocessTensors t = preprocess_tensors(y, ScalarType::Byte, ScalarType::Float);
  t.args.bits = checked_bits(bits);
  t.args.logit = alpha.has_value();
  t.args.alpha = alpha.value_or(0);
  return t;
}

inline PreprocessTensors logit_tensors(const Tensor& x, double alpha, bool inverse) {
  PreprocessTensors t = preprocess_tensors(x, x.scalar_type(), accumulation_type(x));
  t.args.alpha = alpha;
  t.args.inverse = inverse;
  const double slope = std::log(1 - 2 * alpha);
  t.args.constant = static_cast<double>(t.features) * (inverse ? -slope : slope);
  return t;
}

struct LogitGradTensors : PreprocessTensors {
  Tensor grad_y, grad_log_det;
};

inline LogitGradTensors logit_grad_tensors(const Tensor& grad_y, const Tensor& grad_log_det,
                                           const Tensor& x, double alpha, bool inverse) {
  PreprocessTensors base = logit_tensors(x, alpha, inverse);
  LogitGradTensors t{base, with_format(grad_y, base.in.channels_last), dense_sums(grad_log_det, x)};
  t.args.grad_out = t.grad_y.const_data_ptr();
  t.args.grad_log_det = t.grad_log_det.const_data_ptr();
  return t;
}

}  // namespace pfk
