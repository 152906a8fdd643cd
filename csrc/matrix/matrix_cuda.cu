// SPDX-License-Identifier: Apache-2.0
// Small matrices on a GPU.
//
// Gauss-Jordan: a block has a matrix, in shared memory if it fits (on sm_80 and sm_90 it always
// does), else in global memory.  Rows are not swapped: the block remembers the row of each step.
// Lower bound of the time: three barriers a step.  Triangles: a warp has a column of the right-hand
// side in registers; in products, a thread has an element.
#include "core/teams.cuh"
#include "matrix/matrix_host.h"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int kMaxSize = 128;  // ops/matrix.py sends no larger matrix here
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Gauss-Jordan ------------------------------------------------------------------------------
template <class T>
struct Steps {
  T factors[kMaxSize], pivot_row[kMaxSize], pivots[kMaxSize];
  int row_of[kMaxSize];   // of a step
  int step_of[kMaxSize];  // of a row; -1: not yet taken
  double scratch[2][kWarps];
  double zeros;  // not zero if the matrix holds NaN or inf
};

// The first warp picks the row of step k.
template <class T>
__device__ void choose_pivot(const T* m, int n, int pitch, int k, Steps<T>& s) {
  if (threadIdx.x >= kWarp) return;
  T largest = T(-1);
  int at = n;
  for (int i = threadIdx.x; i < n; i += kWarp) {
    const T size = abs_(m[i * pitch + k]);
    if (s.step_of[i] < 0 &&
        !(size <= largest)) {  // also chooses a NaN, which an overflow may have left
      largest = size;
      at = i;
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T size = __shfl_down_sync(kAllLanes, largest, offset);
    const int other = __shfl_down_sync(kAllLanes, at, offset);
    if (other < n && (at == n || size > largest || (size == largest && other < at))) {
      largest = size;
      at = other;
    }
  }
  __syncwarp();  // shuffles do not order memory: all lanes must have read step_of
  if (threadIdx.x != 0) return;
  s.row_of[k] = at;
  s.step_of[at] = k;
  s.pivots[k] = m[at * pitch + k];
}

// False at a pivot of zero.
template <class T>
__device__ bool invert(T* m, int n, int pitch, Steps<T>& s) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int k = 0; k < n; ++k) {
    choose_pivot(m, n, pitch, k, s);
    __syncthreads();
    const T pivot = s.pivots[k];
    const int p = s.row_of[k];
    if (pivot == T(0)) return false;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      s.factors[i] = m[i * pitch + k] / pivot;
      s.pivot_row[i] = i == k ? T(1) : m[p * pitch + i];
    }
    __syncthreads();
    for (int j = lane; j < n; j += kWarp) {
      const T u = s.pivot_row[j];
      for (int i = warp; i < n; i += kWarps) {
        T& a = m[i * pitch + j];
        a = i == p ? u / pivot : eliminate(j == k ? T(0) : a, s.factors[i], u);
      }
    }
    __syncthreads();
  }
  return true;
}

