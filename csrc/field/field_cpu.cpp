// SPDX-License-Identifier: Apache-2.0
// Vector fields with their divergence on the CPU.
//
// Lower bound of the time: the multiply-adds of the products, 2 (1 + K) forward and 4 (1 + K)
// backward for each element of a weight and sample.  Tiles of samples go through all layers
// (field_cache.h). Gradients of weights up to kOwnSums columns are added up in cache; for wider
// ones, a wave of tiles writes cotangents and inputs to memory, which are then multiplied.  Weights
// too large for L3, and exact traces of layers wider than kOwnSums, go layer by layer through
// core/matmul.h: torch's BLAS (MKL, AVX2 on Zen 4) took 1.15 times as long at a width of 860.
#include "core/matmul.h"
#include "core/simd.h"
#include "field/field_exact_cache.h"

PFK_DECLARE_LEVELS(void field_run(const FieldArgs&, bool, bool, int64_t, int64_t);
                   void field_pack(const FieldArgs&, bool);
                   void field_add(const void*, int64_t, int64_t, bool, bool, int64_t, int64_t,
                                  double*);
                   void field_unfold(const FieldLayer&, bool, int64_t, int64_t);
                   void field_stack(const StackArgs&, bool, int64_t, int64_t);
                   void field_layer(const LayerArgs&, int, bool, int64_t, int64_t);
                   void field_output(const OutputArgs&, bool, bool, int64_t, int64_t);
                   void field_row_dot(const RowDotArgs&, bool, bool, int64_t, int64_t);
                   void field_matmul(const MatmulArgs&, bool, bool, int64_t, int64_t);
                   int64_t field_panel(bool); int64_t field_tile_rows())

PFK_BEGIN

void field_run(const FieldArgs& a, bool backward, bool wide, int64_t begin, int64_t end) {
  auto run = [&]<class T>(T) {
    if (a.coupling) {
      backward ? exact_tasks<true, T>(a, begin, end) : exact_tasks<false, T>(a, begin, end);
    } else {
      backward ? field_tasks<true, T>(a, begin, end) : field_tasks<false, T>(a, begin, end);
    }
  };
  wide ? run(double{}) : run(float{});
}
void field_pack(const FieldArgs& a, bool wide) {
  wide ? pack_layers<double>(a) : pack_layers<float>(a);
}
void field_add(const void* sums, int64_t size, int64_t tasks, bool add, bool wide, int64_t begin,
               int64_t end, double* total) {
  wide ? add_tasks(typed<double>(sums), size, tasks, add, begin, end, total)
       : add_tasks(typed<float>(sums), size, tasks, add, begin, end, total);
}
void field_unfold(const FieldLayer& y, bool wide, int64_t begin, int64_t end) {
  wide ? unfold_gate<double>(y, begin, end) : unfold_gate<float>(y, begin, end);
}
void field_stack(const StackArgs& a, bool wide, int64_t begin, int64_t end) {
  auto run = [&]<class T>(T) {
    stack_rows<T>(a.x, a.probe, a.probes, a.samples, a.features, begin, end,
                  typed<T>(a.s) + begin * a.features, a.features, a.samples);
  };
  wide ? run(double{}) : run(float{});
}
void field_layer(const LayerArgs& a, int pass, bool wide, int64_t begin, int64_t end) {
  const LayerPass p = static_cast<LayerPass>(pass);
  wide ? run_layer<double>(a, p, begin, end) : run_layer<float>(a, p, begin, end);
}
void field_output(const OutputArgs& a, bool backward, bool wide, int64_t begin, int64_t end) {
  if (wide) {
    backward ? output_backward<false, double>(a, begin, end)
             : output_forward<false, double>(a, begin, end);
  } else {
    backward ? output_backward<false, float>(a, begin, end)
             : output_forward<false, float>(a, begin, end);
  }
}
void field_row_dot(const RowDotArgs& a, bool backward, bool wide, int64_t begin, int64_t end) {
  if (wide) {
    backward ? row_dot_backward<double>(a, begin, end) : row_dot<double>(a, begin, end);
  } else {
    backward ? row_dot_backward<float>(a, begin, end) : row_dot<float>(a, begin, end);
  }
}

void field_matmul(const MatmulArgs& m, bool pack, bool wide, int64_t begin, int64_t end) {
  if (wide) {
    pack ? matmul_pack<double>(m, begin, end) : matmul_blocks<double>(m, begin, end);
  } else {
    pack ? matmul_pack<float>(m, begin, end) : matmul_blocks<float>(m, begin, end);
  }
}
int64_t field_panel(bool wide) { return wide ? kPanel<double> : kPanel<float>; }
int64_t field_tile_rows() { return kTileRows; }

