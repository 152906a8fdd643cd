// SPDX-License-Identifier: Apache-2.0
// What the ops do with a problem: Sinkhorn's iteration, a product with its plan, draws from it.
//
// Alternating: g from f, then f from the new g; the marginal of y tells the error.  Symmetric
// (Feydy et al. 2019): both from the old ones, of which they move half way; the first step is
// whole, and so is a last one.  With scaling, epsilon begins at the square of the diameter and
// shrinks by one ratio until it is the one asked for.  Small problems alternate with their Gibbs
// kernel in memory, which gives the same numbers.  Accelerated: alternating, with steps of g
// prolonged (Anderson 1965, with a memory of one step).
#pragma once

#include <memory>

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

// Moves the next potentials along the line to the ones before them, unless the error has grown; if
// it grew by such a move, that is taken back.
struct Prolonging {
  std::vector<double> next, step;  // of the iteration before
  double error = 0;                // the smallest so far
  ProlongMemory memory = kNoStep;

  void apply(const double* mass, const std::vector<double>& now, std::vector<double>& to,
             double with_error) {
    if (memory == kProlongedStep && !has_not_grown(with_error, error)) {
      to = next, memory = kNoStep;
      return;
    }
    double length = 0;
    if (memory != kNoStep && has_not_grown(with_error, error)) {
      double product = 0, square = 0;
      for (size_t j = 0; j < to.size(); ++j) {
        const double change = to[j] - now[j] - step[j];
        product += mass[j] * (to[j] - now[j]) * change, square += mass[j] * change * change;
      }
      length = prolonged_by(product, square);
    }
    next.resize(to.size()), step.resize(to.size());
    for (size_t j = 0; j < to.size(); ++j) {
      const double before = next[j];
      next[j] = to[j], step[j] = to[j] - now[j];
      if (length > 0) to[j] += length * (to[j] - before);
    }
    error = smallest_error(memory != kNoStep, error, with_error);
    memory = length > 0 ? kProlongedStep : kPlainStep;
  }
};

// The kept Gibbs kernel of a small problem whose marginals both hold: iterations multiply by it,
// and the potentials move by factors u and v.  These must stay near 1, so that no number of the
// kernel that was rounded to zero matters (Schmitzer 2019); else the kernel is made anew from the
// moved potentials.
template <class T, class Run>
class GibbsKernel {
  Problem<T, Run>& problem;
  static constexpr int kMostSquarings = 12;
  const bool fits;
  const double last;
  int squared = 0;
  GibbsArgs args{};
  std::unique_ptr<T[]> kernel;  // without a pass that sets it to zero
  std::vector<T> columns, sums;
  std::vector<double> u, next_u, v, next_v, log_v, next_log_v, now;

  bool near_one(const std::vector<double>& factors) const { return problem.run.near_one(factors); }

  // The sums of the columns give the error with v, and the next v; false if that is far from 1.
  bool pass() {
    problem.run.pass(args, problem.kDtype);
    next_v.resize(v.size());
    error = problem.run.columns(args, problem.cloud[1].mass, v, next_v, problem.kDtype);
    return near_one(next_v);
  }

  void make() {
    const int64_t rows = problem.cloud[0].count;
    args = problem.template rows_of_plan<GibbsArgs>(epsilon, false, false);
    args.row = args.scores.kept_row, args.mass = problem.cloud[0].mass;
    if (!kernel) kernel.reset(new T[rows * args.row]);
    columns.assign(args.row, T(0));
    sums.resize((rows + args.task - 1) / args.task * args.row), next_u.resize(rows);
    args.kernel = kernel.get(), args.sums = sums.data();
    problem.run.gibbs(args, problem.kDtype);
  }

  // Prolongs the step of v; false where v is too far from 1 then, and written to the potentials.
  bool prolong(Prolonging& prolonging) {
    const CloudCopy<T>& c = problem.cloud[1];
    now.resize(v.size()), next_log_v = next_v;
    problem.run.log(next_log_v);
    for (size_t j = 0; j < v.size(); ++j) {
      now[j] = c.potential[j] + epsilon * log_v[j];
      next_log_v[j] = c.potential[j] + epsilon * next_log_v[j];
    }
    prolonging.apply(c.mass, now, next_log_v, error);
    now.swap(next_log_v);
    for (size_t j = 0; j < v.size(); ++j) next_log_v[j] = (now[j] - c.potential[j]) / epsilon;
    next_v = next_log_v;
    problem.run.exp(next_v);
    if (near_one(next_v)) {
      log_v.swap(next_log_v);
      return true;
    }
    end();
    problem.cloud[1].potential = now;
    return false;
  }

  // How often the kernel must be squared for a smaller epsilon, 0 if it must be made anew: its
  // errors double each time, which only larger epsilons than the last one may have.
  int squarings_to(double with) const {
    int found = 0;
    if (active && with > last) {
      for (double e = epsilon; e > with; e /= 2) ++found;
      if (std::ldexp(with, found) != epsilon || squared + found > kMostSquarings) found = 0;
    }
    return found;
  }

 public:
  bool active = false;
  double epsilon = 0, error = 0;