template <class T, bool kShared>
__global__ void __launch_bounds__(kThreads, kResident)
    slogdet_kernel(const SlogdetArgs a, T* scratch) {
  PFK_SHARED_MEMORY(memory);
  __shared__ Steps<T> s;
  const int n = static_cast<int>(a.size), pitch = n | 1;  // odd: a column meets every bank
  const int64_t begin = blockIdx.x * static_cast<int64_t>(n) * n;
  T* m = kShared ? reinterpret_cast<T*>(memory)
                 : scratch + blockIdx.x * static_cast<int64_t>(n) * pitch;
  T zeros = T(0);
  for (int e = threadIdx.x; e < n * n; e += kThreads) {
    const T value = static_cast<const T*>(a.weight)[begin + e];
    m[e / n * pitch + e % n] = value;
    zeros += value * T(0);
  }
  if (threadIdx.x < n) s.step_of[threadIdx.x] = -1;
  const double sum = block_sum(static_cast<double>(zeros), s.scratch[0]);
  if (threadIdx.x == 0) s.zeros = sum;
  __syncthreads();
  const bool finite = s.zeros == 0;
  const bool regular = finite && invert(m, n, pitch, s);

  // sign and log|det|: the parity of the order of the rows, and the pivots
  const int k = threadIdx.x;
  double log_abs = 0, flips = 0;
  if (regular && k < n) {
    log_abs = log_pivot(s.pivots[k]);
    flips = s.pivots[k] < T(0);
    for (int j = k + 1; j < n; ++j) flips += s.row_of[j] < s.row_of[k];
  }
  log_abs = block_sum(log_abs, s.scratch[1]);
  __syncthreads();
  flips = block_sum(flips, s.scratch[0]);
  const T nan = static_cast<T>(NAN);
  if (threadIdx.x == 0) {
    const T sign = static_cast<int>(flips) % 2 == 0 ? T(1) : T(-1);
    static_cast<T*>(a.sign)[blockIdx.x] = regular ? sign : finite ? T(0) : nan;
    static_cast<T*>(a.log_abs_det)[blockIdx.x] = regular  ? static_cast<T>(log_abs)
                                                 : finite ? static_cast<T>(-INFINITY)
                                                          : nan;
  }
  for (int e = threadIdx.x; e < n * n; e += kThreads) {
    static_cast<T*>(a.inverse)[begin + e] =
        regular ? m[s.row_of[e / n] * pitch + s.step_of[e % n]] : nan;
  }
}

// ---- triangles ---------------------------------------------------------------------------------
// A column of at most kMaxSize entries over the lanes of a warp: entry i in lane i % 32.
template <class T>
struct Column {
  static constexpr int kSlots = kMaxSize / kWarp;
  T x[kSlots];

  static __device__ int row(int slot) { return slot * kWarp + threadIdx.x % kWarp; }

  // x = t^-1 x by substitution.
  __device__ void solve(const Triangle<T>& t, int n) {
    for (int step = 0; step < n; ++step) {
      const int k = t.is_lower ? step : n - 1 - step;
      T mine = T(0);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) mine = k >= slot * kWarp ? x[slot] : mine;
      const T solved = __shfl_sync(kAllLanes, mine, k % kWarp) / t.diagonal(k);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int i = row(slot);
        if (i == k) x[slot] = solved;
        if (i < n && t.holds(i, k)) x[slot] = eliminate(x[slot], *t.at(i, k), solved);
      }
    }
  }
};

// Element (i, j) of P^T m: the rows of m that P took from row i.
template <class T>
__device__ T unpermuted(const PluArgs& a, const T* m, int64_t row, int64_t column, int64_t i,
                        int64_t j) {
  T sum = T(0);
  for (int64_t r = 0; r < a.size; ++r) {
    if (a.permutation[r] == i) sum += m[r * row + j * column];
  }
  return sum;
}

// W, a thread for each element.  An index out of range gives NaN: a check would wait for the
// device.
template <class T>
__global__ void __launch_bounds__(kThreads) plu_kernel(const PluArgs a) {
  const int64_t e = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, n = a.size;
  if (e >= n * n) return;
  const Triangle<T> lower = lower_of<T>(a), upper = upper_of<T>(a);
  const int64_t i = a.permutation[e / n], j = e % n;
  T sum = static_cast<T>(NAN);
  if (i >= 0 && i < n) {
    sum = j > i ? *upper.at(i, j) : (j == i ? T(1) : *lower.at(i, j)) * upper.diagonal(j);
    for (int64_t k = 0; k < min(i, j); ++k) sum += *lower.at(i, k) * *upper.at(k, j);
  }
  static_cast<T*>(a.out)[e] = sum;
}

// G = P^T grad.
template <class T>
__global__ void __launch_bounds__(kThreads) unpermute_kernel(const PluArgs a, T* g) {
  const int64_t e = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, n = a.size;
  if (e < n * n) g[e] = unpermuted(a, static_cast<const T*>(a.grad), n, 1, e / n, e % n);
}