PFK_END

#if PFK_SIMD_LEVEL == 0
#include <stdlib.h>

#include "field/field_exact.h"

namespace pfk {
namespace {

// ---- between BLAS products ---------------------------------------------------------------------
// out (+)= a b by core/matmul.h, which is faster than torch's BLAS at the sizes of fields.
void matmul(Tensor& out, const Tensor& a, const Tensor& b, bool add = false) {
  constexpr int64_t kDepth = 8192;  // of b packed at a time
  const bool wide = is_wide(a);
  const int64_t size = wide ? sizeof(double) : sizeof(float);
  MatmulArgs m{};
  m.rows = out.sizes()[0];
  m.task = matmul_task(m.rows);
  m.columns = out.sizes()[1];
  m.a_row = a.strides()[0];
  m.a_step = a.strides()[1];
  m.b_step = b.strides()[0];
  m.b_column = b.strides()[1];
  m.out_row = m.columns;
  m.out = data_of(out);
  const int64_t depth = a.sizes()[1], panel = PFK_CALL_LEVEL(field_panel, wide);
  const int64_t panels = (m.columns + panel - 1) / panel;
  const Tensor packed = empty(a, {panels * panel * (depth < kDepth ? depth : kDepth)});
  m.packed = data_of(packed);
  for (int64_t k = 0; k < depth || k == 0; k += kDepth) {
    m.depth = depth - k < kDepth ? depth - k : kDepth;
    m.a = static_cast<const char*>(a.const_data_ptr()) + k * m.a_step * size;
    m.b = static_cast<const char*>(b.const_data_ptr()) + k * m.b_step * size;
    m.add = add || k > 0;
    parallel_tasks(panels, panel * m.depth, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_matmul, m, true, wide, begin, end);
    });
    parallel_tasks((m.rows + m.task - 1) / m.task, m.task * m.columns * m.depth / 8,
                   [&](int64_t begin, int64_t end) {
                     PFK_CALL_LEVEL(field_matmul, m, false, wide, begin, end);
                   });
  }
}

struct OnCpu {
  static void multiply(Tensor& out, const Tensor& a, const Tensor& b) {
    constexpr int64_t kNarrow = 8;  // columns, with which most of a panel would be padding
    out.sizes()[1] < kNarrow ? multiply_out(out, a, b) : matmul(out, a, b);
  }
  static void multiply_add(Tensor& out, const Tensor& a, const Tensor& b) {
    matmul(out, a, b, true);
  }
  static void stack(const StackArgs& a, DType dtype) {
    const bool wide = dtype == kFloat64;
    parallel_tasks(a.samples, a.features * (1 + a.probes), [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_stack, a, wide, begin, end);
    });
  }
  static void layer(LayerArgs a, LayerStep step, DType dtype) {
    const bool wide = dtype == kFloat64;
    const int64_t behind = a.samples * a.stride * (wide ? sizeof(double) : sizeof(float));
    if (a.tangents == nullptr) a.tangents = static_cast<const char*>(a.p) + behind;
    parallel_tasks(a.samples, a.columns * (1 + a.probes) * 4, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_layer, a, static_cast<int>(step), wide, begin, end);
    });
  }
  static void output(const OutputArgs& a, bool backward, DType dtype) {
    const bool wide = dtype == kFloat64;
    parallel_tasks(a.samples, a.features * (1 + a.probes), [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_output, a, backward, wide, begin, end);
    });
  }
  static void row_dot(const RowDotArgs& a, bool backward, DType dtype) {
    const bool wide = dtype == kFloat64;
    parallel_tasks(a.rows, a.features, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_row_dot, a, backward, wide, begin, end);
    });
  }
  static void exact(Exact& f, ExactOutputs& to);
  static Tensor exact_backward(Exact& f, const Tensor& grad_trace, const Tensor& kept,
                               FieldGradients& to);
};

// ---- in cache ----------------------------------------------------------------------------------
constexpr int64_t kLeastTask = 64, kMostTask = 512, kWave = 64;  // samples, samples, tasks

// Aligned to whole vectors.
struct Memory {
  void* data;
  explicit Memory(int64_t bytes) : data(aligned_alloc(64, (bytes + 64) / 64 * 64)) {}
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
};
struct Zeros : Memory {
  explicit Zeros(int64_t bytes) : Memory(bytes) { memset(data, 0, bytes); }
};

