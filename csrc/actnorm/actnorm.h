// SPDX-License-Identifier: Apache-2.0
// ActNorm (Kingma and Dhariwal 2018): one scale and one bias a channel.
//   y = a (x + b),  a = exp(log_scale),  log det = space * sum(log_scale);   inverse  x = y / a -
//   b.
// With a' the factor of the direction (a or 1/a) and moved = d out / d log a' (a' (x + b), or y
// a'), the gradients are
//   grad_in = a' grad_out,   grad_bias = +-sum(...),   grad_log_scale = +-(sum grad_out moved +
//   space sum grad_log_det).
// A kernel sums grad_out and grad_out * w per channel, w = x + b or y; finish() turns the sums into
// gradients.
#pragma once

#include "core/vec.h"

namespace pfk {

// x is [outer, channels, inner] in memory: [N, C, space] contiguous, or [N * space, C, 1] for
// vectors and channels_last.
struct ActNormArgs {
  int64_t outer, channels, inner;
  bool inverse;
  const void* in;
  const void* scale;  // a', per channel, in the type of the computation
  const void* bias;   // likewise
  void* out;
  const void* grad_out;  // backward only
  double* partial;       // [tasks, channels, 2]: sums, or mean and squared deviations
  int64_t rows;          // outer rows of a task
};

// The gradients of one channel from its two sums.  `grad_log_det` is summed over samples and
// multiplied by space.
struct ActNormGrad {
  double bias, log_scale;
};
PFK_HD ActNormGrad actnorm_finish(double sum, double weighted, double scale, double grad_log_det,
                                  bool inverse) {
  if (inverse) return {-sum, -(scale * weighted + grad_log_det)};
  return {scale * sum, scale * weighted + grad_log_det};
}

}  // namespace pfk

PFK_BEGIN

// The argument that the scale multiplies.
template <class V>
PFK_HD V actnorm_shifted(V x, V bias, bool inverse) {
  return inverse ? x : x + bias;
}
template <class V>
PFK_HD V actnorm_apply(V x, V scale, V bias, bool inverse) {
  return inverse ? x * scale - bias : (x + bias) * scale;
}

// Mean and sum of squared deviations of a set, and of the union of two (Chan, Golub and LeVeque
// 1983). They are accurate where sums of squares cancel, as for data of mean 1e4 and deviation 1.
struct Moments {
  double count, mean, m2;
};
PFK_HD Moments merge(Moments a, Moments b) {
  const double n = a.count + b.count;
  if (n == 0) return a;
  const double delta = b.mean - a.mean;
  return {n, a.mean + delta * (b.count / n), a.m2 + b.m2 + delta * delta * (a.count * b.count / n)};
}

PFK_END
