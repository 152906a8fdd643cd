// SPDX-License-Identifier: Apache-2.0
// Entropic optimal transport on a GPU: launches.
//
// Lower bound of the time of half an iteration: n m (2 d + 4) operations over the float32 rate, and
// n m 1.25 powers of two over that of the special functions; memory plays no part.  The host waits
// for nothing: all iterations are launched, and the blocks of problems that are solved return at
// once.  Not measured yet.
#include "transport/transport_control.cuh"
#include "transport/transport_plan.cuh"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

// The memory of a call, and launches over it.
struct DeviceTransport {
  const TransportTensors& t;
  DeviceProblems d;
  cudaStream_t stream;
  std::vector<Tensor> memory;

  DeviceTransport(const TransportTensors& t_, const SinkhornOptions& o)
      : t(t_), d{}, stream(current_stream(t_.points[0])) {
    d.problems = t.problems, d.depth = t.depth, d.scale = o.scale, d.o = o;
    d.direct = t.depth <= kDirectDepth;
    d.state = static_cast<ProblemState*>(room(t.problems * sizeof(ProblemState)));
    const int64_t size = t.wide ? 8 : 4;
    for (int side = 0; side < 2; ++side) {
      DeviceCloud& c = d.cloud[side];
      c.count = t.count(side);
      c.given = t.points[side].const_data_ptr();
      c.mass = static_cast<const double*>(t.mass[side].const_data_ptr());
      const int64_t all = t.problems * c.count;
      c.points = room(all * t.depth * size), c.weights = room(all * size);
      c.mean = doubles(t.problems * t.depth);
      c.squares = doubles(all), c.log_mass = doubles(all), c.origin = doubles(all);
      c.potential = doubles(all), c.next = doubles(all);
      if (o.accelerated && side == 1) c.last = doubles(all), c.step = doubles(all);
      c.blocks = (c.count + kTile - 1) / kTile;
      c.errors = doubles(t.problems * c.blocks);
    }
  }
  // From torch's allocator, which reuses memory in stream order.
  void* room(int64_t bytes) {
    memory.push_back(empty(t.points[0], {(bytes + 7) / 8}, ScalarType::Double));
    return memory.back().mutable_data_ptr();
  }
  double* doubles(int64_t count) { return static_cast<double*>(room(count * 8)); }

  template <class F>
  void each_type(F f) const {
    t.wide ? f(double{}) : f(float{});
  }

  void begin(const double* f, const double* g) {
    each_type([&](auto type) {
      using T = decltype(type);
      PFK_LAUNCH(mean_kernel<T>, grid_of(2 * t.problems), kThreads, stream, d);
      PFK_LAUNCH(state_kernel<T>, grid_of(t.problems), kThreads, stream, d);
      for (int side = 0; side < 2; ++side) {
        PFK_LAUNCH(centre_kernel<T>, grid_for(t.problems * t.count(side)), kThreads, stream, d,
                   side, side == 0 ? f : g);
      }
    });
  }
  void weights(int side, bool accept, bool all = false) {
    each_type([&](auto type) {
      PFK_LAUNCH(weights_kernel<decltype(type)>, grid_for(t.problems * t.count(side)), kThreads,
                 stream, d, side, accept, all);
    });
  }
  void softmin(int side, double blend, bool all = false) {
    const unsigned grid = grid_of(t.problems * d.cloud[side].blocks);
    each_type([&](auto type) {
      using T = decltype(type);
      if (d.direct) {
        PFK_LAUNCH((softmin_kernel<T, true>), grid, kThreads, stream, d, side, blend, all);
      } else {
        PFK_LAUNCH((softmin_kernel<T, false>), grid, kThreads, stream, d, side, blend, all);
      }
    });
  }
  void check(CheckKind kind) {
    PFK_LAUNCH(check_kernel, grid_of(t.problems), kThreads, stream, d, static_cast<int>(kind));
  }
  void next_epsilon(bool last) {
    if (d.o.scaling > 0)
      PFK_LAUNCH(epsilon_kernel, grid_for(t.problems), kThreads, stream, d, last);
  }

