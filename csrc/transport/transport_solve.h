// SPDX-License-Identifier: Apache-2.0
// What the ops do with a problem: Sinkhorn's iteration, a product with its plan, draws from it.
//
// Alternating: g from f, then f from the new g; the marginal of y tells the error.  Symmetric
// (Feydy et al. 2019): both from the old ones, of which they move half way; the first step is
// whole, and so is a last one.  With scaling, epsilon begins at the square of the diameter and
// shrinks by one ratio until it is the one asked for.
#pragma once

#include "transport/transport_host.h"

namespace pfk {

// Epsilons above the last one, from the largest, as many as iterations may reach.
inline std::vector<double> larger_epsilons(const SinkhornOptions& o, double extent) {
  std::vector<double> levels;
  for (double e = extent; o.scaling > 0 && e > o.epsilon; e *= o.scaling) {
    if (static_cast<int64_t>(levels.size()) == o.iterations) break;
    levels.push_back(e);
    // so begins the schedule of Feydy et al.
    if (o.symmetric && levels.size() == 1 && o.iterations > 1) levels.push_back(e);
  }
  return levels;
}

template <class T, class Run>
struct Iteration {
  Problem<T, Run>& problem;
  const SinkhornOptions& o;
  int64_t done = 0;
  double error = INFINITY;

  // With a tolerance of 0 all iterations run; after NaN none does.
  bool goes_on(double tolerance) const {
    return tolerance > 0 ? error > tolerance : error == error;
  }

  void step(double epsilon) {
    problem.accept(1);
    problem.half(0, epsilon, o.penalty[0], 1);
    problem.accept(0);
    ++done;
  }
  // The error belongs to the potentials before the step, which is not taken if they are the result.
  void alternating() {
    while (done < o.iterations) {
      error = problem.half(1, o.epsilon, o.penalty[1], 1);
      if (!goes_on(o.tolerance)) return;
      step(o.epsilon);
    }
  }
  // A larger epsilon, whose potentials only begin those of the next one.
  void alternating_level(double epsilon) {
    for (int i = 0; i < kLevelIterations && done < o.iterations; ++i) {
      error = problem.half(1, epsilon, o.penalty[1], 1);
      step(epsilon);
      if (!(error > kLevelTolerance)) return;
    }
  }

  void both(double epsilon, double blend) {
    const double of_x = problem.half(0, epsilon, o.penalty[0], blend);
    const double of_y = problem.half(1, epsilon, o.penalty[1], blend);
    error = of_x > of_y || of_x != of_x ? of_x : of_y;
  }
  void symmetric(double epsilon, int64_t most) {
    for (int64_t i = 0; i < most && done < o.iterations; ++i, ++done) {
      both(epsilon, 0.5);
      if (epsilon == o.epsilon && !goes_on(o.tolerance)) return;
      problem.accept(0), problem.accept(1);
    }
  }
  void whole_step(double epsilon) {
    both(epsilon, 1);
    problem.accept(0), problem.accept(1);
  }

  // Where the iterations ran out among the larger epsilons, f at least is one of the last.
  void finish() {
    problem.half(0, o.epsilon, o.penalty[0], 1);
    problem.accept(0);
  }

