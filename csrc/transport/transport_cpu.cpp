// SPDX-License-Identifier: Apache-2.0
// Entropic optimal transport on the CPU: the loop of Sinkhorn's iteration over the passes of
// transport_tiles.h and transport_gibbs.h.
//
// Problems of a batch run in parallel, each on one thread; a single problem runs its blocks of rows
// in parallel.  Blocks do not depend on the number of threads, nor do the bits of any result.
#include "transport/transport_gibbs.h"

#include "core/half.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(int64_t transport_panel(DType);
                   void transport_pack(const MatmulArgs&, DType, int64_t, int64_t);
                   void transport_keep(const ScoreArgs&, int64_t, void*, DType, int64_t, int64_t);
                   void transport_softmin(const SoftminArgs&, DType, int64_t, int64_t);
                   void transport_gibbs(const GibbsArgs&, DType, int64_t, int64_t);
                   void transport_power(const GibbsArgs&, DType, int64_t, int64_t);
                   void transport_log(double*, int64_t); void transport_exp(double*, int64_t);
                   void transport_pass(const GibbsArgs&, DType, int64_t, int64_t);
                   double transport_columns(const GibbsArgs&, DType, int64_t, const double*,
                                            const double*, double*, int64_t);
                   bool transport_near_one(const double*, int64_t);
                   void transport_product(const PlanProductArgs&, DType, int64_t, int64_t);
                   void transport_draw(const PlanDrawArgs&, DType, int64_t, int64_t))

PFK_BEGIN

int64_t transport_panel(DType dtype) { return dtype == kFloat64 ? kPanel<double> : kPanel<float>; }

void transport_pack(const MatmulArgs& m, DType dtype, int64_t begin, int64_t end) {
  dtype == kFloat64 ? matmul_pack<double>(m, begin, end) : matmul_pack<float>(m, begin, end);
}

void transport_keep(const ScoreArgs& s, int64_t task, void* to, DType dtype, int64_t begin,
                    int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    dtype == kFloat64 ? keep_block(s, task, block, static_cast<double*>(to))
                      : keep_block(s, task, block, static_cast<float*>(to));
  }
}

void transport_softmin(const SoftminArgs& a, DType dtype, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    dtype == kFloat64 ? softmin_block<double>(a, block) : softmin_block<float>(a, block);
  }
}

void transport_gibbs(const GibbsArgs& a, DType dtype, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    dtype == kFloat64 ? gibbs_block<double>(a, block) : gibbs_block<float>(a, block);
  }
}

void transport_power(const GibbsArgs& a, DType dtype, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    dtype == kFloat64 ? gibbs_power_block<double>(a, block) : gibbs_power_block<float>(a, block);
  }
}

void transport_log(double* x, int64_t n) {
  each_number(x, n, [](Vec<double> v) { return log_(v); });
}
void transport_exp(double* x, int64_t n) {
  each_number(x, n, [](Vec<double> v) { return exp_(v); });
}

void transport_pass(const GibbsArgs& a, DType dtype, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    dtype == kFloat64 ? gibbs_pass_block<double>(a, block) : gibbs_pass_block<float>(a, block);
  }
}

double transport_columns(const GibbsArgs& a, DType dtype, int64_t tasks, const double* mass,
                         const double* v, double* next, int64_t n) {
  return dtype == kFloat64 ? gibbs_columns<double>(a, tasks, mass, v, next, n)
                           : gibbs_columns<float>(a, tasks, mass, v, next, n);
}
bool transport_near_one(const double* factors, int64_t n) { return are_near_one(factors, n); }

void transport_product(const PlanProductArgs& a, DType dtype, int64_t begin, int64_t end) {
  dtype == kFloat64 ? product_blocks<double>(a, begin, end) : product_blocks<float>(a, begin, end);
}

void transport_draw(const PlanDrawArgs& a, DType dtype, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    dtype == kFloat64 ? draw_block<double>(a, block) : draw_block<float>(a, block);
  }
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "transport/transport_solve.h"

namespace pfk {
namespace {

// Runs f over blocks of rows on all threads, or on this one where problems have the threads.
template <class F>
void each_block(bool parallel, int64_t blocks, int64_t work, const F& f) {
  parallel ? parallel_tasks(blocks, work, f) : f(0, blocks);
}

struct OnCpu {
  bool parallel;