  void alternating() {
    weights(0, false);
    for (int64_t i = 0; i < d.o.iterations; ++i) {
      softmin(1, 1);
      check(kCheckOne);
      if (d.o.accelerated) PFK_LAUNCH(prolong_kernel, grid_of(t.problems), kThreads, stream, d);
      weights(1, true);
      softmin(0, 1);
      next_epsilon(false);
      weights(0, true);
    }
  }
  void whole_step() {
    softmin(0, 1, true), softmin(1, 1, true);
    weights(0, true, true), weights(1, true, true);
  }
  void symmetric() {
    weights(0, false), weights(1, false);
    whole_step();
    for (int64_t i = 0; i < d.o.iterations; ++i) {
      softmin(0, 0.5), softmin(1, 0.5);
      check(kCheckBoth);
      next_epsilon(false);
      weights(0, true), weights(1, true);
    }
    next_epsilon(true);
    weights(0, false), weights(1, false);
    whole_step();
  }
  void solve() {
    begin(nullptr, nullptr);
    d.o.symmetric ? symmetric() : alternating();
    next_epsilon(true);
    if (!d.o.symmetric && d.o.scaling > 0) {  // see finish() in transport_solve.h
      weights(1, false);
      softmin(0, 1);
      weights(0, true);
    } else {
      weights(0, false);
    }
    softmin(1, 1, d.o.symmetric);
    check(kOnlyError);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_cuda(
    const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, double epsilon,
    double scale, int64_t iterations, double tolerance, int64_t schedule, double scaling,
    double penalty_x, double penalty_y) {
  const DeviceGuard guard(x.get_device_index());
  const TransportTensors t(x, y, a, b);
  const SinkhornOptions o = sinkhorn_options(epsilon, scale, iterations, tolerance, schedule,
                                             scaling, penalty_x, penalty_y);
  const SinkhornResults r(t);
  if (t.problems > 0) {
    DeviceTransport run(t, o);
    run.solve();
    PFK_LAUNCH(cost_kernel, grid_of(t.problems), kThreads, run.stream, run.d,
               static_cast<double*>(data_of(r.cost)), static_cast<double*>(data_of(r.error)),
               static_cast<int64_t*>(data_of(r.iterations)));
    for (int side = 0; side < 2; ++side) {
      PFK_LAUNCH(potential_kernel, grid_for(t.problems * t.count(side)), kThreads, run.stream,
                 run.d, side, static_cast<double*>(data_of(r.potential[side])));
    }
  }
  return {r.cost, r.potential[0], r.potential[1], r.error, r.iterations};
}

// The state of a plan whose potentials are given.
struct DevicePlan : DeviceTransport {
  PlanTensors plan;
  DevicePlan(const TransportTensors& t_, const Tensor& f, const Tensor& g, double epsilon,
             double scale)
      : DeviceTransport(t_, SinkhornOptions{epsilon, scale, 0, 0, 0, {0, 0}, false, false}),
        plan(t_, f, g) {
    if (t.problems == 0) return;
    begin(static_cast<const double*>(plan.potential[0].const_data_ptr()),
          static_cast<const double*>(plan.potential[1].const_data_ptr()));
    PFK_LAUNCH(balance_kernel, grid_of(t.problems), kThreads, stream, d);
    weights(1, false);
  }
};

Tensor plan_product_cuda(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                         const Tensor& f, const Tensor& g, const Tensor& matrix, double epsilon,
                         double scale) {
  const DeviceGuard guard(x.get_device_index());
  const TransportTensors t(x, y, a, b);
  const Tensor right = plan_matrix(t, matrix);
  const int64_t width = right.sizes()[2], parts = (width + kTile - 1) / kTile;
  Tensor out = empty(x, {t.problems, t.n, width});
  if (t.problems == 0 || width == 0) return out;
  DevicePlan run(t, f, g, epsilon, scale);
  const unsigned grid = grid_of(t.problems * run.d.cloud[0].blocks * parts);
  run.each_type([&](auto type) {
    using T = decltype(type);
    const PlanMatrix<T> m{static_cast<const T*>(right.const_data_ptr()),
                          static_cast<T*>(data_of(out)), width, parts};
    if (run.d.direct) {
      PFK_LAUNCH((product_kernel<T, true>), grid, kThreads, run.stream, run.d, m);
    } else {
      PFK_LAUNCH((product_kernel<T, false>), grid, kThreads, run.stream, run.d, m);
    }
  });
  return out;
}

Tensor plan_draw_cuda(const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b,
                      const Tensor& f, const Tensor& g, const Tensor& uniforms, double epsilon,
                      double scale) {
  const DeviceGuard guard(x.get_device_index());
  const TransportTensors t(x, y, a, b);
  const Tensor u = plan_uniforms(t, uniforms);
  Tensor out = empty(x, {t.problems, t.n}, ScalarType::Long);
  if (t.problems == 0) return out;
  DevicePlan run(t, f, g, epsilon, scale);
  run.each_type([&](auto type) {
    PFK_LAUNCH(draw_kernel<decltype(type)>, grid_of(t.problems * t.n), kThreads, run.stream, run.d,
               static_cast<const double*>(u.const_data_ptr()), static_cast<int64_t*>(data_of(out)));
  });
  return out;
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("sinkhorn", TORCH_BOX(&pfk::sinkhorn_cuda));
  m.impl("plan_product", TORCH_BOX(&pfk::plan_product_cuda));
  m.impl("plan_draw", TORCH_BOX(&pfk::plan_draw_cuda));
}