int64_t cut(FieldArgs& a) {
  a.task = (a.samples + kWave - 1) / kWave;
  a.task = a.task < kLeastTask ? kLeastTask : a.task > kMostTask ? kMostTask : a.task;
  return (a.samples + a.task - 1) / a.task;
}

void run_tasks(const FieldArgs& a, bool backward, bool wide, int64_t tasks) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(field_run, a, backward, wide, begin, end);
  });
}

void forward_in_cache(Field& f, bool wide, int64_t size) {
  const Zeros packed(f.packed_size * size);
  f.args.packed = packed.data;
  PFK_CALL_LEVEL(field_pack, f.args, wide);
  run_tasks(f.args, false, wide, cut(f.args));
}

template <class T>
void unpad(const double* from, int64_t stride, void* to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      static_cast<T*>(to)[i * columns + j] = static_cast<T>(from[i * stride + j]);
    }
  }
}

template <class T>
void write_weight(const FieldLayer& y, const double* total) {
  const double* from = total + y.sums;
  if (!y.sum_transposed) return unpad<T>(from, y.in_stride, y.grad_weight, y.out, y.in);
  for (int64_t i = 0; i < y.out; ++i) {
    for (int64_t j = 0; j < y.in; ++j) {
      static_cast<T*>(y.grad_weight)[i * y.in + j] = static_cast<T>(from[j * y.out_stride + i]);
    }
  }
}

template <class T>
void write_gradients(const Field& f, const double* total) {
  if (f.args.coupling) write_weight<T>(*f.args.coupling, total);
  for (const FieldLayer& y : f.layers) {
    if (!y.grad_rows) write_weight<T>(y, total);
    const double* at = total + y.sums + weight_sum_size(y);
    if (!y.bias_step) unpad<T>(at, y.out_stride, y.grad_bias, 1, y.out);
    at += y.out_stride;
    if (y.gate && !y.gate_step) unpad<T>(at, y.out_stride, y.grad_gate, 1, y.out);
  }
}

constexpr int64_t kOwnSums = 128;

// Where gradients of weights are too large to be added up in cache, the cotangents and inputs of
// every layer are stacked and multiplied once for a wave of tiles, which is small enough to stay in
// L3.
struct Stacks {
  Tensors grads, inputs;
  int64_t wave = kWave;  // tasks

  Stacks(Field& f, int64_t tile_rows) {
    constexpr int64_t kStackRows = 1008;
    bool wide = false;
    for (const FieldLayer& y : f.layers) wide = wide || y.in > kOwnSums || y.out > kOwnSums;
    if (!wide) return;
    const int64_t height = 1 + f.args.probes;
    f.args.task = tile_rows / height > 1 ? tile_rows / height : 1;  // one tile
    wave = kStackRows / (f.args.task * height);
    wave = wave > 1 ? wave : 1;
    int64_t rows = wave * f.args.task * height;
    rows = (rows < f.rows() ? rows : f.rows()) + 1;  // one more: vectors may end beyond a row
    f.args.sums_size = 0;
    for (FieldLayer& y : f.layers) {
      grads.push_back(empty(f.x, {rows, y.out_stride}));
      inputs.push_back(empty(f.x, {rows, y.in_stride}));
      y.grad_rows = data_of(grads.back());
      y.input_rows = data_of(inputs.back());
      y.sums = f.args.sums_size;
      f.args.sums_size += 2 * y.out_stride;
    }
  }
  void multiply(const Field& f, const FieldGradients& to, int64_t rows, bool add) const {
    for (size_t l = 0; l < grads.size(); ++l) {
      const FieldLayer& y = f.layers[l];
      Tensor grad = rows_of(grads[l], 0, rows), input = rows_of(inputs[l], 0, rows);
      Tensor out = to.weights[l];
      matmul(out, transposed(torch::stable::narrow(grad, 1, 0, y.out)),
             torch::stable::narrow(input, 1, 0, y.in), add);
    }
  }
};

