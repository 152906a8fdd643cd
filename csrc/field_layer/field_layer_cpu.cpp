// SPDX-License-Identifier: Apache-2.0
// Bias, gate and activation of a stack of primal and tangents on the CPU.
//
// Lower bound of the time: forward, 2 (1 + K) elements are read and written for each of the primal
// (in place this takes half the memory), backward 3 (1 + K).  Activations are computed again from
// what was kept.
#include "core/simd.h"
#include "field/field_rows.h"
#include "field_layer/field_layer.h"

PFK_DECLARE_LEVELS(void planes_run(const PlanesArgs&, bool, bool, int64_t, int64_t))

PFK_BEGIN

namespace {

constexpr int64_t kBlock = 1024;  // columns of a block, whose sums stay in L1

// Calls f(row, first column, columns, first row of the task?, offset of bias, offset of gate) for
// the blocks of a task.
template <class F>
PFK_HD void each_block(const PlanesArgs& a, int64_t task, F f) {
  const int64_t groups = (a.unit + a.group - 1) / a.group, unit = task / groups;
  const int64_t begin = task % groups * a.group;
  const int64_t end = begin + a.group < a.unit ? begin + a.group : a.unit;
  const int64_t first = unit * a.unit + begin, last = unit * a.unit + end;
  const int64_t width = a.runs ? 1 : a.columns, at = first / a.repeat;
  // the rows of a task have the same parameters
  const int64_t bias = at % a.bias_period * width, gate = at % a.gate_period * width;
  for (int64_t from = 0; from < a.columns; from += kBlock) {
    const int64_t count = a.columns - from < kBlock ? a.columns - from : kBlock;
    for (int64_t i = first; i < last; ++i) f(i, from, count, i == first, bias, gate);
  }
}

template <bool kRuns, class T>
PFK_HD Vec<T> parameter(const T* values, int64_t offset, int64_t j, int m) {
  return kRuns ? Vec<T>(values[offset]) : get(values + offset + j, m);
}

template <int kKind, bool kRuns, class T>
void planes_forward(const PlanesArgs& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const T* const p = typed<T>(a.p);
  T* const h = typed<T>(a.h);
  const T* const bias = typed<T>(a.bias);
  const T* const gate = typed<T>(a.gate);
  const int64_t size = a.rows * a.columns, columns = a.columns, tangents = a.tangents;
  auto block = [&](int64_t i, int64_t from, int64_t count, bool, int64_t of_bias, int64_t of_gate) {
    each_vector<T>(count, [&](int64_t j, int m) {
      const V b = parameter<kRuns>(bias, of_bias, from + j, m);
      const V g = gate ? parameter<kRuns>(gate, of_gate, from + j, m) : V(T(1));
      int64_t at = i * columns + from + j;
      const Curve<V> c = curve_at<kKind>(g * get(p + at, m) + b);
      put(c.value, h + at, m);
      for (int64_t k = 0; k < tangents; ++k) {
        at += size;
        put(c.slope * (g * get(p + at, m)), h + at, m);
      }
    });
  };
  for (int64_t task = begin; task < end; ++task) each_block(a, task, block);
}

template <int kKind, bool kRuns, class T>
void planes_backward(const PlanesArgs& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const T* const p = typed<T>(a.p);
  const T* const grad = typed<T>(a.grad);
  T* const grad_p = typed<T>(a.grad_p);
  const T* const bias = typed<T>(a.bias);
  const T* const gate = typed<T>(a.gate);
  const int64_t size = a.rows * a.columns, columns = a.columns, tangents = a.tangents;
  const bool from_output = a.from_output;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sums = task * (kRuns ? 1 : columns);
    double bias_sum = 0, gate_sum = 0;  // of a run
    each_block(
        a, task,
        [&](int64_t i, int64_t from, int64_t count, bool first, int64_t of_bias, int64_t of_gate) {
          V run_bias = T(0), run_gate = T(0);
          each_vector<T>(count, [&](int64_t j, int m) {
            const V b = parameter<kRuns>(bias, of_bias, from + j, m);
            const V g = gate ? parameter<kRuns>(gate, of_gate, from + j, m) : V(T(1));
            const int64_t top = i * columns + from + j;
            const V pre = get(p + top, m);
            LayerVjp<V> v = layer_vjp<kKind>(pre, b, g, from_output);
            for (int64_t k = 1; k <= tangents; ++k) {
              const int64_t at = top + k * size;
              put(v.tangent(get(p + at, m), get(grad + at, m)), grad_p + at, m);
            }
            put(v.primal(pre, get(grad + top, m)), grad_p + top, m);
            if (kRuns) {
              run_bias += v.crossed;
              run_gate += v.of_gate;
              return;
            }
            auto add = [&](V value, void* to) {
              T* const sum = typed<T>(to) + sums + from + j;
              put(first ? value : get(sum, m) + value, sum, m);
            };
            add(v.crossed, a.grad_bias);
            if (gate) add(v.of_gate, a.grad_gate);
          });
          bias_sum += sum_lanes(run_bias);
          gate_sum += sum_lanes(run_gate);
        });
    if (!kRuns) continue;
    typed<T>(a.grad_bias)[sums] = static_cast<T>(bias_sum);
    if (gate) typed<T>(a.grad_gate)[sums] = static_cast<T>(gate_sum);
  }
}

template <class T>
void planes(const PlanesArgs& a, bool backward, int64_t begin, int64_t end) {
  using Function = void (*)(const PlanesArgs&, int64_t, int64_t);
  with_kind(a.activation, [&](auto kind) {
    constexpr int k = kind.value;
    static constexpr Function table[2][2] = {
        {planes_forward<k, false, T>, planes_forward<k, true, T>},
        {planes_backward<k, false, T>, planes_backward<k, true, T>}};
    table[backward][a.runs](a, begin, end);
  });
}

}  // namespace

void planes_run(const PlanesArgs& a, bool backward, bool wide, int64_t begin, int64_t end) {
  wide ? planes<double>(a, backward, begin, end) : planes<float>(a, backward, begin, end);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "field_layer/field_layer_ops.h"

namespace pfk {
namespace {

struct LayerOnCpu {
  static constexpr bool kSums = true;
  static void run(const Planes& f, bool backward, DType dtype) {
    const PlanesArgs& a = f.args;
    const bool wide = dtype == kFloat64;
    parallel_tasks(f.tasks(), a.group * a.columns * (1 + a.tangents) * 4,
                   [&](int64_t begin, int64_t end) {
                     PFK_CALL_LEVEL(planes_run, a, backward, wide, begin, end);
                   });
  }
  static void forward(const Planes& f, DType dtype) { run(f, false, dtype); }
  static void backward(const Planes& f, DType dtype) { run(f, true, dtype); }
};

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  using namespace pfk;
  m.impl("field_layer", TORCH_BOX(&layer_forward_op<LayerOnCpu>));
  m.impl("field_layer_", TORCH_BOX(&layer_inplace_op<LayerOnCpu>));
  m.impl("field_layer_backward", TORCH_BOX(&layer_backward_op<LayerOnCpu>));
  m.impl("field_layer_backward_", TORCH_BOX(&layer_backward_inplace_op<LayerOnCpu>));
}
#endif
