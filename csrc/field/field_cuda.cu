// SPDX-License-Identifier: Apache-2.0
// Vector fields with their divergence on a GPU.  The forward pass of fields of narrow layers is one
// launch (field_fused.cuh).  Everything else is made of torch's matrix products of all stacked rows
// and of elementwise kernels between them.
//
// Lower bound of the time of such a kernel: forward, products are read and activations written,
// 8 (1 + K) bytes an element of [samples, out]; backward, products and cotangents are read,
// activations and new cotangents written, 16 (1 + K) bytes.
#include "core/teams.cuh"
#include "field/field_exact.h"
#include "field/field_fused.cuh"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

__device__ int64_t thread_index() {
  return blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
}

// ---- a layer -----------------------------------------------------------------------------------
// A thread has a pack of columns of one sample, and all its tangents.
template <int kKind, class T, bool kWide>
__global__ void __launch_bounds__(kThreads, kResident)
    layer_kernel(const LayerArgs a, const Divider columns, bool restore) {
  using P = Pack<T, kWide>;
  const int64_t flat = thread_index() * P::kCount;
  if (flat >= a.samples * a.columns) return;
  const int64_t i = columns.quotient(flat), j = flat - i * a.columns, at = i * a.stride + j;
  const P bias = P::load(typed<T>(a.bias) + i * a.bias_step + j);
  const P pre = P::load(typed<T>(a.p) + at);
  P gate, value, slope;
  if (a.gate) gate = P::load(typed<T>(a.gate) + i * a.gate_step + j);
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) {
    const T g = a.gate ? gate.lanes[l] : T(1);
    const Curve<T> c =
        curve_of_kept<kKind, T>(pre.lanes[l], bias.lanes[l], g, restore && a.value_kept);
    value.lanes[l] = c.value;
    slope.lanes[l] = c.slope * g;
  }
  if (a.value_kept && !restore) value.store_whole(typed<T>(a.p) + at);
  value.store_whole(typed<T>(a.s) + at);
  for (int64_t k = 0; k < a.probes; ++k) {
    P t = P::load(typed<T>(a.tangents) + (k * a.samples + i) * a.tangent_step + j);
#pragma unroll
    for (int l = 0; l < P::kCount; ++l) t.lanes[l] *= slope.lanes[l];
    t.store_whole(typed<T>(a.s) + (k + 1) * a.samples * a.stride + at);
  }
}

template <int kKind, class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    layer_grad_kernel(const LayerArgs a, const Divider columns) {
  using P = Pack<T, kWide>;
  const int64_t flat = thread_index() * P::kCount;
  if (flat >= a.samples * a.columns) return;
  const int64_t i = columns.quotient(flat), j = flat - i * a.columns, at = i * a.stride + j;
  const P bias = P::load(typed<T>(a.bias) + i * a.bias_step + j);
  const P pre = P::load(typed<T>(a.p) + at);
  P gate, value;
  LayerVjp<T> v[P::kCount];
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) gate.lanes[l] = T(1);
  if (a.gate) gate = P::load(typed<T>(a.gate) + i * a.gate_step + j);
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) {
    const T g = gate.lanes[l];
    const Curve<T> c = curve_of_kept<kKind, T>(pre.lanes[l], bias.lanes[l], g, a.value_kept);
    value.lanes[l] = c.value;
    v[l] = LayerVjp<T>(c, g);
  }
  value.store_whole(typed<T>(a.s) + at);
  for (int64_t k = 0; k < a.probes; ++k) {
    const int64_t row = (k + 1) * a.samples * a.stride + at;
    P t = P::load(typed<T>(a.tangents) + (k * a.samples + i) * a.tangent_step + j);
    P q = P::load(typed<T>(a.grad) + row);
#pragma unroll
    for (int l = 0; l < P::kCount; ++l) {
      q.lanes[l] = v[l].tangent(t.lanes[l], q.lanes[l]);
      t.lanes[l] = v[l].slope * (v[l].gate * t.lanes[l]);
    }
    q.store_whole(typed<T>(a.grad) + row);
    t.store_whole(typed<T>(a.s) + row);
  }
  P q = P::load(typed<T>(a.grad) + at), of_bias, of_gate;
