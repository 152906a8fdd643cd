// SPDX-License-Identifier: Apache-2.0
// A program for another processor than this one: evaluates elementary functions (core/math_cpu.cpp)
// and the formulas of families on its vectors.
//
//   functors math FUNCTION   reads doubles from stdin, writes float32 results, then float64 results
//   functors families        compares vectors of float32 with scalars of float64, and round trips;
//   fails above limits
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "actnorm/actnorm.h"
#include "affine/affine.h"
#include "density/density.h"
#include "preprocess/preprocess.h"

extern "C" void pyflowkern_math_f32(int, const float*, float*, int64_t);
extern "C" void pyflowkern_math_f64(int, const double*, double*, int64_t);

namespace pfk {
int simd_level() { return 0; }
}  // namespace pfk

namespace {

using namespace pfk;
using V = Vec<float>;
constexpr int kLanes = V::kLanes;
int failures = 0;

// The largest error of one quantity, relative to the larger of one and the value.
struct Worst {
  const char* name;
  int kind;
  double limit, error = 0;

  void add(double got, double wanted) {
    const double e = std::abs(got - wanted) / std::fmax(1, std::abs(wanted));
    if (!(e <= error)) error = e;  // also NaN
  }
  ~Worst() {
    std::printf("%s %d: %.2g of %.2g\n", name, kind, error, limit);
    if (!(error <= limit)) ++failures;
  }
};

std::vector<float> normals(int n, unsigned seed, float spread) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> x(n);
  for (float& v : x) v = normal(engine);
  return x;
}

constexpr int kCount = 4096;

// Scale, log-scale and its slope of one map, and an element there and back.
template <int kKind>
void check_affine() {
  const ScaleNumbers numbers{2.0, 1.0, 0.0, kKind == kSigmoid ? 1e-3 : 0.0, 1.5, 1.0};
  const AffineMap<float> there = affine_map<float>(numbers, 0);
  const AffineMap<float> back = affine_map<float>(numbers, kInverse);
  const AffineMap<double> exact = affine_map<double>(numbers, 0);
  const auto x = normals(kCount, 1, 1), u = normals(kCount, 2, 1), t = normals(kCount, 3, 1);
  // some eight roundings of float32, of values of order one; there and back more
  Worst value{"affine", kKind, 1e-6}, log{"affine log", kKind, 1e-6};
  Worst slope{"affine slope", kKind, 1e-6}, trip{"affine trip", kKind, 4e-6};
  for (int i = 0; i < kCount; i += kLanes) {
    const V a = V::load(&x[i]), raw = V::load(&u[i]), shift = V::load(&t[i]);
    const Scale<V> s = scale_of<kKind>(raw, there), r = scale_of<kKind>(raw, back);
    const V y = affine_apply(a, s.factor, shift, there);
    const V again = affine_apply(y, r.factor, shift, back);
    for (int j = 0; j < kLanes; ++j) {
      const Scale<double> d = scale_of<kKind>(double(u[i + j]), exact);
      value.add(y.v[j], affine_apply(double(x[i + j]), d.factor, double(t[i + j]), exact));
      log.add(s.log_factor.v[j], d.log_factor);
      slope.add(s.slope.v[j], d.slope);
      trip.add(again.v[j], x[i + j]);
    }
  }
}

void check_density() {
  const auto z = normals(kCount, 4, 1), mean = normals(kCount, 5, 1);
  Worst term{"normal", 0, 1e-6}, gradient{"normal gradient", 0, 1e-6};
  for (int i = 0; i < kCount; i += kLanes) {
    const V d = normal_distance(V::load(&z[i]), V::load(&mean[i]), V(0.5f));
    const NormalGrad<V> g = normal_vjp(d, V(0.5f), V(1.0f));
    for (int j = 0; j < kLanes; ++j) {
      const double e = (double(z[i + j]) - double(mean[i + j])) * 0.5;
      term.add(normal_term(d).v[j], -0.5 * e * e);
      gradient.add(g.z.v[j], -0.5 * e);
      gradient.add(g.log_std.v[j], e * e - 1);
    }
  }
}

void check_logit() {
  const auto y = normals(kCount, 6, 3);
  const auto m = logit_map<float>(0.05);
  // near the ends a rounding of x is 2^-24 / 0.05, relative to the distance from them
  Worst inverse{"logit inverse", 0, 1e-6}, trip{"logit trip", 0, 1e-5};
  for (int i = 0; i < kCount; i += kLanes) {
    const V in = V::load(&y[i]), x = logit_inverse(in, m).y, back = logit_forward(odds(x, m)).y;
    for (int j = 0; j < kLanes; ++j) {
      const double p = 1 / (1 + std::exp(-double(y[i + j])));
      inverse.add(x.v[j], (p - 0.05) / 0.9);
      if (std::abs(y[i + j]) < 4) trip.add(back.v[j], y[i + j]);
    }
  }
}

void check_actnorm() {
  const auto x = normals(kCount, 7, 1);
  Worst value{"actnorm", 0, 1e-6}, trip{"actnorm trip", 0, 1e-6};
  for (int i = 0; i < kCount; i += kLanes) {
    const V y = actnorm_apply(V::load(&x[i]), V(1.25f), V(0.5f), false);
    const V back = actnorm_apply(y, V(0.8f), V(0.5f), true);
    for (int j = 0; j < kLanes; ++j) {
      value.add(y.v[j], (double(x[i + j]) + 0.5) * 1.25);
      trip.add(back.v[j], x[i + j]);
    }
  }
}

int families() {
  check_affine<kExp>();
  check_affine<kTanh>();
  check_affine<kAtan>();
  check_affine<kSigmoid>();
  check_affine<kSoftplus>();
  check_affine<kSoftclipScale>();
  check_affine<kSoftplusAsinh>();
  check_affine<kSoftplusTanh>();
  check_density();
  check_logit();
  check_actnorm();
  return failures != 0;
}

int math(int function) {
  std::vector<double> x;
  for (double v; std::fread(&v, sizeof v, 1, stdin) == 1;) x.push_back(v);
  const int64_t n = int64_t(x.size());
  std::vector<float> narrow(x.begin(), x.end()), y(n);
  std::vector<double> z(n);
  pyflowkern_math_f32(function, narrow.data(), y.data(), n);
  pyflowkern_math_f64(function, x.data(), z.data(), n);
  std::fwrite(y.data(), sizeof(float), n, stdout);
  std::fwrite(z.data(), sizeof(double), n, stdout);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::strcmp(arguments[1], "math") == 0) return math(std::atoi(arguments[2]));
  return families();
}
