// SPDX-License-Identifier: Apache-2.0
// The normal log-density on the CPU.
//
// Lower bound of the time: forward reads z (4 bytes an element, 12 if each has a mean and a
// log_std), backward reads the same and writes as much.  There is one exponential an element where
// each has a log_std, else only multiplications: memory decides.
//
// Parameters that samples share are copied once a call, in the form in which a block reads them:
// short rows are repeated, and where there is none the mean is 0 and the scale 1.  So one loop
// serves all cases.  The gradient of a shared parameter is summed over groups of rows, one block of
// columns after the other: over up to 1,024 rows in float32, then in double.
#include "density/density.h"

#include "core/half.h"
#include "core/rows.h"
#include "core/simd.h"

namespace pfk {

// What blocks read in place of missing or shared parameters, in the type of the computation.
struct SharedRows {
  void *mean, *scale;  // scale = e^-log_std
  double log_std_sum;
};

// A task of the backward pass is a block of columns of a group of units.  A unit is a row, or as
// many short rows as fill a block.
struct NormalGradPlan {
  int64_t unit, units;    // elements of a unit; units
  int64_t column_blocks;  // of a unit
  int64_t group, groups;  // units of a group; groups
  double* partial;  // [groups, 2, features] in the order of memory; null without shared gradients
};

}  // namespace pfk

PFK_DECLARE_LEVELS(double normal_prepare(const NormalArgs&, const SharedRows&, int64_t, DType);
                   void normal_tasks(const NormalArgs&, const SharedRows&, const RowPlan&, double*,
                                     DType, int64_t, int64_t);
                   void normal_grad_tasks(const NormalArgs&, const SharedRows&,
                                          const NormalGradPlan&, DType, int64_t, int64_t))

PFK_BEGIN

// ---- what samples share ------------------------------------------------------------------------
// Fills `length` elements of each row; returns the sum of the shared log_std of a sample.
template <class T>
static double prepare(const NormalArgs& a, const SharedRows& s, int64_t length) {
  T *mean = static_cast<T*>(s.mean), *scale = static_cast<T*>(s.scale);
  const bool has_mean = a.mean_kind == kEvent, has_std = a.log_std_kind == kEvent;
  const int64_t once = (has_mean || has_std) && a.features < length ? a.features : length;
  for (int64_t i = 0; i < once; ++i) {
    const int64_t at = has_mean || has_std ? a.shared_index(i) : 0;
    mean[i] = has_mean ? static_cast<const T*>(a.mean)[at] : T(0);
    scale[i] = has_std ? static_cast<const T*>(a.log_std)[at] : T(0);
  }
  const double sum = has_std ? sum_terms(scale, once) : 0;
  each_vector<T>(
      once, [&](int64_t i, auto part) { store(exp_(-load(scale + i, part)), scale + i, part); });
  for (int64_t i = once; i < length; ++i) {
    mean[i] = mean[i - once];
    scale[i] = scale[i - once];
  }
  return sum;
}

double normal_prepare(const NormalArgs& a, const SharedRows& s, int64_t length, DType dtype) {
  return dtype == kFloat64 ? prepare<double>(a, s, length) : prepare<float>(a, s, length);
}

// The elements of a block, in the type of the computation.
template <class S>
struct NormalBlock {
  using T = Compute<S>;
  static constexpr bool kDirect = sizeof(S) == sizeof(T);
  alignas(64) T z_buffer[kDirect ? 1 : kRowBlock];
  alignas(64) T mean_buffer[kDirect ? 1 : kRowBlock];
  alignas(64) T std_buffer[kDirect ? 1 : kRowBlock];
  const T *z, *mean, *std;  // std: e^-log_std if it is shared, else log_std

  static const T* fetch(const void* p, int64_t begin, int64_t n, T* buffer) {
    const S* from = static_cast<const S*>(p) + begin;
    if constexpr (kDirect) {
      return from;
    } else {
      gather(from, 1, n, buffer);
      return buffer;
    }
  }

