// SPDX-License-Identifier: Apache-2.0
// Splines on the CPU.
//
// Lower bound of the time, K = 8: 23 raw parameters and x read, y written, 100 bytes an element in
// float32 (200 with the backward pass, which writes as many gradients), that is 0.33 ms for 4096 x
// 32 at 42 GB/s.  Beside it there are 16 exponentials, three logarithms and some 50 other
// operations an element.  Lanes of a vector are elements, whose rows are transposed in registers
// (core/tile.h).
#include "core/rows.h"
#include "core/simd.h"
#include "core/tile.h"
#include "spline/spline_args.h"
#include "spline/spline_kinds.h"

PFK_DECLARE_LEVELS(void spline_tasks(const SplineArgs&, const RowPlan&, double*, DType, int64_t,
                                     int64_t))

PFK_BEGIN

namespace {

constexpr int kMostColumns =
    5 * kMostBins + 2 +
    8;  // softclip has the most; 8 more, because tiles are loaded in blocks of 8

// A tile of Vecs: column c at p + c kLanes.
template <class T>
struct VecTile {
  T* p;
  PFK_HD Vec<T> get(int c) const { return Vec<T>::load(p + c * Vec<T>::kLanes); }
  PFK_HD void put(int c, Vec<T> v) { v.store(p + c * Vec<T>::kLanes); }
};

// The addresses of one Vec of elements; gradients are null in the forward pass.
template <class T>
struct Lanes {
  const T *in, *grad_out, *grad_log;
  T *out, *log_slope;  // backward: out is the gradient of the input
};

template <class T>
using LanesFunction = void (*)(const SplineMap<T>&, T* tile, const Lanes<T>&);

template <int kKind, class C, bool kBackward, class T>
void spline_lanes(const SplineMap<T>& map, T* p, const Lanes<T>& l) {
  using V = Vec<T>;
  const SplineMap<T> m =
      map;  // a copy: the compiler reloads what a reference leads to after every store
  VecTile<T> tile{p};
  const V in = V::load(l.in);
  if constexpr (kBackward) {
    spline_vjp<kKind, C>(m, tile, in, V::load(l.grad_out), V::load(l.grad_log)).store(l.out);
  } else {
    const SplineValue<V> r = spline_apply<kKind, C>(m, tile, in);
    r.out.store(l.out);
    r.log_slope.store(l.log_slope);
  }
}

template <bool kBackward, class T>
LanesFunction<T> lanes_function(const SplineMap<T>& m) {
  switch (m.kind) {
    case kLinearSpline:
      return spline_lanes<kLinearSpline, AnySpline, kBackward, T>;
    case kQuadratic:
      return spline_lanes<kQuadratic, AnySpline, kBackward, T>;
    case kCubic:
      return spline_lanes<kCubic, AnySpline, kBackward, T>;
    default:
      break;
  }
  if (m.bins == 8 && m.parameters == kSoftmax && m.tails == kIdentityTails)
    return spline_lanes<kRational, SplineConfig<8, kSoftmax, kIdentityTails>, kBackward, T>;
  return spline_lanes<kRational, AnySpline, kBackward, T>;
}

// ---- a block of elements -----------------------------------------------------------------------
// Where the elements of a block lie, in x and in each source.
struct Places {
  int64_t x[kRowBlock];
  int64_t raw[3][kRowBlock];
};

template <class S>
struct Work {
  using T = Compute<S>;
  static constexpr int w = Vec<T>::kLanes;
  const SplineArgs& a;
  const SplineMap<T> map;
  LanesFunction<T> run;
  bool flat_x;      // elements of x are contiguous
  int64_t step[3];  // between the rows of a source if they are equally far apart, else 0
  int64_t readable[3];
  alignas(64) T in[kRowBlock + 16], grad_out[kRowBlock + 16], grad_log[kRowBlock + 16];
  alignas(64) T out[kRowBlock + 16], terms[kRowBlock + 16];
  alignas(64) T tile[kMostColumns * w];
  alignas(64) T rows[3 * kMostBins * w + 8 * w];
  Places places;