#pragma unroll
  for (int l = 0; l < P::kCount; ++l) {
    q.lanes[l] = v[l].primal(pre.lanes[l], q.lanes[l]);
    of_bias.lanes[l] = v[l].crossed;
    of_gate.lanes[l] = v[l].of_gate;
  }
  q.store_whole(typed<T>(a.grad) + at);
  if (a.grad_bias) of_bias.store_whole(typed<T>(a.grad_bias) + i * a.grad_bias_step + j);
  if (a.grad_gate) of_gate.store_whole(typed<T>(a.grad_gate) + i * a.grad_gate_step + j);
}

// ---- input and output --------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads)
    stack_kernel(const StackArgs a, const Divider features, const Divider samples) {
  const int64_t flat = thread_index(), size = a.samples * a.features;
  if (flat >= (1 + a.probes) * size) return;
  const int64_t row = features.quotient(flat), j = flat - row * a.features;
  const int64_t k = samples.quotient(row) - 1, n = row - (k + 1) * a.samples;
  T v;
  if (k < 0) {
    v = typed<T>(a.x)[flat];
  } else if (a.probe.data) {
    v = typed<T>(a.probe.data)[k * a.probe.step_probe + n * a.probe.step_sample + j];
  } else {
    const int64_t i = flat - size;
    const PhiloxBlock<uint32_t> b =
        philox_block(static_cast<uint64_t>(i / kSignBits), static_cast<uint64_t>(*a.probe.seed));
    v = static_cast<T>(sign_of(b, static_cast<int>(i % kSignBits)));
  }
  typed<T>(a.s)[flat] = v;
}

