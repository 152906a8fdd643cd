// SPDX-License-Identifier: Apache-2.0
// From tensors to RungeKuttaArgs, and the four ops of the family, once for CPU and CUDA.
#pragma once

#include "core/host.h"
#include "runge_kutta/runge_kutta.h"

namespace pfk {

struct RungeKuttaTensors {
  Tensor y, y1, slopes, fresh, steps;  // kept alive while the kernel runs
  bool wide;                           // float64
  RungeKuttaArgs args;
};

// A slope, and the row of the buffer that it is copied to.
struct Fresh {
  const Tensor& slope;
  int64_t row;
};

inline RungeKuttaTensors runge_kutta_tensors(const Tensor& y, const Tensor& slopes,
                                             const Tensor& weights, double step,
                                             const std::optional<Tensor>& steps,
                                             const Fresh* fresh) {
  RungeKuttaTensors t{dense(y), {}, dense(slopes), {}, {}, dtype_of(y) == kFloat64, {}};
  RungeKuttaArgs& a = t.args;
  const int64_t total = t.y.numel(), size = t.wide ? 8 : 4, stages = slopes.size(0);
  STD_TORCH_CHECK(t.wide || dtype_of(y) == kFloat32, "runge_kutta: y in float32 or float64");
  STD_TORCH_CHECK(slopes.scalar_type() == y.scalar_type() && slopes.numel() == stages * total &&
                      weights.numel() <= stages && weights.scalar_type() == ScalarType::Double,
                  "runge_kutta: slopes must be [stages, *y.shape] in the dtype of y");
  a.rows = 1;
  a.step = step;
  if (steps) {
    t.steps = dense(*steps);
    STD_TORCH_CHECK(t.steps.scalar_type() == ScalarType::Double, "runge_kutta: steps in float64");
    a.steps = static_cast<const double*>(t.steps.const_data_ptr());
    a.each_row = t.steps.dim() == 1;
    if (a.each_row) a.rows = t.steps.numel();
    STD_TORCH_CHECK(!a.each_row || (y.dim() > 0 && a.rows == y.size(0)),
                    "runge_kutta: steps must be one for each row of y");
  }
  a.features = a.rows > 0 ? total / a.rows : 0;
  const char* rows = static_cast<const char*>(t.slopes.const_data_ptr());
  if (fresh != nullptr) {
    STD_TORCH_CHECK(fresh->row >= 0 && fresh->row < stages, "runge_kutta: row must be from 0 to ",
                    stages - 1);
    // of a buffer that is not contiguous the kernel would read a copy, without the fresh slope
    STD_TORCH_CHECK(slopes.is_contiguous(), "runge_kutta: slopes must be contiguous");
    STD_TORCH_CHECK(fresh->slope.numel() == total && fresh->slope.is_cuda() == y.is_cuda(),
                    "runge_kutta: a fresh slope must be like y");
  }
  int64_t kept = -1;
  if (fresh != nullptr && fresh->slope.scalar_type() != y.scalar_type()) {
    Tensor row = torch::stable::select(slopes, 0, fresh->row);
    torch::stable::copy_(row, fresh->slope);
  } else if (fresh != nullptr) {
    kept = fresh->row;
    t.fresh = dense(fresh->slope);
    a.fresh = t.fresh.const_data_ptr();
    a.kept = static_cast<char*>(slopes.mutable_data_ptr()) + kept * total * size;
  }
  const double* w = static_cast<const double*>(weights.const_data_ptr());
  for (int64_t j = 0; j < weights.numel(); ++j) {
    if (w[j] == 0) continue;
    if (j == kept) {
      a.fresh_weight = w[j];
      continue;
    }
    STD_TORCH_CHECK(a.count < kMaxSlopes, "runge_kutta: more than ", kMaxSlopes, " slopes");
    a.weights[a.count] = w[j];
    a.slopes[a.count++] = rows + j * total * size;
  }
  a.y = t.y.const_data_ptr();
  return t;
}

inline void set_error(RungeKuttaTensors& t, const Tensor& y1, double rtol, double atol,
                      const std::vector<int64_t>& sizes) {
  RungeKuttaArgs& a = t.args;
  t.y1 = dense(y1);
  STD_TORCH_CHECK(y1.scalar_type() == t.y.scalar_type() && y1.numel() == t.y.numel(),
                  "runge_kutta: y1 must be like y");
  a.y1 = t.y1.const_data_ptr();
  a.rtol = rtol, a.atol = atol;
  STD_TORCH_CHECK(sizes.size() < kMaxSegments, "runge_kutta: too many segments");
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "runge_kutta: sizes must be at least 0, got ", size);
    a.begins[a.segments + 1] = a.begins[a.segments] + size;
    ++a.segments;
  }
  a.counted = a.segments;
  if (a.segments == 0) a.counted = 1;
  if (a.segments == 0 || a.begins[a.segments] < a.features) a.begins[++a.segments] = a.features;
  STD_TORCH_CHECK(a.begins[a.segments] == a.features, "runge_kutta: sizes beyond the state");
  if (a.fresh == nullptr) a.segments = a.counted;  // there is no fresh slope to copy
}

inline Tensor norms(const RungeKuttaTensors& t) {
  if (t.args.each_row) return empty(t.y, {t.args.rows}, ScalarType::Double);
  return empty(t.y, {}, ScalarType::Double);
}

using Steps = std::optional<Tensor>;

template <class Device>
Tensor rk_combine(const Tensor& y, const Tensor& slopes, const Tensor& weights, double step,
                  const Steps& steps) {
  RungeKuttaTensors t = runge_kutta_tensors(y, slopes, weights, step, steps, nullptr);
  return Device::combine(t);
}

template <class Device>
Tensor rk_stage(const Tensor& slopes, const Tensor& slope, int64_t row, const Tensor& y,
                const Tensor& weights, double step, const Steps& steps) {
  const Fresh fresh{slope, row};
  RungeKuttaTensors t = runge_kutta_tensors(y, slopes, weights, step, steps, &fresh);
  return Device::combine(t);
}

template <class Device>
Tensor rk_error(const Tensor& y, const Tensor& y1, const Tensor& slopes, const Tensor& weights,
                double step, const Steps& steps, double rtol, double atol,
                std::vector<int64_t> sizes) {
  RungeKuttaTensors t = runge_kutta_tensors(y, slopes, weights, step, steps, nullptr);
  set_error(t, y1, rtol, atol, sizes);
  return Device::error(t);
}

template <class Device>
Tensor rk_last(const Tensor& slopes, const Tensor& slope, int64_t row, const Tensor& y,
               const Tensor& y1, const Tensor& weights, double step, const Steps& steps,
               double rtol, double atol, std::vector<int64_t> sizes) {
  const Fresh fresh{slope, row};
  RungeKuttaTensors t = runge_kutta_tensors(y, slopes, weights, step, steps, &fresh);
  set_error(t, y1, rtol, atol, sizes);
  return Device::error(t);
}

template <class Device, class Library>
void implement_runge_kutta(Library& m) {
  m.impl("rk_combine", TORCH_BOX(&rk_combine<Device>));
  m.impl("rk_stage", TORCH_BOX(&rk_stage<Device>));
  m.impl("rk_error", TORCH_BOX(&rk_error<Device>));
  m.impl("rk_last", TORCH_BOX(&rk_last<Device>));
}

}  // namespace pfk