// Store element (i, j) of grad L, or of grad U and with it grad d: what lies in the triangle.
template <class T>
__device__ void put_lower(const PluArgs& a, int64_t i, int64_t j, T value) {
  static_cast<T*>(a.grad_lower)[i * a.size + j] = j < i ? value : T(0);
}
template <class T>
__device__ void put_upper(const PluArgs& a, int64_t i, int64_t j, T value) {
  static_cast<T*>(a.grad_upper)[i * a.size + j] = j > i ? value : T(0);
  if (j == i) static_cast<T*>(a.grad_log_diag)[i] = value * upper_of<T>(a).diagonal(i);
}

// grad L = G U^T and grad U = L^T G: each element of a triangle is one sum.
template <class T>
__global__ void __launch_bounds__(kThreads) plu_grad_kernel(const PluArgs a, const T* g) {
  const int64_t e = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, n = a.size;
  if (e >= n * n) return;
  const Triangle<T> lower = lower_of<T>(a), upper = upper_of<T>(a);
  const int64_t i = e / n, j = e % n;
  T sum = g[e];
  if (j < i) {
    sum *= upper.diagonal(j);
    for (int64_t k = j + 1; k < n; ++k) sum += g[i * n + k] * *upper.at(j, k);
  } else {
    for (int64_t k = i + 1; k < n; ++k) sum += *lower.at(k, i) * g[k * n + j];
  }
  put_lower(a, i, j, sum);
  put_upper(a, i, j, sum);
}

// The substitutions; each launch for a gradient uses the result of the one before.
enum Stage { kInverse, kGradLower, kGradBoth, kGradEnd };

// A warp has a column of the result.
template <class T, int kStage>
__global__ void __launch_bounds__(kThreads) solve_kernel(const PluArgs a, T* z, T* b) {
  const int n = static_cast<int>(a.size);
  int c = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (c >= (kStage == kGradEnd ? 2 * n : n)) return;
  const bool of_upper = c >= n;  // in the last stage only
  if (of_upper) c -= n;
  const Triangle<T> lower = lower_of<T>(a), upper = upper_of<T>(a);
  const int64_t p = a.permutation[c];
  Column<T> v;
#pragma unroll
  for (int slot = 0; slot < Column<T>::kSlots; ++slot) {
    const int i = v.row(slot);
    T x = T(0);
    if (i < n) {
      if constexpr (kStage == kInverse) x = p < 0 || p >= n ? static_cast<T>(NAN) : T(i == p);
      if constexpr (kStage == kGradLower) {  // Y^T
        x = unpermuted(a, static_cast<const T*>(a.grad), 1, n, i, c);
      }
      if constexpr (kStage == kGradBoth) x = z[c * n + i];
      if constexpr (kStage == kGradEnd) x = of_upper ? b[c * n + i] : b[i * n + c];
    }
    v.x[slot] = x;
  }
  if constexpr (kStage == kInverse || kStage == kGradLower) v.solve(lower, n);
  if constexpr (kStage == kInverse) v.solve(upper, n);
  if constexpr (kStage == kGradBoth) v.solve(upper.transposed(), n);
  if constexpr (kStage == kGradEnd) v.solve(of_upper ? upper : lower.transposed(), n);
#pragma unroll
  for (int slot = 0; slot < Column<T>::kSlots; ++slot) {
    const int i = v.row(slot);
    if (i >= n) continue;
    if constexpr (kStage == kInverse) static_cast<T*>(a.out)[i * n + c] = v.x[slot];
    if constexpr (kStage == kGradLower) z[i * n + c] = v.x[slot];
    if constexpr (kStage == kGradBoth) b[i * n + c] = v.x[slot];
    if constexpr (kStage == kGradEnd) {
      of_upper ? put_upper(a, c, i, -v.x[slot]) : put_lower(a, i, c, -v.x[slot]);
    }
  }
}

// ---- host --------------------------------------------------------------------------------------
int largest_shared_memory(const Tensor& t) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        t.get_device_index()));
  return bytes;
}

void check_size(int64_t size) {
  STD_TORCH_CHECK(size <= kMaxSize, "pyflowkern: matrices of at most ", kMaxSize, " rows, got ",
                  size);
}

