// SPDX-License-Identifier: Apache-2.0
// Parameters of a field's layers at a time, on the CPU.
//
// These are a few hundred numbers: the cost is that of a call.  It is one call and one node of
// autograd's graph in place of the dozen of plain PyTorch.
#include "field_time/field_time.h"

#include "core/simd.h"
#include "field/field_rows.h"

PFK_DECLARE_LEVELS(void time_run(const TimeArgs&, bool, bool))

PFK_BEGIN

namespace {

template <class T>
TimeRows<Vec<T>> time_rows(const TimeLayer& y, int64_t j, int m) {
  const T* p = typed<T>(y.rows) + j;
  return {get(p, m), get(p + y.size, m), get(p + 2 * y.size, m)};
}

template <class T>
void time_forward_layer(const TimeLayer& y, T time, bool squash) {
  using V = Vec<T>;
  each_vector<T>(y.size, [&](int64_t j, int m) {
    const V bias = get(typed<T>(y.bias) + j, m);
    if (!squash) {
      const V row = get(typed<T>(y.rows) + j, m);
      put(shifted_bias(V(time), row, bias), typed<T>(y.to_bias) + j, m);
      return;
    }
    const TimeRows<V> rows = time_rows<T>(y, j, m);
    const V gate = time_gate(V(time), rows);
    put(gate, typed<T>(y.to_gate) + j, m);
    put(time_bias(V(time), rows, gate, bias), typed<T>(y.to_bias) + j, m);
  });
}

// Returns what the layer adds to the gradient of the time.
template <class T>
double time_backward_layer(const TimeLayer& y, T time, bool squash) {
  using V = Vec<T>;
  double total = 0;
  each_vector<T>(y.size, [&](int64_t j, int m) {
    const V grad = get(typed<T>(y.grad_bias) + j, m);
    T* const rows = typed<T>(y.of_rows) + j;
    if (!squash) {
      const ShiftVjp<V> v(V(time), get(typed<T>(y.rows) + j, m), grad);
      put(v.of_bias, typed<T>(y.of_bias) + j, m);
      put(v.of_row, rows, m);
      total += sum_lanes(v.of_time);
      return;
    }
    const V bias = get(typed<T>(y.bias) + j, m);
    const TimeVjp<V> v(V(time), time_rows<T>(y, j, m), bias, get(typed<T>(y.grad_gate) + j, m),
                       grad);
    put(v.of_bias, typed<T>(y.of_bias) + j, m);
    put(v.rows.u, rows, m);
    put(v.rows.c, rows + y.size, m);
    put(v.rows.v, rows + 2 * y.size, m);
    // lanes beyond the end hold zeros, which an infinite time would turn into NaN
    for (int l = 0; m < V::kLanes && l < m; ++l) total += static_cast<double>(v.of_time.v[l]);
    if (m == V::kLanes) total += sum_lanes(v.of_time);
  });
  return total;
}

template <class T>
void time_layers(const TimeArgs& a, bool backward) {
  const T time = *typed<T>(a.time);
  double total = 0;
  for (int l = 0; l < a.count; ++l) {
    if (backward) {
      total += time_backward_layer<T>(a.layer[l], time, a.squash);
    } else {
      time_forward_layer<T>(a.layer[l], time, a.squash);
    }
  }
  if (backward) *typed<T>(a.of_time) = static_cast<T>(total);
}

}  // namespace

void time_run(const TimeArgs& a, bool backward, bool wide) {
  wide ? time_layers<double>(a, backward) : time_layers<float>(a, backward);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "field_time/field_time_ops.h"

namespace pfk {
namespace {

struct TimeOnCpu {
  static void run(const TimeArgs& a, const Tensor& time, bool backward) {
    PFK_CALL_LEVEL(time_run, a, backward, is_wide(time));
  }
};

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  using namespace pfk;
  m.impl("field_time", TORCH_BOX(&time_forward<TimeOnCpu>));
  m.impl("field_time_backward", TORCH_BOX(&time_backward<TimeOnCpu>));
}
#endif
