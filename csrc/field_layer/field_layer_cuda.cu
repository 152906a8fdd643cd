// SPDX-License-Identifier: Apache-2.0
// Bias, gate and activation of a stack of primal and tangents on a GPU.
//
// Lower bound of the time: forward, 2 (1 + K) elements are read and written for each of the primal,
// backward 3 (1 + K).  Where all columns of a row have the same parameters, lanes of a warp add up
// the gradients of a row.  Else torch adds up the gradients of all rows; without a gate, those of
// the bias are the cotangents of p.
#include "core/teams.cuh"
#include "field_layer/field_layer_ops.h"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

struct PlanesDividers {
  Divider columns, repeat, bias, gate;
  explicit PlanesDividers(const PlanesArgs& a)
      : columns(a.columns), repeat(a.repeat), bias(a.bias_period), gate(a.gate_period) {}
};

// The numbers of a parameter for columns from j on of the rows with index `at`.
template <class P, class T>
__device__ P parameter(const PlanesArgs& a, const T* values, const Divider& period, int64_t at,
                       int64_t j) {
  at -= period.quotient(at) * period.divisor;
  if (!a.runs) return P::load(values + at * a.columns + j);
  P p;
  const T value = values[at];
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) p.lanes[l] = value;
  return p;
}
template <class P>
__device__ P ones() {
  P p;
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) p.lanes[l] = 1;
  return p;
}

// A thread has a pack of columns of one row, and all its tangents.
template <int kKind, class T, bool kWide>
__global__ void __launch_bounds__(kThreads, kResident)
    planes_kernel(const PlanesArgs a, const PlanesDividers d) {
  using P = Pack<T, kWide>;
  const int64_t size = a.rows * a.columns;
  int64_t at = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * P::kCount;
  if (at >= size) return;
  const int64_t i = d.columns.quotient(at), j = at - i * a.columns, row = d.repeat.quotient(i);
  const P bias = parameter<P>(a, typed<T>(a.bias), d.bias, row, j);
  P slope = ones<P>();
  if (a.gate) slope = parameter<P>(a, typed<T>(a.gate), d.gate, row, j);
  P v = P::load(typed<T>(a.p) + at);
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) {
    const Curve<T> c = curve_at<kKind>(slope.lanes[l] * v.lanes[l] + bias.lanes[l]);
    v.lanes[l] = c.value;
    slope.lanes[l] *= c.slope;
  }
  v.store_whole(typed<T>(a.h) + at);
  for (int64_t k = 0; k < a.tangents; ++k) {
    at += size;
    v = P::load(typed<T>(a.p) + at);
#pragma unroll
    for (int l = 0; l < P::kCount; ++l) v.lanes[l] *= slope.lanes[l];
    v.store_whole(typed<T>(a.h) + at);
  }
}

// Computes the cotangents of a pack and of its tangents, and the gradients of bias and gate.
template <int kKind, class P, class T>
__device__ void pack_grad(const PlanesArgs& a, const P& bias, const P& gate, int64_t top,
                          P& of_bias, P& of_gate) {
  const int64_t size = a.rows * a.columns;
  const P pre = P::load(typed<T>(a.p) + top);
  LayerVjp<T> v[P::kCount];
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) {
    v[l] = layer_vjp<kKind, T>(pre.lanes[l], bias.lanes[l], gate.lanes[l], a.from_output);
  }
  int64_t at = top;
  for (int64_t k = 0; k < a.tangents; ++k) {
    at += size;
    const P t = P::load(typed<T>(a.p) + at);
    P q = P::load(typed<T>(a.grad) + at);
#pragma unroll
    for (int l = 0; l < P::kCount; ++l) q.lanes[l] = v[l].tangent(t.lanes[l], q.lanes[l]);
    q.store_whole(typed<T>(a.grad_p) + at);
  }
  P q = P::load(typed<T>(a.grad) + top);
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) {
    q.lanes[l] = v[l].primal(pre.lanes[l], q.lanes[l]);
    of_bias.lanes[l] = v[l].crossed;
    of_gate.lanes[l] = v[l].of_gate;
  }
  q.store_whole(typed<T>(a.grad_p) + top);
}

template <int kKind, class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    planes_grad_kernel(const PlanesArgs a, const PlanesDividers d) {
  using P = Pack<T, kWide>;
  const int64_t at = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * P::kCount;
  if (at >= a.rows * a.columns) return;
  const int64_t i = d.columns.quotient(at), j = at - i * a.columns, row = d.repeat.quotient(i);
  const P bias = parameter<P>(a, typed<T>(a.bias), d.bias, row, j);
  P gate = ones<P>(), of_bias, of_gate;
  if (a.gate) gate = parameter<P>(a, typed<T>(a.gate), d.gate, row, j);
  pack_grad<kKind, P, T>(a, bias, gate, at, of_bias, of_gate);
  if (a.grad_bias) of_bias.store_whole(typed<T>(a.grad_bias) + at);
  if (a.grad_gate) of_gate.store_whole(typed<T>(a.grad_gate) + at);
}