std::tuple<Tensor, Tensor, Tensor> slogdet_inverse_cuda(const Tensor& weight) {
  const DeviceGuard guard(weight.get_device_index());
  const SlogdetTensors t = slogdet_tensors(weight);
  const int64_t n = t.args.size;
  check_size(n);
  if (t.batch == 0) return {t.sign, t.log_abs_det, t.inverse};
  with_compute_type(full_dtype(weight), [&](auto type) {
    using T = decltype(type);
    const size_t bytes = n * (n | 1) * sizeof(T);
    const bool fits =
        bytes + sizeof(Steps<T>) + 1024 <= static_cast<size_t>(largest_shared_memory(weight));
    const Tensor scratch = empty(weight, {fits ? 0 : t.batch * n * (n | 1)});
    auto kernel = fits ? slogdet_kernel<T, true> : slogdet_kernel<T, false>;
    PFK_LAUNCH_SHARED(kernel, grid_of(t.batch), kThreads, fits ? bytes : 0, current_stream(weight),
                      t.args, static_cast<T*>(scratch.mutable_data_ptr()));
  });
  return {t.sign, t.log_abs_det, t.inverse};
}

template <class T, int kStage>
void launch_solve(const PluArgs& a, T* z, T* b, cudaStream_t stream) {
  const int64_t columns = kStage == kGradEnd ? 2 * a.size : a.size;
  auto kernel = solve_kernel<T, kStage>;
  PFK_LAUNCH(kernel, grid_for(columns * kWarp), kThreads, stream, a, z, b);
}

Tensor plu_cuda(const Tensor& permutation, const Tensor& lower, const Tensor& upper,
                const Tensor& log_diag, const Tensor& sign, bool inverse) {
  const DeviceGuard guard(lower.get_device_index());
  PluTensors t = plu_tensors(permutation, lower, upper, log_diag, sign, inverse);
  const PluArgs& a = t.args;
  check_size(a.size);
  Tensor out = empty(lower, lower.sizes());
  t.args.out = out.mutable_data_ptr();
  if (a.size == 0) return out;
  with_compute_type(full_dtype(lower), [&](auto type) {
    using T = decltype(type);
    const cudaStream_t stream = current_stream(lower);
    if (inverse) {
      launch_solve<T, kInverse>(a, nullptr, nullptr, stream);
    } else {
      PFK_LAUNCH(plu_kernel<T>, grid_for(a.size * a.size), kThreads, stream, a);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> plu_grad_cuda(const Tensor& grad, const Tensor& permutation,
                                                 const Tensor& lower, const Tensor& upper,
                                                 const Tensor& log_diag, const Tensor& sign,
                                                 bool inverse) {
  const DeviceGuard guard(lower.get_device_index());
  PluTensors t = plu_tensors(permutation, lower, upper, log_diag, sign, inverse);
  const PluArgs& a = t.args;
  check_size(a.size);
  const Tensor upstream = with_format(grad, false);
  t.args.grad = upstream.const_data_ptr();
  const std::tuple<Tensor, Tensor, Tensor> grads = plu_grads(t);
  if (a.size == 0) return grads;
  const Tensor scratch = empty(lower, {2 * a.size * a.size});
  with_compute_type(full_dtype(lower), [&](auto type) {
    using T = decltype(type);
    const cudaStream_t stream = current_stream(lower);
    T *z = static_cast<T*>(scratch.mutable_data_ptr()), *b = z + a.size * a.size;
    if (inverse) {
      launch_solve<T, kGradLower>(a, z, b, stream);
      launch_solve<T, kGradBoth>(a, z, b, stream);
      launch_solve<T, kGradEnd>(a, z, b, stream);
    } else {
      const unsigned blocks = grid_for(a.size * a.size);
      PFK_LAUNCH(unpermute_kernel<T>, blocks, kThreads, stream, a, z);
      PFK_LAUNCH(plu_grad_kernel<T>, blocks, kThreads, stream, a, z);
    }
  });
  return grads;
}

}  // namespace
PFK_END

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CUDA, m) {
  m.impl("slogdet_inverse", TORCH_BOX(&pfk::slogdet_inverse_cuda));
  m.impl("plu_matrix", TORCH_BOX(&pfk::plu_cuda));
  m.impl("plu_matrix_backward", TORCH_BOX(&pfk::plu_grad_cuda));
}