  void read(const NormalArgs& a, const SharedRows& s, int64_t begin, int64_t n) {
    // shared parameters are repeated as rows of a block are, unless a row takes several blocks
    const int64_t at = a.features > kRowBlock ? begin % a.features : 0;
    z = fetch(a.z, begin, n, z_buffer);
    mean = a.mean_kind == kElement ? fetch(a.mean, begin, n, mean_buffer)
                                   : static_cast<const T*>(s.mean) + (a.mean_kind ? at : 0);
    std = a.log_std_kind == kElement ? fetch(a.log_std, begin, n, std_buffer)
                                     : static_cast<const T*>(s.scale) + (a.log_std_kind ? at : 0);
  }
};

template <bool kLogStd, class T, class P>
static PFK_HD Vec<T> inverse_std(const T* p, P part) {
  const Vec<T> v = load(p, part);
  return kLogStd ? exp_(-v) : v;
}

// ---- forward -----------------------------------------------------------------------------------
template <bool kLogStd, class S>
static void normal_task(const NormalArgs& a, const SharedRows& s, const RowPlan& plan,
                        double* partial, int64_t task) {
  using T = Compute<S>;
  using V = Vec<T>;
  alignas(64) T terms[kRowBlock];
  NormalBlock<S> b;
  const RowSums<T> sums{static_cast<T*>(a.out), partial, a.constant - s.log_std_sum,
                        static_cast<const T*>(a.log_det)};
  walk_rows(
      plan, task,
      [&](int64_t begin, int64_t n) {
        b.read(a, s, begin, n);
        each_vector<T>(n, [&](int64_t i, auto part) {
          const V scale = inverse_std<kLogStd>(b.std + i, part);
          V term = normal_term(normal_distance(load(b.z + i, part), load(b.mean + i, part), scale));
          if (kLogStd) term = term - load(b.std + i, part);
          store(term, terms + i, part);
        });
      },
      [&](int64_t at, int64_t n) { return sum_terms(terms + at, n); },
      [&](int64_t row, int64_t chunk, double total) { put_row(plan, sums, row, chunk, total); });
}

// ---- backward ----------------------------------------------------------------------------------
// Gives each of the n elements from `begin` on the value of its row.
template <class T>
static void spread_rows(const T* of_row, int64_t features, int64_t begin, int64_t n, T* to) {
  for (int64_t at = 0, row = begin / features; at < n; ++row) {
    const int64_t m =
        n - at < features ? n - at : features;  // a row, or the block's part of a long one
    for (int64_t i = 0; i < m; ++i) to[at + i] = of_row[row];
    at += m;
  }
}

