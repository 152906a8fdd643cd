// SPDX-License-Identifier: Apache-2.0
// A problem of entropic optimal transport on the CPU: its points in the coordinates of the
// computation, and half an iteration.  `run` executes the passes (transport_cpu.cpp).
//
// Each cloud is centred by its own mean.  With d the difference of the means, |x - y|^2 = |x' - y'
// + d|^2 differs from |x' - y'|^2 by terms of x' and of y' alone, which belong to the potentials:
//   f_i = f'_i + 2 scale <d, x'_i> + part of scale |d|^2,  g_j = g'_j - 2 scale <d, y'_j> + the
//   rest.
// A translation therefore costs no digits.  From potentials of zero the alternating schedule makes
// the first of x keep them, and g what |d|^2 adds; the symmetric one shares it between both.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/matmul.h"
#include "transport/transport_tensors.h"

namespace pfk {

// One cloud of a problem, centred, in the two forms in which passes read it.
template <class T>
struct CloudCopy {
  int64_t count;
  const double* mass;
  std::vector<double> mean, origin;  // origin: what centring took from the potential
  std::vector<double> potential, next, shift, squares, log_mass;
  std::vector<T> points, packed, weights;
  std::vector<T> kept;  // products with the other cloud, a row for each point of this one
};

// A problem while it is solved or its plan is read.
template <class T, class Run>
struct Problem {
  static constexpr DType kDtype = sizeof(T) == 8 ? kFloat64 : kFloat32;
  const Run& run;
  const int64_t depth;
  const double scale;
  const bool direct;
  double extent = 0;          // the square of the bounding box's diagonal
  double offset[2] = {0, 0};  // what the difference of the means adds to the potentials of a side
  CloudCopy<T> cloud[2];
  std::vector<double> errors;

  Problem(const TransportTensors& t, int64_t p, double scale_, bool symmetric, const Run& run_)
      : run(run_), depth(t.depth), scale(scale_), direct(t.depth <= kDirectDepth) {
    for (int side = 0; side < 2; ++side) {
      CloudCopy<T>& c = cloud[side];
      c.count = t.count(side);
      c.mass = static_cast<const double*>(data_of(t.mass[side])) + p * c.count;
      centre(c, static_cast<const T*>(data_of(t.points[side])) + p * c.count * depth);
    }
    measure_box();
    std::vector<double> apart(depth);
    for (int64_t k = 0; k < depth; ++k) {
      apart[k] = cloud[0].mean[k] - cloud[1].mean[k];
      offset[1] += scale * apart[k] * apart[k];
    }
    if (symmetric) offset[0] = offset[1] /= 2;
    for (int side = 0; side < 2; ++side) {
      CloudCopy<T>& c = cloud[side];
      for (int64_t i = 0; i < c.count; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += apart[k] * c.points[i * depth + k];
        c.origin[i] = (side == 0 ? 2 : -2) * scale * sum + offset[side];
      }
    }
  }

  void centre(CloudCopy<T>& c, const T* from) {
    c.mean.assign(depth, 0.0);
    double total = 0;
    for (int64_t i = 0; i < c.count; ++i) {
      total += c.mass[i];
      for (int64_t k = 0; k < depth; ++k) c.mean[k] += c.mass[i] * from[i * depth + k];
    }
    for (int64_t k = 0; k < depth; ++k) c.mean[k] /= total;
    c.points.resize(c.count * depth);
    c.log_mass.resize(c.count);
    c.origin.resize(c.count);
    c.shift.assign(c.count, NAN);
    c.potential.resize(c.count);
    c.next.resize(c.count);
    if (!direct) c.squares.resize(c.count);
    for (int64_t i = 0; i < c.count; ++i) {
      double square = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const T v = static_cast<T>(from[i * depth + k] - c.mean[k]);
        c.points[i * depth + k] = v;
        square += static_cast<double>(v) * v;
      }
      if (!direct) c.squares[i] = scale * square;
      c.log_mass[i] = std::log2(c.mass[i]);
    }
    const int64_t padded = run.padded(c.count, kDtype);
    c.packed.assign(padded * depth, T(0));
    c.weights.assign(padded, T(-1e30));
    MatmulArgs m{};
    m.columns = c.count, m.depth = depth;
    m.b = c.points.data(), m.b_step = 1, m.b_column = depth;
    m.packed = c.packed.data();
    run.pack(m, kDtype);
  }