  Work(const SplineArgs& args, bool backward)
      : a(args), map(spline_map<T>(args.numbers, args.form, args.flags & kSplineInverse)) {
    run = backward ? lanes_function<true, T>(map) : lanes_function<false, T>(map);
    const int64_t rows_of_sample = a.length > 0 ? a.features / a.length : 0;
    flat_x = !a.masked && a.features == a.x_features;
    for (int i = 0; i < a.sources; ++i) {
      const SplineSource& s = a.source[i];
      const int64_t between = a.length == 1 ? s.outer : s.inner;
      const bool even = s.bin == 1 && !(a.masked && a.full) && s.sample == a.features * between &&
                        (a.length == 1 || rows_of_sample == 1 || s.outer == a.length * between);
      step[i] = even ? between : 0;
      readable[i] = ((a.samples * a.features - 1) * between + s.columns);
    }
    for (T& v : in) v = T(0);
    for (T& v : grad_out) v = T(0);
    for (T& v : grad_log) v = T(0);
  }

  // Elements [begin, begin + n) of all.
  void locate(int64_t begin, int n) {
    bool needed = !flat_x;
    for (int i = 0; i < a.sources; ++i) needed |= step[i] == 0;
    if (!needed) return;
    int64_t sample = begin / a.features, e = begin % a.features;
    for (int i = 0; i < n; ++i) {
      const int64_t place = a.masked ? a.index[e] : e;
      const int64_t q = a.full ? place : e, row = q / a.length, at = q - row * a.length;
      places.x[i] =
          sample * a.x_features + (a.masked ? place : a.x_start + row * a.x_outer + at * a.x_inner);
      for (int j = 0; j < a.sources; ++j) {
        const SplineSource& s = a.source[j];
        places.raw[j][i] = sample * s.sample + row * s.outer + at * s.inner;
      }
      if (++e == a.features) e = 0, ++sample;
    }
  }

  void fetch(const void* from, int64_t begin, int n, T* to) {
    const S* p = static_cast<const S*>(from);
    if (flat_x) {
      gather(p + begin, 1, n, to);
    } else {
      for (int i = 0; i < n; ++i) to[i] = widen(p[places.x[i]]);
    }
  }
  void put(const T* from, void* to, int64_t begin, int n) {
    S* p = static_cast<S*>(to);
    if (flat_x) {
      scatter(from, 1, n, p + begin);
    } else {
      for (int i = 0; i < n; ++i) narrow(from[i], p + places.x[i]);
    }
  }

  // ---- a tile: elements [i, i + n) of a block that begins at `begin`
  void load_source(int j, int64_t begin, int i, int n) {
    const SplineSource& s = a.source[j];
    const S* p = static_cast<const S*>(s.raw);
    T* to = tile + s.first * w;
    const int64_t from = begin + i, between = step[j];
    if constexpr (sizeof(S) == sizeof(T)) {
      if (between != 0 && n == w) {
        load_tile(
            p + from * between, [between](int r) { return r * between; }, s.columns,
            readable[j] - from * between, to);
        return;
      }
    }
    if (s.bin == 1) {  // rows, one after the other
      for (int r = 0; r < w; ++r) {
        const int q = r < n ? r : 0;
        const int64_t at = between != 0 ? (from + q) * between : places.raw[j][i + q];
        gather(p + at, 1, s.columns, rows + r * s.columns);
      }
      load_tile(
          rows, [&](int r) { return int64_t{r} * s.columns; }, s.columns, w * s.columns + 8, to);
      return;
    }
    const int64_t* at = places.raw[j] + i;
    const bool side_by_side = at[n - 1] - at[0] == n - 1;
    for (int c = 0; c < s.columns; ++c) {
      if (side_by_side) {
        const Vec<T> v =
            n == w ? load_vec(p + at[0] + c * s.bin) : load_vec_n(p + at[0] + c * s.bin, n);
        v.store(to + c * w);
      } else {
        for (int r = 0; r < w; ++r) to[c * w + r] = widen(p[at[r < n ? r : 0] + c * s.bin]);
      }
    }
  }