template <bool kLogStd, class S>
static void normal_grad_task(const NormalArgs& a, const SharedRows& s, const NormalGradPlan& p,
                             int64_t task) {
  using T = Compute<S>;
  using V = Vec<T>;
  constexpr bool kDirect = sizeof(S) == sizeof(T);
  alignas(64) T mean_sum[kRowBlock] = {}, std_sum[kRowBlock] = {}, g[kRowBlock];
  alignas(64) T z_out[kDirect ? 1 : kRowBlock], mean_out[kDirect ? 1 : kRowBlock];
  alignas(64) T std_out[kDirect ? 1 : kRowBlock];
  NormalBlock<S> b;
  const T* grad = static_cast<const T*>(a.grad);
  const int64_t group = task / p.column_blocks, column = task % p.column_blocks * kRowBlock;
  const int64_t total = a.rows * a.features;
  const int64_t last = (group + 1) * p.group < p.units ? (group + 1) * p.group : p.units;
  const bool sums_mean = a.grad_mean != nullptr && a.mean_kind == kEvent;
  const bool sums_std = a.grad_log_std != nullptr && a.log_std_kind == kEvent;
  // where gradients of each element are written: to the tensor, or to a buffer
  auto target = [&](void* p, bool shared, int64_t begin, T* buffer) -> T* {
    if (p == nullptr || shared) return nullptr;
    if constexpr (kDirect) return static_cast<T*>(p) + begin;
    return buffer;
  };
  for (int64_t unit = group * p.group; unit < last; ++unit) {
    const int64_t begin = unit * p.unit + column;
    int64_t n = p.unit - column < kRowBlock ? p.unit - column : kRowBlock;
    if (total - begin < n) n = total - begin;
    b.read(a, s, begin, n);
    T* const z = target(a.grad_z, false, begin, z_out);
    T* const mean = target(a.grad_mean, sums_mean, begin, mean_out);
    T* const std = target(a.grad_log_std, sums_std, begin, std_out);
    spread_rows(grad, a.features, begin, n, g);
    each_vector<T>(n, [&](int64_t i, auto part) {
      const V scale = inverse_std<kLogStd>(b.std + i, part);
      const V d = normal_distance(load(b.z + i, part), load(b.mean + i, part), scale);
      const NormalGrad<V> r = normal_vjp(d, scale, load(g + i, part));
      if (z != nullptr) store(r.z, z + i, part);
      if (mean != nullptr) store(-r.z, mean + i, part);
      if (std != nullptr) store(r.log_std, std + i, part);
      if (sums_mean) store(load(mean_sum + i, part) - r.z, mean_sum + i, part);
      if (sums_std) store(load(std_sum + i, part) + r.log_std, std_sum + i, part);
    });
    if constexpr (!kDirect) {
      if (z != nullptr) scatter(z, 1, n, static_cast<S*>(a.grad_z) + begin);
      if (mean != nullptr) scatter(mean, 1, n, static_cast<S*>(a.grad_mean) + begin);
      if (std != nullptr) scatter(std, 1, n, static_cast<S*>(a.grad_log_std) + begin);
    }
  }
  if (p.partial == nullptr) return;
  double* to = p.partial + group * 2 * a.features;
  const int64_t n = p.unit - column < kRowBlock ? p.unit - column : kRowBlock;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = a.features > kRowBlock ? column + i : i % a.features;
    to[at] += static_cast<double>(mean_sum[i]);
    to[a.features + at] += static_cast<double>(std_sum[i]);
  }
}

// ---- dispatch ----------------------------------------------------------------------------------
void normal_tasks(const NormalArgs& a, const SharedRows& s, const RowPlan& plan, double* partial,
                  DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) {
    using S = decltype(element);
    for (int64_t task = begin; task < end; ++task) {
      a.log_std_kind == kElement ? normal_task<true, S>(a, s, plan, partial, task)
                                 : normal_task<false, S>(a, s, plan, partial, task);
    }
  });
}

void normal_grad_tasks(const NormalArgs& a, const SharedRows& s, const NormalGradPlan& p,
                       DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) {
    using S = decltype(element);
    for (int64_t task = begin; task < end; ++task) {
      a.log_std_kind == kElement ? normal_grad_task<true, S>(a, s, p, task)
                                 : normal_grad_task<false, S>(a, s, p, task);
    }
  });
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "density/density_host.h"

namespace pfk {
namespace {

constexpr int64_t kGroups = 16, kMinGroup = 16, kMaxGroup = 1024;

// Shared rows and their memory.
struct Shared {
  SharedRows rows;
  std::vector<double> memory;

