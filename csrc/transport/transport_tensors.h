// SPDX-License-Identifier: Apache-2.0
// Tensors and numbers of the ops of entropic optimal transport, checked.
#pragma once

#include "core/codes.h"
#include "core/host.h"
#include "transport/transport.h"

namespace pfk {

// Of a larger epsilon: most iterations, and the error at which the next one begins.
constexpr int kLevelIterations = 8;
constexpr double kLevelTolerance = 0.1;
// Anderson's acceleration with a memory of one step (constexpr: CUDA kernels call it, too): how
// many times its length a step is prolonged by, to where it would vanish together with the one
// before.
constexpr double kLongestStep = 30;
constexpr double prolonged_by(double product, double square) {
  const double length = -product / square;
  return length > 0 ? (length < kLongestStep ? length : kLongestStep) : 0;
}
// What is known of the iteration before.
enum ProlongMemory : int { kNoStep, kPlainStep, kProlongedStep };
// Whether an error has not grown.  While mass waits between clusters far apart the error stays the
// same for many iterations, which prolonged steps cross: rounding must not count as growth.
constexpr bool has_not_grown(double error, double smallest) {
  return error <= smallest * (1 + 1e-6);
}
// The error beyond which a step is not prolonged: the smallest so far.  Compared with the last one
// alone, steps too long could come for ever.
constexpr double smallest_error(bool known, double smallest, double error) {
  return known && smallest <= error ? smallest : error;
}

struct SinkhornOptions {
  double epsilon, scale;
  int64_t iterations;
  double tolerance;
  double scaling;     // the ratio of one epsilon to the last, 0: no scaling
  double penalty[2];  // of each marginal, 0 where it holds exactly
  bool symmetric, accelerated;
};

inline SinkhornOptions sinkhorn_options(double epsilon, double scale, int64_t iterations,
                                        double tolerance, int64_t schedule, double scaling,
                                        double penalty_x, double penalty_y) {
  const int kind = checked_kind("schedule", schedule, kSinkhornSchedules);
  return {epsilon,
          scale,
          iterations,
          tolerance,
          scaling,
          {penalty_x, penalty_y},
          kind == kSymmetric,
          kind == kAccelerated};
}

// Clouds [problems, n, d] and [problems, m, d] with masses [problems, n] and [problems, m].
struct TransportTensors {
  Tensor points[2], mass[2];
  int64_t problems, n, m, depth;
  bool wide;

  TransportTensors(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b)
      : points{dense(x), dense(y)}, mass{dense(a), dense(b)} {
    STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.sizes()[0] == y.sizes()[0] &&
                        x.sizes()[2] == y.sizes()[2],
                    "clouds must have shapes [problems, n, d] and [problems, m, d]");
    problems = x.sizes()[0], n = x.sizes()[1], m = y.sizes()[1], depth = x.sizes()[2];
    wide = dtype_of(x) == kFloat64;
    STD_TORCH_CHECK(dtype_of(x) == dtype_of(y) && (wide || dtype_of(x) == kFloat32),
                    "clouds must be float32 or float64, both the same");
    for (int side = 0; side < 2; ++side) {
      STD_TORCH_CHECK(mass[side].scalar_type() == ScalarType::Double &&
                          mass[side].numel() == problems * count(side),
                      "masses must be float64, one for each point");
    }
  }
  int64_t count(int side) const { return side == 0 ? n : m; }
  DType dtype() const { return wide ? kFloat64 : kFloat32; }
};

struct SinkhornResults {
  Tensor cost, potential[2], error, iterations;

  explicit SinkhornResults(const TransportTensors& t)
      : cost(empty(t.points[0], {t.problems}, ScalarType::Double)),
        potential{empty(t.points[0], {t.problems, t.n}, ScalarType::Double),
                  empty(t.points[0], {t.problems, t.m}, ScalarType::Double)},
        error(empty(t.points[0], {t.problems}, ScalarType::Double)),
        iterations(empty(t.points[0], {t.problems}, ScalarType::Long)) {}
};

// The potentials of a plan, [problems, n] and [problems, m], float64.
struct PlanTensors {
  Tensor potential[2];
  PlanTensors(const TransportTensors& t, const Tensor& f, const Tensor& g)
      : potential{dense(f), dense(g)} {
    for (int side = 0; side < 2; ++side) {
      STD_TORCH_CHECK(potential[side].scalar_type() == ScalarType::Double &&
                          potential[side].numel() == t.problems * t.count(side),
                      "potentials must be float64, one for each point");
    }
  }
};

inline Tensor plan_matrix(const TransportTensors& t, const Tensor& matrix) {
  STD_TORCH_CHECK(matrix.dim() == 3 && matrix.sizes()[0] == t.problems &&
                      matrix.sizes()[1] == t.m && dtype_of(matrix) == t.dtype(),
                  "matrix must have shape [problems, columns, width] and the dtype of the clouds");
  return dense(matrix);
}
inline Tensor plan_uniforms(const TransportTensors& t, const Tensor& uniforms) {
  STD_TORCH_CHECK(
      uniforms.scalar_type() == ScalarType::Double && uniforms.numel() == t.problems * t.n,
      "uniforms must be float64, one for each row");
  return dense(uniforms);
}

}  // namespace pfk