// Where all columns of a row have the same parameters, a team of lanes has the row.
template <int kKind, class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    runs_grad_kernel(const PlanesArgs a, const PlanesDividers d, const TeamPlan plan) {
  using P = Pack<T, kWide>;
  const Team<false> t(plan);
  const int64_t row = t.row < plan.rows ? t.row : 0;
  const P bias = parameter<P>(a, typed<T>(a.bias), d.bias, row, 0);
  P gate = ones<P>();
  if (a.gate) gate = parameter<P>(a, typed<T>(a.gate), d.gate, row, 0);
  double bias_sum = 0, gate_sum = 0;
  for (int64_t j = t.begin + t.rank * P::kCount; j < t.end; j += t.size * P::kCount) {
    P of_bias, of_gate;
    pack_grad<kKind, P, T>(a, bias, gate, row * a.columns + j, of_bias, of_gate);
#pragma unroll
    for (int l = 0; l < P::kCount; ++l) {
      bias_sum += of_bias.lanes[l];
      gate_sum += of_gate.lanes[l];
    }
  }
  bias_sum = t.sum(bias_sum, nullptr);
  gate_sum = t.sum(gate_sum, nullptr);
  if (t.rank != 0 || t.row >= plan.rows) return;
  typed<T>(a.grad_bias)[row] = static_cast<T>(bias_sum);
  if (a.gate) typed<T>(a.grad_gate)[row] = static_cast<T>(gate_sum);
}

// ---- launches ----------------------------------------------------------------------------------
// Whether rows consist of whole packs, and all tensors are aligned to packs.
bool in_packs(const PlanesArgs& a, int64_t width) {
  bool packs = a.columns % width == 0;
  for (const void* p :
       {a.p, static_cast<const void*>(a.h), a.grad, static_cast<const void*>(a.grad_p)}) {
    packs = packs && aligned16(p);
  }
  if (a.runs) return packs;
  for (const void* p : {a.bias, a.gate, static_cast<const void*>(a.grad_bias),
                        static_cast<const void*>(a.grad_gate)}) {
    packs = packs && aligned16(p);
  }
  return packs;
}

struct LayerOnCuda {
  static constexpr bool kSums = false;

  template <class T, int kKind, bool kWide>
  static void launch(const PlanesArgs& a, bool backward, cudaStream_t stream) {
    constexpr int width = Pack<T, kWide>::kCount;
    const PlanesDividers d(a);
    const int64_t packs = a.rows * a.columns / width;
    if (!backward) {
      PFK_LAUNCH((planes_kernel<kKind, T, kWide>), grid_for(packs), kThreads, stream, a, d);
    } else if (!a.runs) {
      PFK_LAUNCH((planes_grad_kernel<kKind, T, kWide>), grid_for(packs), kThreads, stream, a, d);
    } else {
      const TeamPlan plan = plan_lanes(a.rows, a.columns, width);
      PFK_LAUNCH((runs_grad_kernel<kKind, T, kWide>), grid_of(blocks_of(plan)), kThreads, stream, a,
                 d, plan);
    }
  }
  template <class T>
  static void run(const Planes& f, bool backward) {
    const DeviceGuard guard(f.p.tensor.get_device_index());
    const cudaStream_t stream = current_stream(f.p.tensor);
    with_kind(f.args.activation, [&](auto kind) {
      if (in_packs(f.args, 16 / sizeof(T))) {
        launch<T, kind.value, true>(f.args, backward, stream);
      } else {
        launch<T, kind.value, false>(f.args, backward, stream);
      }
    });
  }
  static void forward(const Planes& f, DType dtype) {
    dtype == kFloat64 ? run<double>(f, false) : run<float>(f, false);
  }
  static void backward(const Planes& f, DType dtype) {
    dtype == kFloat64 ? run<double>(f, true) : run<float>(f, true);
  }
};

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  using namespace pfk;
  m.impl("field_layer", TORCH_BOX(&layer_forward_op<LayerOnCuda>));
  m.impl("field_layer_", TORCH_BOX(&layer_inplace_op<LayerOnCuda>));
  m.impl("field_layer_backward", TORCH_BOX(&layer_backward_op<LayerOnCuda>));
  m.impl("field_layer_backward_", TORCH_BOX(&layer_backward_inplace_op<LayerOnCuda>));
}