// A team of lanes has a sample.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    output_kernel(const OutputArgs a, const TeamPlan plan) {
  const Team<false> t(plan);
  const int64_t i = t.row;
  for (int64_t j = t.begin + t.rank; j < t.end; j += t.size) {
    const T g = a.gate ? typed<T>(a.gate)[i * a.gate_step + j] : T(1);
    typed<T>(a.y)[i * a.features + j] =
        g * typed<T>(a.p)[i * a.stride + j] + typed<T>(a.bias)[i * a.bias_step + j];
  }
  for (int64_t k = 0; k < a.probes; ++k) {
    double trace = 0, norm = 0;
    for (int64_t j = t.begin + t.rank; j < t.end; j += t.size) {
      const int64_t at = ((k + 1) * a.samples + i) * a.stride + j;
      const T g = a.gate ? typed<T>(a.gate)[i * a.gate_step + j] : T(1);
      const T je = g * typed<T>(a.p)[at];
      trace += je * typed<T>(a.e)[at];
      norm += je * je;
    }
    trace = t.sum(trace, nullptr);
    norm = t.sum(norm, nullptr);
    if (t.rank != 0 || i >= plan.rows) continue;
    typed<T>(a.trace)[k * a.trace_step + i] = static_cast<T>(trace);
    if (a.norm) typed<T>(a.norm)[k * a.trace_step + i] = static_cast<T>(norm);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    output_grad_kernel(const OutputArgs a, const Divider features) {
  const int64_t flat = thread_index();
  if (flat >= a.samples * a.features) return;
  const int64_t i = features.quotient(flat), j = flat - i * a.features, first = i * a.stride + j;
  const T g = a.gate ? typed<T>(a.gate)[i * a.gate_step + j] : T(1);
  const T q = a.grad_y ? typed<T>(a.grad_y)[flat] : T(0);
  T of_gate = a.gate ? q * typed<T>(a.p)[first] : T(0);
  typed<T>(a.grad)[first] = g * q;
  for (int64_t k = 0; k < a.probes; ++k) {
    const int64_t at = (k + 1) * a.samples * a.stride + first, scalar = k * a.trace_step + i;
    T t = T(0);
    if (a.grad_trace) t = typed<T>(a.grad_trace)[scalar] * typed<T>(a.e)[at];
    if (a.grad_norm) t += T(2) * typed<T>(a.grad_norm)[scalar] * (g * typed<T>(a.p)[at]);
    if (a.gate) of_gate += t * typed<T>(a.p)[at];
    typed<T>(a.grad)[at] = g * t;
  }
  if (a.grad_bias) typed<T>(a.grad_bias)[i * a.grad_bias_step + j] = q;
  if (a.grad_gate) typed<T>(a.grad_gate)[i * a.grad_gate_step + j] = of_gate;
}

// ---- rows of products --------------------------------------------------------------------------
template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, kResident)
    row_dot_kernel(const RowDotArgs a, const TeamPlan plan) {
  __shared__ double scratch[2][kThreads / 32];
  const Team<kBlock> t(plan);
  const int64_t start = t.row * plan.features;
  double trace = 0, norm = 0;
  for (int64_t j = t.begin + t.rank; j < t.end; j += t.size) {
    const T v = typed<T>(a.b)[start + j];
    trace += typed<T>(a.a)[start + j] * v;
    norm += v * v;
  }
  trace = t.sum(trace, scratch[0]);
  norm = t.sum(norm, scratch[1]);
  if (t.rank != 0 || t.row >= plan.rows) return;
  typed<T>(a.trace)[t.row] = static_cast<T>(trace);
  if (a.norm) typed<T>(a.norm)[t.row] = static_cast<T>(norm);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    row_dot_grad_kernel(const RowDotArgs a, const Divider features) {
  const int64_t flat = thread_index();
  if (flat >= a.rows * a.features) return;
  const int64_t i = features.quotient(flat);
  const T s = a.grad_trace ? typed<T>(a.grad_trace)[i] : T(0);
  const T x = typed<T>(a.a)[flat], y = typed<T>(a.b)[flat];
  typed<T>(a.grad_a)[flat] = s * y;
  typed<T>(a.grad_b)[flat] = a.grad_norm ? s * x + T(2) * typed<T>(a.grad_norm)[i] * y : s * x;
}

// ---- launches ----------------------------------------------------------------------------------
thread_local cudaStream_t stream_of_call = nullptr;  // of the op that runs; Call sets it

struct OnCuda {
  static void multiply(Tensor& out, const Tensor& a, const Tensor& b) { multiply_out(out, a, b); }
  static void multiply_add(Tensor& out, const Tensor& a, const Tensor& b) {
    Tensor product = empty(out, out.sizes());
    multiply_out(product, a, b);
    out = sum_of(out, product);
  }
  static void stack(const StackArgs& a, DType dtype) {
    const int64_t size = (1 + a.probes) * a.samples * a.features;
    if (size == 0) return;
    with_compute_type(dtype, [&](auto type) {
      PFK_LAUNCH(stack_kernel<decltype(type)>, grid_for(size), kThreads, stream_of_call, a,
                 Divider(a.features), Divider(a.samples));
    });
  }
  static void layer(LayerArgs a, LayerStep step, DType dtype) {
    if (a.samples * a.columns == 0) return;
    with_compute_type(dtype, [&](auto type) {
      using T = decltype(type);
      if (a.tangents == nullptr) a.tangents = static_cast<const T*>(a.p) + a.samples * a.stride;
      constexpr int width = 16 / sizeof(T);
      bool wide = a.columns % width == 0;
      for (const void* p :
           {static_cast<const void*>(a.p), a.tangents, static_cast<const void*>(a.s),
            static_cast<const void*>(a.grad), a.bias, a.gate, static_cast<const void*>(a.grad_bias),
            static_cast<const void*>(a.grad_gate)}) {
        wide = wide && aligned16(p);
      }
      const int64_t packs = a.samples * a.columns / (wide ? width : 1);
      with_kind(a.activation, [&](auto kind) {
        constexpr int k = kind.value;
        const Divider columns(a.columns);
        if (step == kLayerBackward) {
          auto kernel = wide ? layer_grad_kernel<k, T, true> : layer_grad_kernel<k, T, false>;
          PFK_LAUNCH(kernel, grid_for(packs), kThreads, stream_of_call, a, columns);
        } else {
          auto kernel = wide ? layer_kernel<k, T, true> : layer_kernel<k, T, false>;
          PFK_LAUNCH(kernel, grid_for(packs), kThreads, stream_of_call, a, columns,
                     step == kLayerRestore);
        }
      });
    });
  }
  static void output(const OutputArgs& a, bool backward, DType dtype) {
    if (a.samples == 0 || (backward && a.features == 0)) return;
    with_compute_type(dtype, [&](auto type) {
      using T = decltype(type);
      if (backward) {
        PFK_LAUNCH(output_grad_kernel<T>, grid_for(a.samples * a.features), kThreads,
                   stream_of_call, a, Divider(a.features));
      } else {
        const TeamPlan plan = plan_lanes(a.samples, a.features, 1);
        PFK_LAUNCH(output_kernel<T>, grid_of(blocks_of(plan)), kThreads, stream_of_call, a, plan);
      }
    });
  }
  static void row_dot(const RowDotArgs& a, bool backward, DType dtype) {
    if (a.rows == 0 || (backward && a.features == 0)) return;
    with_compute_type(dtype, [&](auto type) {
      using T = decltype(type);
      if (backward) {
        PFK_LAUNCH(row_dot_grad_kernel<T>, grid_for(a.rows * a.features), kThreads, stream_of_call,
                   a, Divider(a.features));
        return;
      }
      TeamPlan plan = plan_lanes(a.rows, a.features, 1);
      const bool block = a.features > 1024;
      if (block) plan.size = kThreads;
      auto kernel = block ? row_dot_kernel<T, true> : row_dot_kernel<T, false>;
      PFK_LAUNCH(kernel, grid_of(blocks_of(plan)), kThreads, stream_of_call, a, plan);
    });
  }
  static void exact(Exact& f, ExactOutputs& to) { wide_exact<OnCuda>(f, to); }
  static Tensor exact_backward(Exact& f, const Tensor& grad_trace, const Tensor& kept,
                               FieldGradients& to) {
    return wide_exact_backward<OnCuda>(f, grad_trace, kept, to);
  }
};

void run_forward(Field& f, const Tensor& kept) {
  bool done = false;
  with_compute_type(full_dtype(f.x),
                    [&](auto type) { done = fused_forward<decltype(type)>(f, stream_of_call); });
  if (!done) wide_forward<OnCuda>(f, kept);
}
void run_backward(Field& f, const Tensor& kept, FieldGradients& to) {
  wide_backward<OnCuda>(f, kept, to);
}

// Runs an op on the device and the stream of argument `kFirst`.
template <auto kOp, size_t kFirst, class Function = decltype(kOp)>
struct Call;
template <auto kOp, size_t kFirst, class R, class... Arguments>
struct Call<kOp, kFirst, R (*)(Arguments...)> {
  static R run(Arguments... arguments) {
    const Tensor& x = std::get<kFirst>(std::tie(arguments...));
    const DeviceGuard guard(x.get_device_index());
    stream_of_call = current_stream(x);
    return kOp(arguments...);
  }
};

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  using namespace pfk;
  m.impl("field_divergence", TORCH_BOX((&Call<&field_forward<run_forward>, 0>::run)));
  m.impl("field_divergence_backward", TORCH_BOX((&Call<&field_backward<run_backward>, 3>::run)));
  m.impl("field_exact", TORCH_BOX((&Call<&exact_forward<OnCuda>, 0>::run)));
  m.impl("field_exact_backward", TORCH_BOX((&Call<&exact_backward<OnCuda>, 2>::run)));
  m.impl("hutchinson_trace", TORCH_BOX((&Call<&trace_forward<OnCuda>, 0>::run)));
  m.impl("hutchinson_trace_backward", TORCH_BOX((&Call<&trace_backward<OnCuda>, 2>::run)));
}