  void pack(const MatmulArgs& m, DType dtype) const {
    const int64_t panel = PFK_CALL_LEVEL(transport_panel, dtype);
    each_block(
        parallel, (m.columns + panel - 1) / panel, panel * m.depth,
        [&](int64_t begin, int64_t end) { PFK_CALL_LEVEL(transport_pack, m, dtype, begin, end); });
  }
  int64_t padded(int64_t columns, DType dtype) const {
    const int64_t panel = PFK_CALL_LEVEL(transport_panel, dtype);
    return (columns + panel - 1) / panel * panel;
  }
  template <class Args, class F>
  void rows(const Args& a, const F& f) const {
    each_block(parallel, (a.scores.rows + a.task - 1) / a.task, a.task * a.scores.columns, f);
  }
  void keep(const ScoreArgs& s, void* to, DType dtype) const {
    const int64_t task = matmul_task(s.rows);
    each_block(parallel, (s.rows + task - 1) / task, task * s.columns,
               [&](int64_t begin, int64_t end) {
                 PFK_CALL_LEVEL(transport_keep, s, task, to, dtype, begin, end);
               });
  }
  void softmin(const SoftminArgs& a, DType dtype) const {
    rows(a, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(transport_softmin, a, dtype, begin, end);
    });
  }
  void gibbs(const GibbsArgs& a, DType dtype) const {
    rows(a, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(transport_gibbs, a, dtype, begin, end);
    });
  }
  void power(const GibbsArgs& a, DType dtype) const {
    rows(a, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(transport_power, a, dtype, begin, end);
    });
  }
  void log(std::vector<double>& x) const {
    PFK_CALL_LEVEL(transport_log, x.data(), static_cast<int64_t>(x.size()));
  }
  void exp(std::vector<double>& x) const {
    PFK_CALL_LEVEL(transport_exp, x.data(), static_cast<int64_t>(x.size()));
  }
  void pass(const GibbsArgs& a, DType dtype) const {
    rows(a,
         [&](int64_t begin, int64_t end) { PFK_CALL_LEVEL(transport_pass, a, dtype, begin, end); });
  }
  double columns(const GibbsArgs& a, const double* mass, const std::vector<double>& v,
                 std::vector<double>& next, DType dtype) const {
    const int64_t tasks = (a.scores.rows + a.task - 1) / a.task;
    return PFK_CALL_LEVEL(transport_columns, a, dtype, tasks, mass, v.data(), next.data(),
                          static_cast<int64_t>(v.size()));
  }
  bool near_one(const std::vector<double>& factors) const {
    return PFK_CALL_LEVEL(transport_near_one, factors.data(), static_cast<int64_t>(factors.size()));
  }
  void product(const PlanProductArgs& a, DType dtype) const {
    rows(a, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(transport_product, a, dtype, begin, end);
    });
  }
  void draw(const PlanDrawArgs& a, DType dtype) const {
    rows(a,
         [&](int64_t begin, int64_t end) { PFK_CALL_LEVEL(transport_draw, a, dtype, begin, end); });
  }
};

// Calls f(problem, how it runs): one problem after the other on all threads, or many at once.
template <class F>
void each_problem(int64_t problems, int64_t work, const F& f) {
  constexpr int64_t kAlone = int64_t{1} << 21;  // pairs of a problem that are worth all threads
  if (problems == 1 || work >= kAlone) {
    for (int64_t p = 0; p < problems; ++p) f(p, OnCpu{true});
    return;
  }
  parallel_tasks(problems, work, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p, OnCpu{false});
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(const Tensor& x, const Tensor& y,
                                                            const Tensor& a, const Tensor& b,
                                                            double epsilon, double scale,
                                                            int64_t iterations, double tolerance,
                                                            int64_t schedule, double scaling,
                                                            double penalty_x, double penalty_y) {
  const TransportTensors t(x, y, a, b);
  const SinkhornOptions o = sinkhorn_options(epsilon, scale, iterations, tolerance, schedule,
                                             scaling, penalty_x, penalty_y);
  const SinkhornResults r(t);
  each_problem(t.problems, t.n * t.m, [&](int64_t p, OnCpu run) {
    t.wide ? solve_problem<double>(t, r, o, p, run) : solve_problem<float>(t, r, o, p, run);
  });
  return {r.cost, r.potential[0], r.potential[1], r.error, r.iterations};
}

Tensor plan_product(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                    const Tensor& f, const Tensor& g, const Tensor& matrix, double epsilon,
                    double scale) {
  const TransportTensors t(x, y, a, b);
  const PlanTensors plan(t, f, g);
  const Tensor right = plan_matrix(t, matrix);
  const int64_t width = right.sizes()[2];
  Tensor out = empty(x, {t.problems, t.n, width});
  each_problem(t.problems, t.n * t.m, [&](int64_t p, OnCpu run) {
    t.wide ? multiply_plan<double>(t, plan, right, out, epsilon, scale, p, run)
           : multiply_plan<float>(t, plan, right, out, epsilon, scale, p, run);
  });
  return out;
}

Tensor plan_draw(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                 const Tensor& f, const Tensor& g, const Tensor& uniforms, double epsilon,
                 double scale) {
  const TransportTensors t(x, y, a, b);
  const PlanTensors plan(t, f, g);
  const Tensor u = plan_uniforms(t, uniforms);
  Tensor out = empty(x, {t.problems, t.n}, ScalarType::Long);
  each_problem(t.problems, t.n * t.m, [&](int64_t p, OnCpu run) {
    t.wide ? draw_from_plan<double>(t, plan, u, out, epsilon, scale, p, run)
           : draw_from_plan<float>(t, plan, u, out, epsilon, scale, p, run);
  });
  return out;
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&pfk::sinkhorn));
  m.impl("plan_product", TORCH_BOX(&pfk::plan_product));
  m.impl("plan_draw", TORCH_BOX(&pfk::plan_draw));
}
#endif