  void store_source(int j, int64_t begin, int i, int n) {
    const SplineSource& s = a.source[j];
    S* p = static_cast<S*>(s.grad);
    const T* from = tile + s.first * w;
    const int64_t between = step[j] == 0 ? 0 : s.grad_step != 0 ? s.grad_step : step[j];
    if constexpr (sizeof(S) == sizeof(T)) {
      if (between != 0) {
        store_tile(
            from, [between](int r) { return r * between; }, s.columns, n,
            p + (begin + i) * between);
        return;
      }
    }
    if (s.bin == 1) {
      store_tile(from, [&](int r) { return int64_t{r} * s.columns; }, s.columns, w, rows);
      for (int r = 0; r < n; ++r) {
        const int64_t at = between != 0 ? (begin + i + r) * between : places.raw[j][i + r];
        scatter(rows + r * s.columns, 1, s.columns, p + at);
      }
      return;
    }
    const int64_t* at = places.raw[j] + i;
    const bool side_by_side = n == w && at[w - 1] - at[0] == w - 1;
    for (int c = 0; c < s.columns; ++c) {
      if (side_by_side) {
        store_vec(Vec<T>::load(from + c * w), p + at[0] + c * s.bin);
      } else {
        for (int r = 0; r < n; ++r) narrow(from[c * w + r], p + at[r] + c * s.bin);
      }
    }
  }

  void elements(int64_t begin, int n, bool backward) {
    locate(begin, n);
    fetch(a.in, begin, n, in);
    if (backward) {
      fetch(a.grad_out, begin, n, grad_out);
      const T* gl = static_cast<const T*>(a.grad_log);
      if (a.flags & kSplineElementwise) {
        memcpy(grad_log, gl + begin, n * sizeof(T));
      } else {
        int64_t sample = begin / a.features, e = begin % a.features;
        for (int i = 0; i < n; ++i) {
          grad_log[i] = gl[sample];
          if (++e == a.features) e = 0, ++sample;
        }
      }
    }
    for (int i = 0; i < n; i += w) {
      const int m = n - i < w ? n - i : w;
      for (int j = 0; j < a.sources; ++j) load_source(j, begin, i, m);
      run(map, tile, {in + i, grad_out + i, grad_log + i, out + i, terms + i});
      for (int j = 0; backward && j < a.sources; ++j) store_source(j, begin, i, m);
    }
    put(out, a.out, begin, n);
    if (!backward && a.flags & kSplineElementwise)
      memcpy(static_cast<T*>(a.log_det) + begin, terms, n * sizeof(T));
  }
};

template <class S>
void run_tasks(const SplineArgs& a, const RowPlan& plan, double* partial, int64_t begin,
               int64_t end) {
  using T = Compute<S>;
  const bool backward = a.backward;
  const bool summed = !backward && !(a.flags & kSplineElementwise);
  Work<S> work(a, backward);
  const RowSums<T> sums{static_cast<T*>(a.log_det), partial, 0.0, nullptr};
  for (int64_t task = begin; task < end; ++task) {
    walk_rows(
        plan, task,
        [&](int64_t from, int64_t n) { work.elements(from, static_cast<int>(n), backward); },
        [&](int64_t at, int64_t n) { return summed ? sum_terms(work.terms + at, n) : 0.0; },
        [&](int64_t row, int64_t chunk, double total) {
          if (summed) put_row(plan, sums, row, chunk, total);
        });
  }
}

}  // namespace