  Shared(const NormalArgs& a, DType dtype) {
    const RowPlan plan = plan_rows(a.rows, a.features);
    const bool shared = a.mean_kind == kEvent || a.log_std_kind == kEvent;
    int64_t length = a.features > kRowBlock && shared ? a.features : plan.block;
    if (a.rows * a.features < length) length = a.rows * a.features;
    memory.resize(2 * length);
    rows.mean = memory.data();
    rows.scale = memory.data() + length;
    rows.log_std_sum = PFK_CALL_LEVEL(normal_prepare, a, rows, length, dtype);
  }
};

Tensor normal_log_prob(const Tensor& z, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& log_std, const std::optional<Tensor>& log_det) {
  NormalTensors t = normal_tensors(z, mean, log_std);
  Tensor out = empty_per_sample(z, t.args.rows);
  const Tensor add = log_det ? dense_sums(*log_det, z) : Tensor();
  t.args.log_det = log_det ? address_of(add) : nullptr;
  t.args.out = out.mutable_data_ptr();
  const NormalArgs& a = t.args;
  const DType dtype = dtype_of(z);
  const Shared shared(a, dtype);
  const RowPlan plan = plan_rows(a.rows, a.features);
  std::vector<double> partial(plan.chunks > 1 ? plan.tasks : 0);
  parallel_tasks(plan.tasks, plan.group * plan.chunk, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(normal_tasks, a, shared.rows, plan, partial.data(), dtype, begin, end);
  });
  finish_rows(plan, dtype, a.out, partial.data(), a.constant - shared.rows.log_std_sum, a.log_det);
  return out;
}

NormalGradPlan plan_grads(const NormalArgs& a) {
  const RowPlan rows = plan_rows(a.rows, a.features);
  NormalGradPlan p{};
  const bool whole_rows = a.features <= kRowBlock;
  p.unit = whole_rows ? rows.block : a.features;
  p.units = p.unit > 0 ? (a.rows * a.features + p.unit - 1) / p.unit : 0;
  p.column_blocks = whole_rows ? 1 : (a.features + kRowBlock - 1) / kRowBlock;
  p.group = (p.units + kGroups - 1) / kGroups;
  p.group = p.group < kMinGroup ? kMinGroup : p.group > kMaxGroup ? kMaxGroup : p.group;
  p.groups = (p.units + p.group - 1) / p.group;
  return p;
}

// Adds up shared gradients over the groups, in order, and writes them where the parameter has them.
template <class T>
void finish_grads(const NormalArgs& a, const NormalGradPlan& p) {
  auto finish = [&](void* to, int64_t which) {
    for (int64_t i = 0; i < a.features; ++i) {
      double sum = 0;
      for (int64_t g = 0; g < p.groups; ++g) sum += p.partial[(2 * g + which) * a.features + i];
      static_cast<T*>(to)[a.shared_index(i)] = static_cast<T>(sum);
    }
  };
  if (a.grad_mean && a.mean_kind == kEvent) finish(a.grad_mean, 0);
  if (a.grad_log_std && a.log_std_kind == kEvent) finish(a.grad_log_std, 1);
}

std::tuple<Tensor, Tensor, Tensor> normal_log_prob_grad(const Tensor& grad, const Tensor& z,
                                                        const std::optional<Tensor>& mean,
                                                        const std::optional<Tensor>& log_std,
                                                        int64_t wanted) {
  NormalTensors t = normal_tensors(z, mean, log_std);
  const NormalGrads grads = normal_grads(t, wanted);
  const Tensor upstream = dense_sums(grad, z);
  t.args.grad = upstream.const_data_ptr();
  const NormalArgs& a = t.args;
  const DType dtype = dtype_of(z);
  const Shared shared(a, dtype);
  NormalGradPlan p = plan_grads(a);
  const bool sums =
      (a.grad_mean && a.mean_kind == kEvent) || (a.grad_log_std && a.log_std_kind == kEvent);
  std::vector<double> partial(sums ? p.groups * 2 * a.features : 0);
  p.partial = sums ? partial.data() : nullptr;
  const int64_t width = p.unit < kRowBlock ? p.unit : kRowBlock;
  parallel_tasks(p.groups * p.column_blocks, p.group * width, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(normal_grad_tasks, a, shared.rows, p, dtype, begin, end);
  });
  dtype == kFloat64 ? finish_grads<double>(a, p) : finish_grads<float>(a, p);
  return {grads.z, grads.mean, grads.log_std};
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("normal_log_prob", TORCH_BOX(&pfk::normal_log_prob));
  m.impl("normal_log_prob_backward", TORCH_BOX(&pfk::normal_log_prob_grad));
}
#endif