// Tasks run in waves, so that their sums take bounded memory.  Those of a wave are added up in
// double.
void backward_in_cache(Field& f, bool wide, int64_t size, const FieldGradients& to) {
  FieldArgs& a = f.args;
  cut(a);
  const Stacks stacks(f, PFK_CALL_LEVEL(field_tile_rows));
  const Zeros packed(f.packed_size * size);
  a.packed = packed.data;
  PFK_CALL_LEVEL(field_pack, a, wide);
  const int64_t tasks = (a.samples + a.task - 1) / a.task;
  const int64_t wave = tasks < stacks.wave ? tasks : stacks.wave;
  std::vector<double> total(a.sums_size, 0.0);
  const Memory sums(wave * a.sums_size * size);
  a.sums = sums.data;
  for (a.first_task = 0; a.first_task < tasks || a.first_task == 0; a.first_task += wave) {
    const int64_t count = tasks - a.first_task < wave ? tasks - a.first_task : wave;
    const int64_t left = a.samples - a.first_task * a.task;
    const int64_t samples = count * a.task < left ? count * a.task : left;
    run_tasks(a, true, wide, count);
    parallel_tasks(a.sums_size, count, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_add, sums.data, a.sums_size, count, a.first_task > 0, wide, begin, end,
                     total.data());
    });
    stacks.multiply(f, to, samples * (1 + a.probes), a.first_task > 0);
    if (wave == 0) break;
  }
  wide ? write_gradients<double>(f, total.data()) : write_gradients<float>(f, total.data());
  for (const FieldLayer& y : f.layers) {
    if (y.scale == nullptr) continue;
    parallel_tasks(y.out, y.in, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_unfold, y, wide, begin, end);
    });
  }
}

// Sets what tiles of an exact trace need besides the layers, and runs them.
template <class Run>
void exact_in_cache(Exact& f, const Run& run) {
  const bool wide = is_wide(f.x);
  const int64_t size = wide ? sizeof(double) : sizeof(float);
  int64_t widest = 0;
  for (const FieldLayer& y : f.layers) widest = y.out_stride > widest ? y.out_stride : widest;
  const Memory ones(widest * size);
  for (int64_t i = 0; i < widest; ++i) {
    wide ? static_cast<double*>(ones.data)[i] = 1 : static_cast<float*>(ones.data)[i] = 1;
  }
  f.args.coupling = &f.coupling;
  f.args.probes = 1;  // rows of a tile: primal and slopes
  f.args.ones = ones.data;
  run(wide, size);
}

bool is_narrow(const Exact& f) {
  int64_t widest = f.args.features;
  for (const FieldLayer& y : f.layers) widest = y.out > widest ? y.out : widest;
  return f.args.flags & kFieldInCache && widest <= kOwnSums;
}
void OnCpu::exact(Exact& f, ExactOutputs& to) {
  if (!is_narrow(f)) return wide_exact<OnCpu>(f, to);
  if (!(f.args.flags & kFieldKeep)) f.args.kept = nullptr;
  exact_in_cache(f, [&](bool wide, int64_t size) { forward_in_cache(f, wide, size); });
}
Tensor OnCpu::exact_backward(Exact& f, const Tensor& grad_trace, const Tensor& kept,
                             FieldGradients& to) {
  if (!is_narrow(f)) return wide_exact_backward<OnCpu>(f, grad_trace, kept, to);
  const Tensor grad_m = empty(f.x, f.m.sizes());
  f.coupling.grad_weight = data_of(grad_m);
  exact_in_cache(f, [&](bool wide, int64_t size) { backward_in_cache(f, wide, size, to); });
  return grad_m;
}

// ---- ops ---------------------------------------------------------------------------------------
void run_forward(Field& f, const Tensor& kept) {
  const bool wide = is_wide(f.x);
  if (f.args.flags & kFieldInCache) {
    f.fold_gates();
    forward_in_cache(f, wide, wide ? sizeof(double) : sizeof(float));
  } else {
    wide_forward<OnCpu>(f, kept);
  }
}
void run_backward(Field& f, const Tensor& kept, FieldGradients& to) {
  const bool wide = is_wide(f.x);
  if (f.args.flags & kFieldInCache) {
    f.fold_gates();
    backward_in_cache(f, wide, wide ? sizeof(double) : sizeof(float), to);
  } else {
    wide_backward<OnCpu>(f, kept, to);
  }
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  using namespace pfk;
  m.impl("field_divergence", TORCH_BOX(&field_forward<run_forward>));
  m.impl("field_divergence_backward", TORCH_BOX(&field_backward<run_backward>));
  m.impl("field_exact", TORCH_BOX(&exact_forward<OnCpu>));
  m.impl("field_exact_backward", TORCH_BOX(&exact_backward<OnCpu>));
  m.impl("hutchinson_trace", TORCH_BOX(&trace_forward<OnCpu>));
  m.impl("hutchinson_trace_backward", TORCH_BOX(&trace_backward<OnCpu>));
}
#endif
