// SPDX-License-Identifier: Apache-2.0
// Runge-Kutta combinations and error norms on the CPU.
//
// Lower bound of the time: a combination reads the state and the slopes and writes one state, or
// two with a fresh slope.  The error reads one state more and writes a number.  There are only
// multiplications and, for the error, one division an element: memory decides.
//
// How elements are cut into tasks does not depend on the number of threads, and squares are summed
// in double: the norm has the same bits for every number of threads.
#include "runge_kutta/runge_kutta.h"

#include "core/rows.h"
#include "core/simd.h"

namespace pfk {

// The tasks of the error: groups of whole rows if these are short, else chunks of segments.
struct RungeKuttaPlan {
  int64_t group;          // rows of a task, 0 for chunks
  int64_t chunks, tasks;  // chunks of a row
  double* partial;        // [rows, chunks]
  double* out;            // [rows]
};

}  // namespace pfk

PFK_DECLARE_LEVELS(void runge_kutta_combine(const RungeKuttaArgs&, bool, int64_t, int64_t);
                   void runge_kutta_error(const RungeKuttaArgs&, const RungeKuttaPlan&, bool,
                                          int64_t, int64_t))

PFK_BEGIN
namespace {

// The weights in the type of the computation.
template <class T>
struct Weights {
  T of[kMaxSlopes], fresh;
  explicit Weights(const RungeKuttaArgs& a) : fresh(static_cast<T>(a.fresh_weight)) {
    for (int j = 0; j < a.count; ++j) of[j] = static_cast<T>(a.weights[j]);
  }
};

// sum_i w_i k_i of kCount vectors from element i on; copies the fresh slope to its row.
template <int kCount, class T, class P>
PFK_HD void weighted(const RungeKuttaArgs& a, const Weights<T>& w, int64_t i, P part,
                     Vec<T> (&sum)[kCount]) {
  using V = Vec<T>;
  for (int u = 0; u < kCount; ++u) sum[u] = V(T(0));
  for (int j = 0; j < a.count; ++j) {
    const T* k = static_cast<const T*>(a.slopes[j]) + i;
    const V weight(w.of[j]);
    for (int u = 0; u < kCount; ++u) sum[u] += weight * load(k + u * V::kLanes, part);
  }
  if (a.fresh == nullptr) return;
  const T* k = static_cast<const T*>(a.fresh) + i;
  T* to = static_cast<T*>(a.kept) + i;
  for (int u = 0; u < kCount; ++u) {
    const V slope = load(k + u * V::kLanes, part);
    store(slope, to + u * V::kLanes, part);
    if (a.fresh_weight != 0) sum[u] += V(w.fresh) * slope;
  }
}

// Calls f(i, change, part) with change = h sum_i w_i k_i for the vectors of [begin, begin + n).
template <class T, class F>
PFK_HD void each_change(const RungeKuttaArgs& a, const Weights<T>& w, const T* h, int64_t begin,
                        int64_t n, F f) {
  using V = Vec<T>;
  constexpr int kUnroll = 4;
  int64_t i = 0;
  for (; i + kUnroll * V::kLanes <= n; i += kUnroll * V::kLanes) {
    V sum[kUnroll];
    weighted<kUnroll>(a, w, begin + i, Full{}, sum);
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * V::kLanes;
      f(at, V::load(h + (a.each_row ? at : 0)) * sum[u], Full{});
    }
  }
  each_vector<T>(n - i, [&](int64_t rest, auto part) {
    V sum[1];
    weighted<1>(a, w, begin + i + rest, part, sum);
    f(i + rest, load(h + (a.each_row ? i + rest : 0), part) * sum[0], part);
  });
}

// Fills in the step of each element of a block, or of one vector where all rows have the same step.
template <class T>
void fill_steps(const RungeKuttaArgs& a, int64_t begin, int64_t n, T* h) {
  if (!a.each_row) {
    for (int i = 0; i < Vec<T>::kLanes; ++i) h[i] = static_cast<T>(a.step_of(0));
    return;
  }
  if (n == 0) return;
  int64_t row = begin / a.features, left = (row + 1) * a.features - begin;
  for (int64_t i = 0; i < n; ++row, left = a.features) {
    const T step = static_cast<T>(a.step_of(row));
    for (const int64_t end = i + left < n ? i + left : n; i < end; ++i) h[i] = step;
  }
}

// ---- combination -------------------------------------------------------------------------------
template <class T>
void combine_task(const RungeKuttaArgs& a, int64_t task) {
  alignas(64) T h[kRowBlock];
  const Weights<T> w(a);
  const T* y = static_cast<const T*>(a.y);
  T* out = static_cast<T*>(a.out);
  const int64_t total = a.rows * a.features, first = task * kRowChunk;
  const int64_t last = first + kRowChunk < total ? first + kRowChunk : total;
  for (int64_t begin = first; begin < last; begin += kRowBlock) {
    const int64_t n = last - begin < kRowBlock ? last - begin : kRowBlock;
    if (begin == first || a.each_row) fill_steps(a, begin, n, h);
    each_change(a, w, h, begin, n, [&](int64_t i, Vec<T> change, auto part) {
      store(load(y + begin + i, part) + change, out + begin + i, part);
    });
  }
}

// ---- error -------------------------------------------------------------------------------------
template <class T>
void error_terms(const RungeKuttaArgs& a, const Weights<T>& w, int64_t begin, int64_t n, T* h,
                 T* terms) {
  using V = Vec<T>;
  const T *y = static_cast<const T*>(a.y) + begin, *y1 = static_cast<const T*>(a.y1) + begin;
  const V rtol(static_cast<T>(a.rtol)), atol(static_cast<T>(a.atol));
  fill_steps(a, begin, n, h);
  each_change(a, w, h, begin, n, [&](int64_t i, V change, auto part) {
    store(runge_kutta_ratio(change, load(y + i, part), load(y1 + i, part), rtol, atol), terms + i,
          part);
  });
}