  void run() {
    const std::vector<double> levels = larger_epsilons(o, problem.extent);
    if (o.symmetric) whole_step(levels.empty() ? o.epsilon : levels[0]);
    for (double e : levels) o.symmetric ? symmetric(e, 1) : alternating_level(e);
    const bool reached = levels.empty() || done < o.iterations;
    o.symmetric ? symmetric(o.epsilon, o.iterations) : alternating();
    if (o.symmetric) whole_step(o.epsilon);
    if (!o.symmetric && !reached) finish();
    if (o.symmetric || done == o.iterations) error = problem.half(1, o.epsilon, o.penalty[1], 1);
  }
};

// The dual objective in double.  The sum of the plan follows from the potentials of x, whose last
// update was whole.
template <class T, class Run>
double dual_cost(const Problem<T, Run>& problem, const SinkhornOptions& o) {
  double value = 0, total[2] = {0, 0}, plan = 0;
  for (int side = 0; side < 2; ++side) {
    const CloudCopy<T>& c = problem.cloud[side];
    const double penalty = o.penalty[side];
    const bool held = !(penalty > 0);
    for (int64_t i = 0; i < c.count; ++i) {
      // where the marginal holds, the rest of the origins sums to zero: the clouds are centred
      const double f = c.potential[i] + (held ? 0 : c.origin[i]);
      value += c.mass[i] * (held ? f : -penalty * std::expm1(-f / penalty));
      if (side == 0) plan += c.mass[i] * (held ? 1 : std::exp(-f / penalty));
      total[side] += c.mass[i];
    }
    if (held) value += total[side] * problem.offset[side];
  }
  return value - o.epsilon * (plan - total[0] * total[1]);
}

template <class T, class Run>
void solve_problem(const TransportTensors& t, const SinkhornResults& r, const SinkhornOptions& o,
                   int64_t p, const Run& run) {
  Problem<T, Run> problem(t, p, o.scale, o.symmetric, run);
  problem.set(0, nullptr), problem.set(1, nullptr);
  problem.keep_products();
  Iteration<T, Run> iteration{problem, o};
  iteration.run();
  static_cast<double*>(data_of(r.cost))[p] = dual_cost(problem, o);
  static_cast<double*>(data_of(r.error))[p] = iteration.error;
  static_cast<int64_t*>(data_of(r.iterations))[p] = iteration.done;
  for (int side = 0; side < 2; ++side) {
    problem.get(side, static_cast<double*>(data_of(r.potential[side])) + p * t.count(side));
  }
}

// A problem whose potentials are given.  A plan does not change if a number goes from f to g: they
// are made as small as it can make them.
template <class T, class Run>
struct GivenPlan : Problem<T, Run> {
  GivenPlan(const TransportTensors& t, const PlanTensors& plan, int64_t p, double scale,
            const Run& run)
      : Problem<T, Run>(t, p, scale, false, run) {
    for (int side = 0; side < 2; ++side) {
      this->set(side,
                static_cast<const double*>(data_of(plan.potential[side])) + p * t.count(side));
    }
    double mean = 0;
    for (double f : this->cloud[0].potential) mean += f / t.n;
    for (double& f : this->cloud[0].potential) f -= mean;
    for (double& g : this->cloud[1].potential) g += mean;
  }
};

template <class T, class Run>
void multiply_plan(const TransportTensors& t, const PlanTensors& plan, const Tensor& matrix,
                   const Tensor& out, double epsilon, double scale, int64_t p, const Run& run) {
  GivenPlan<T, Run> problem(t, plan, p, scale, run);
  problem.row_shifts(0, epsilon, true);
  PlanProductArgs a{};
  a.scores = problem.scores(0, epsilon);
  a.task = matmul_task(t.n);
  a.shift = problem.cloud[0].shift.data();
  a.width = matrix.sizes()[2];
  std::vector<T> packed(run.padded(a.width, problem.kDtype) * t.m);
  MatmulArgs m{};
  m.columns = a.width, m.depth = t.m;
  m.b = static_cast<const T*>(data_of(matrix)) + p * t.m * a.width;
  m.b_step = a.width, m.b_column = 1;
  m.packed = packed.data();
  run.pack(m, problem.kDtype);
  a.matrix = packed.data();
  a.out = static_cast<T*>(data_of(out)) + p * t.n * a.width;
  run.product(a, problem.kDtype);
}

template <class T, class Run>
void draw_from_plan(const TransportTensors& t, const PlanTensors& plan, const Tensor& uniforms,
                    const Tensor& out, double epsilon, double scale, int64_t p, const Run& run) {
  GivenPlan<T, Run> problem(t, plan, p, scale, run);
  problem.row_shifts(0, epsilon, false);
  PlanDrawArgs a{};
  a.scores = problem.scores(0, epsilon);
  a.task = matmul_task(t.n);
  a.shift = problem.cloud[0].shift.data();
  a.uniforms = static_cast<const double*>(data_of(uniforms)) + p * t.n;
  a.out = static_cast<int64_t*>(data_of(out)) + p * t.n;
  run.draw(a, problem.kDtype);
}

}  // namespace pfk
