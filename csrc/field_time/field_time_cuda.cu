// SPDX-License-Identifier: Apache-2.0
// Parameters of a field's layers at a time, on a GPU.
//
// These are a few hundred numbers: the cost is that of a launch.  In the backward pass one block
// has all layers, so that the gradient of the time is a sum in a fixed order.
#include "core/cuda.cuh"
#include "field_time/field_time_ops.h"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

template <class T>
__device__ TimeRows<T> time_rows(const TimeLayer& y, int64_t j) {
  const T* p = static_cast<const T*>(y.rows) + j;
  return {p[0], p[y.size], p[2 * y.size]};
}

template <class T>
__global__ void __launch_bounds__(kThreads) time_kernel(const TimeArgs a) {
  const TimeLayer& y = a.layer[blockIdx.y];
  const int64_t j = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (j >= y.size) return;
  const T time = *static_cast<const T*>(a.time), bias = static_cast<const T*>(y.bias)[j];
  T* const to = static_cast<T*>(y.to_bias) + j;
  if (!a.squash) {
    *to = shifted_bias(time, static_cast<const T*>(y.rows)[j], bias);
    return;
  }
  const TimeRows<T> rows = time_rows<T>(y, j);
  const T gate = time_gate(time, rows);
  static_cast<T*>(y.to_gate)[j] = gate;
  *to = time_bias(time, rows, gate, bias);
}

template <class T>
__global__ void __launch_bounds__(kThreads) time_grad_kernel(const TimeArgs a) {
  __shared__ double scratch[kThreads / 32];
  const T time = *static_cast<const T*>(a.time);
  double total = 0;
  for (int l = 0; l < a.count; ++l) {
    const TimeLayer& y = a.layer[l];
    for (int64_t j = threadIdx.x; j < y.size; j += kThreads) {
      const T grad = static_cast<const T*>(y.grad_bias)[j];
      T* const bias = static_cast<T*>(y.of_bias) + j;
      T* const rows = static_cast<T*>(y.of_rows) + j;
      if (!a.squash) {
        const ShiftVjp<T> v(time, static_cast<const T*>(y.rows)[j], grad);
        *bias = v.of_bias;
        rows[0] = v.of_row;
        total += v.of_time;
        continue;
      }
      const TimeVjp<T> v(time, time_rows<T>(y, j), static_cast<const T*>(y.bias)[j],
                         static_cast<const T*>(y.grad_gate)[j], grad);
      *bias = v.of_bias;
      rows[0] = v.rows.u;
      rows[y.size] = v.rows.c;
      rows[2 * y.size] = v.rows.v;
      total += v.of_time;
    }
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) *static_cast<T*>(a.of_time) = static_cast<T>(total);
}

struct TimeOnCuda {
  template <class T>
  static void launch(const TimeArgs& a, const Tensor& time, bool backward) {
    const DeviceGuard guard(time.get_device_index());
    const cudaStream_t stream = current_stream(time);
    if (backward) {
      PFK_LAUNCH(time_grad_kernel<T>, dim3(1), kThreads, stream, a);
      return;
    }
    int64_t most = 1;
    for (int l = 0; l < a.count; ++l) most = a.layer[l].size > most ? a.layer[l].size : most;
    const dim3 grid(static_cast<unsigned>((most + kThreads - 1) / kThreads),
                    static_cast<unsigned>(a.count));
    PFK_LAUNCH(time_kernel<T>, grid, kThreads, stream, a);
  }
  static void run(const TimeArgs& a, const Tensor& time, bool backward) {
    is_wide(time) ? launch<double>(a, time, backward) : launch<float>(a, time, backward);
  }
};

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  using namespace pfk;
  m.impl("field_time", TORCH_BOX(&time_forward<TimeOnCuda>));
  m.impl("field_time_backward", TORCH_BOX(&time_backward<TimeOnCuda>));
}