template <class T>
double sum_squares(const T* terms, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int u = 0; u < 8; ++u) {
      const double r = static_cast<double>(terms[i + u]);
      sums[u] += r * r;
    }
  }
  for (; i < n; ++i) sums[i % 8] += static_cast<double>(terms[i]) * static_cast<double>(terms[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Whole rows, several to a block.
template <class T>
void error_rows(const RungeKuttaArgs& a, const RungeKuttaPlan& p, int64_t task) {
  alignas(64) T h[kRowBlock], terms[kRowBlock];
  const Weights<T> w(a);
  const int64_t in_block = a.features > 0 ? kRowBlock / a.features : p.group;
  const int64_t last = (task + 1) * p.group < a.rows ? (task + 1) * p.group : a.rows;
  for (int64_t row = task * p.group; row < last; row += in_block) {
    const int64_t rows = last - row < in_block ? last - row : in_block;
    error_terms(a, w, row * a.features, rows * a.features, h, terms);
    for (int64_t r = 0; r < rows; ++r) {
      double largest = 0;
      for (int s = 0; s < a.counted; ++s) {
        const int64_t length = a.begins[s + 1] - a.begins[s];
        const double squares = sum_squares(terms + r * a.features + a.begins[s], length);
        largest = runge_kutta_largest(largest, squares, length);
      }
      p.out[row + r] = largest;
    }
  }
}

// A chunk of a segment of a long row.
template <class T>
void error_chunk(const RungeKuttaArgs& a, const RungeKuttaPlan& p, int64_t task) {
  alignas(64) T h[kRowBlock], terms[kRowBlock];
  const Weights<T> w(a);
  const int64_t row = task / p.chunks;
  int64_t chunk = task % p.chunks;
  int s = 0;
  for (; s < a.segments; ++s) {
    const int64_t chunks = (a.begins[s + 1] - a.begins[s] + kRowChunk - 1) / kRowChunk;
    if (chunk < chunks) break;
    chunk -= chunks;
  }
  const int64_t first = a.begins[s] + chunk * kRowChunk;
  const int64_t last = first + kRowChunk < a.begins[s + 1] ? first + kRowChunk : a.begins[s + 1];
  double sum = 0;
  for (int64_t begin = first; begin < last; begin += kRowBlock) {
    const int64_t n = last - begin < kRowBlock ? last - begin : kRowBlock;
    error_terms(a, w, row * a.features + begin, n, h, terms);
    sum += sum_squares(terms, n);
  }
  p.partial[task] = sum;
}

}  // namespace

void runge_kutta_combine(const RungeKuttaArgs& a, bool wide, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    wide ? combine_task<double>(a, task) : combine_task<float>(a, task);
  }
}

void runge_kutta_error(const RungeKuttaArgs& a, const RungeKuttaPlan& p, bool wide, int64_t begin,
                       int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (p.group > 0) {
      wide ? error_rows<double>(a, p, task) : error_rows<float>(a, p, task);
    } else {
      wide ? error_chunk<double>(a, p, task) : error_chunk<float>(a, p, task);
    }
  }
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "runge_kutta/runge_kutta_host.h"

namespace pfk {
namespace {

struct OnCpu {
  static Tensor combine(RungeKuttaTensors& t) {
    Tensor out = empty(t.y, t.y.sizes());
    t.args.out = out.mutable_data_ptr();
    const int64_t total = t.args.rows * t.args.features;
    parallel_tasks((total + kRowChunk - 1) / kRowChunk, kRowChunk, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(runge_kutta_combine, t.args, t.wide, begin, end);
    });
    return out;
  }

  static Tensor error(RungeKuttaTensors& t) {
    const RungeKuttaArgs& a = t.args;
    Tensor out = norms(t);
    RungeKuttaPlan p{0, 0, 0, nullptr, static_cast<double*>(out.mutable_data_ptr())};
    if (a.features <= kRowBlock) {
      p.group = kRowChunk / (a.features > 0 ? a.features : 1);
      p.tasks = (a.rows + p.group - 1) / p.group;
    } else {
      for (int s = 0; s < a.segments; ++s) {
        p.chunks += (a.begins[s + 1] - a.begins[s] + kRowChunk - 1) / kRowChunk;
      }
      p.tasks = a.rows * p.chunks;
    }
    std::vector<double> partial(p.group > 0 ? 0 : p.tasks);
    p.partial = partial.data();
    parallel_tasks(p.tasks, kRowChunk, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(runge_kutta_error, a, p, t.wide, begin, end);
    });
    if (p.group == 0) finish(a, p);
    return out;
  }

  // Adds up the chunks of each segment in order.
  static void finish(const RungeKuttaArgs& a, const RungeKuttaPlan& p) {
    for (int64_t row = 0; row < a.rows; ++row) {
      const double* next = p.partial + row * p.chunks;
      double largest = 0;
      for (int s = 0; s < a.counted; ++s) {
        const int64_t length = a.begins[s + 1] - a.begins[s];
        double squares = 0;
        for (int64_t at = 0; at < length; at += kRowChunk) squares += *next++;
        largest = runge_kutta_largest(largest, squares, length);
      }
      p.out[row] = largest;
    }
  }
};

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) { pfk::implement_runge_kutta<pfk::OnCpu>(m); }
#endif