void spline_tasks(const SplineArgs& a, const RowPlan& plan, double* partial, DType dtype,
                  int64_t begin, int64_t end) {
  each_dtype(dtype,
             [&](auto element) { run_tasks<decltype(element)>(a, plan, partial, begin, end); });
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "spline/spline_host.h"

namespace pfk {
namespace {

// Copies the elements that are not transformed, before the others are written.  Gradients of
// parameters that were not read become zero.
void copy_passing(const SplineArgs& a, const Tensor& out, int64_t begin, int64_t end) {
  const int64_t size = out.element_size(), sample = a.x_features * size;
  const char* from = static_cast<const char*>(a.backward ? a.grad_out : a.in);
  char* to = static_cast<char*>(a.out);
  for (int64_t n = begin; n < end; ++n) {
    if (a.masked) {
      // without bytes there may be no address
      if (sample > 0) memcpy(to + n * sample, from + n * sample, sample);
      const SplineSource& s = a.source[0];
      if (a.full && a.backward && s.sample > 0)
        memset(static_cast<char*>(s.grad) + n * s.sample * size, 0, s.sample * size);
      continue;
    }
    const int64_t rows = a.channels_last ? a.space : 1;
    const int64_t bytes = a.pass_channels * (a.channels_last ? 1 : a.space) * size;
    const int64_t start = a.pass_start * (a.channels_last ? 1 : a.space) * size;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = n * sample + r * a.channels * size + start;
      if (bytes > 0) memcpy(to + at, from + at, bytes);
    }
  }
}

// Places of the transformed elements, in the order of memory.
std::vector<int32_t> places_of(const SplineArgs& a, const Tensor& mask) {
  const bool* moved = static_cast<const bool*>(mask.const_data_ptr());
  std::vector<int32_t> channels;
  for (int64_t i = 0; i < a.x_features; ++i) {
    const int64_t at = a.channels_last ? i % a.channels * a.space + i / a.channels : i;
    if (moved[at]) channels.push_back(static_cast<int32_t>(i));
  }
  return channels;
}

}  // namespace

static void run_spline_cpu(SplineArgs& a, const Tensor& out, const std::optional<Tensor>& mask) {
  std::vector<int32_t> index;
  if (mask) {
    STD_TORCH_CHECK(a.x_features < (int64_t{1} << 31), "pyflowkern::spline: ", a.x_features,
                    " elements of a sample are too many for a mask");
    index = places_of(a, *mask);
    const int64_t count = static_cast<int64_t>(index.size());
    STD_TORCH_CHECK(a.full || count == a.features, "a mask of ", count,
                    " transformed elements has parameters of ", a.features);
    a.features = count;
    a.index = index.data();
  }
  RowPlan plan = plan_rows(a.samples, a.features);
  constexpr int64_t kTask =
      2048;  // elements of a task: one takes as long as twenty of an affine map
  if (a.features <= kRowBlock) {
    const int64_t rows = kTask / (a.features > 0 ? a.features : 1);
    plan.group = rows > 1 ? rows : 1;
    plan.tasks = (a.samples + plan.group - 1) / plan.group;
  } else {
    plan.chunk = kTask;
    plan.chunks = (a.features + kTask - 1) / kTask;
    plan.tasks = a.samples * plan.chunks;
  }
  if (a.flags & kSplineCoupling) {
    parallel_tasks(a.samples, a.x_features,
                   [&](int64_t begin, int64_t end) { copy_passing(a, out, begin, end); });
  }
  std::vector<double> partial(!a.backward && plan.chunks > 1 ? plan.rows * plan.chunks : 0);
  const DType dtype = dtype_of(out);
  torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(spline_tasks, a, plan, partial.data(), dtype, begin, end);
  });
  if (a.backward || a.flags & kSplineElementwise) return;
  finish_rows(plan, dtype, a.log_det, partial.data());
}

}  // namespace pfk

PFK_REGISTER_SPLINE(CPU, pfk::run_spline_cpu)
#endif