  void measure_box() {  // in the coordinates of the tensors
    for (int64_t k = 0; k < depth; ++k) {
      double low = INFINITY, high = -INFINITY;
      for (const CloudCopy<T>& c : cloud) {
        for (int64_t i = 0; i < c.count; ++i) {
          const double v = c.points[i * depth + k] + c.mean[k];
          low = std::min(low, v), high = std::max(high, v);
        }
      }
      extent += (high - low) * (high - low);
    }
  }

  // Potentials in the coordinates of the tensors, written and read.
  void set(int side, const double* from) {
    CloudCopy<T>& c = cloud[side];
    for (int64_t i = 0; i < c.count; ++i) c.potential[i] = (from ? from[i] : 0) - c.origin[i];
  }
  void get(int side, double* to) const {
    const CloudCopy<T>& c = cloud[side];
    for (int64_t i = 0; i < c.count; ++i) to[i] = c.potential[i] + c.origin[i];
  }

  // Rows of `side`, whose columns are the other cloud with its present potentials.
  ScoreArgs scores(int side, double epsilon, bool with_mass = true) {
    CloudCopy<T>& c = cloud[1 - side];
    const double unit = epsilon * kLog2;
    for (int64_t j = 0; j < c.count; ++j) {
      const double reduced = c.potential[j] - (direct ? 0 : c.squares[j]);
      const double log_mass = with_mass ? c.log_mass[j] : 0;
      c.weights[j] = static_cast<T>(std::max(log_mass + reduced / unit, -1e30));
    }
    const std::vector<T>& kept = cloud[side].kept;
    return {cloud[side].count,
            c.count,
            depth,
            cloud[side].points.data(),
            c.packed.data(),
            c.weights.data(),
            (direct ? -1 : 2) * scale / unit,
            direct,
            kept.empty() ? nullptr : kept.data(),
            run.padded(c.count, kDtype)};
  }

  // Keeps the products of a small problem, which every iteration needs, in the order of the rows of
  // x alone or of both clouds.
  void keep_products(int sides) {
    for (int side = 0; side < sides; ++side) {
      const int64_t size = cloud[side].count * run.padded(cloud[1 - side].count, kDtype);
      if (direct || size * static_cast<int64_t>(sizeof(T)) > kKeptBytes) continue;
      const ScoreArgs s = scores(side, 1);
      cloud[side].kept.resize(size);
      run.keep(s, cloud[side].kept.data(), kDtype);
    }
  }

  // What a pass over the rows of x needs: scores, and shifts with which powers of two are entries
  // of the plan, with masses of rows and of columns or without.
  template <class Args>
  Args rows_of_plan(double epsilon, bool row_mass, bool column_mass) {
    CloudCopy<T>& c = cloud[0];
    for (int64_t i = 0; i < c.count; ++i) {
      const double reduced = c.potential[i] - (direct ? 0 : c.squares[i]);
      c.shift[i] = -reduced / (epsilon * kLog2) - (row_mass ? c.log_mass[i] : 0);
    }
    Args a{};
    a.scores = scores(0, epsilon, column_mass);
    a.task = matmul_task(c.count);
    a.shift = c.shift.data();
    return a;
  }

  // Half an iteration, into `next`; returns the error of the marginal before it.
  double half(int side, double epsilon, double penalty, double blend) {
    CloudCopy<T>& c = cloud[side];
    SoftminArgs a{};
    a.scores = scores(side, epsilon);
    a.task = matmul_task(c.count);
    errors.assign((c.count + a.task - 1) / a.task, 0.0);
    a.shift = c.shift.data();
    a.squares = direct ? nullptr : c.squares.data();
    a.unit = epsilon * kLog2, a.epsilon = epsilon;
    a.penalty = penalty, a.damp = penalty > 0 ? penalty / (penalty + epsilon) : 1;
    a.origin = penalty > 0 ? c.origin.data() : nullptr;
    a.blend = blend;
    a.potential = c.potential.data(), a.result = c.next.data();
    a.mass = c.mass, a.errors = errors.data();
    run.softmin(a, kDtype);
    double error = 0;
    for (double e : errors) error += e;
    return error;
  }
  void accept(int side) { cloud[side].potential.swap(cloud[side].next); }
};

}  // namespace pfk