  static bool serves(const Problem<T, Run>& problem, const SinkhornOptions& o) {
    const int64_t row = problem.run.padded(problem.cloud[1].count, problem.kDtype);
    for (const CloudCopy<T>& c : problem.cloud) {  // entries are of order 1 / mass
      double total = 0;
      for (int64_t j = 0; j < c.count; ++j) total += c.mass[j];
      if (!(total > 0x1p-30 && total < 0x1p30)) return false;
    }
    return !o.symmetric && !(o.penalty[0] > 0) && !(o.penalty[1] > 0) &&
           problem.cloud[0].count * row * static_cast<int64_t>(sizeof(T)) <= kKeptBytes;
  }
  GibbsKernel(Problem<T, Run>& problem_, const SinkhornOptions& o)
      : problem(problem_), fits(serves(problem_, o)), last(o.epsilon) {}

  // Takes the present potentials, and half an iteration of y; false if they are no good start.
  bool begin(double with) {
    if (!fits) return false;
    const int squarings = squarings_to(with);
    end();
    epsilon = with;
    if (squarings > 0) {
      for (size_t j = 0; j < v.size(); ++j) columns[j] = static_cast<T>(v[j]);
      args.columns = columns.data(), args.factors = u.data(), args.squarings = squarings;
      problem.run.power(args, problem.kDtype);
    } else {
      make();
    }
    squared = squarings > 0 ? squared + squarings : 0;
    u.assign(problem.cloud[0].count, 1.0), v.assign(problem.cloud[1].count, 1.0);
    log_v.assign(v.size(), 0.0);
    args.columns = nullptr, args.factors = u.data();
    return active = pass();
  }

  // An iteration, and half of the next one; false if the potentials of x could not be moved.
  bool step(Prolonging* prolonging) {
    if (prolonging && !prolong(*prolonging)) return false;
    v.swap(next_v);
    for (size_t j = 0; j < v.size(); ++j)
      columns[j] = static_cast<T>(problem.cloud[1].mass[j] * v[j]);
    args.columns = columns.data(), args.factors = next_u.data();
    const bool goes_on = pass(), moved = near_one(next_u);
    if (moved) u.swap(next_u);
    if (!moved || !goes_on) end();
    return moved;
  }

  // Writes the potentials where the problem has them.
  void end() {
    if (!active) return;
    active = false;
    for (size_t i = 0; i < u.size(); ++i) problem.cloud[0].potential[i] += epsilon * std::log(u[i]);
    for (size_t j = 0; j < v.size(); ++j) problem.cloud[1].potential[j] += epsilon * std::log(v[j]);
  }
};

template <class T, class Run>
struct Iteration {
  Problem<T, Run>& problem;
  const SinkhornOptions& o;
  GibbsKernel<T, Run> gibbs{problem, o};
  Prolonging prolonging{};
  int64_t done = 0;
  double error = INFINITY;

  // With a tolerance of 0 all iterations run; after NaN none does.
  bool goes_on(double tolerance) const {
    return tolerance > 0 ? error > tolerance : error == error;
  }

  // Half an iteration of y; returns the error before it.
  double look(double epsilon) {
    if (gibbs.active && gibbs.epsilon == epsilon) return gibbs.error;
    if (gibbs.begin(epsilon)) return gibbs.error;
    return problem.half(1, epsilon, o.penalty[1], 1);
  }
  // Accepts it, and takes half an iteration of x.
  void step(double epsilon) {
    ++done;
    if (gibbs.active) {
      if (gibbs.step(o.accelerated ? &prolonging : nullptr)) return;
    } else {
      CloudCopy<T>& c = problem.cloud[1];
      if (o.accelerated) prolonging.apply(c.mass, c.potential, c.next, error);
      problem.accept(1);
    }
    problem.half(0, epsilon, o.penalty[0], 1);
    problem.accept(0);
  }
  // The error belongs to the potentials before the step, which is not taken if they are the result.
  void alternating() {
    prolonging.memory = kNoStep;
    while (done < o.iterations) {
      error = look(o.epsilon);
      if (!goes_on(o.tolerance)) return;
      step(o.epsilon);
    }
  }
  // A larger epsilon, whose potentials only begin those of the next one.
  void alternating_level(double epsilon) {
    prolonging.memory = kNoStep;
    for (int i = 0; i < kLevelIterations && done < o.iterations; ++i) {
      error = look(epsilon);
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
    gibbs.end();
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
    if (o.symmetric || done == o.iterations) error = look(o.epsilon);
    gibbs.end();
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
  problem.keep_products(GibbsKernel<T, Run>::serves(problem, o) ? 1 : 2);
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
  auto a = problem.template rows_of_plan<PlanProductArgs>(epsilon, true, true);
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
  auto a = problem.template rows_of_plan<PlanDrawArgs>(epsilon, false, true);
  a.uniforms = static_cast<const double*>(data_of(uniforms)) + p * t.n;
  a.out = static_cast<int64_t*>(data_of(out)) + p * t.n;
  run.draw(a, problem.kDtype);
}

}  // namespace pfk
