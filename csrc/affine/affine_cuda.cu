// SPDX-License-Identifier: Apache-2.0
// Affine transforms on a GPU.
//
// Floor: the bytes of affine_cpu.cpp over the copy bandwidth.  One block takes one chunk of one
// sample, in 16-byte packs where every row starts on one (single elements otherwise), and leaves
// the chunk's log-det; a sample of several chunks is summed in order by a second kernel, so results
// are the same bits every run.  The scale map is chosen at run time: the branch is uniform and
// costs nothing beside memory, and keeps the kernels to sixteen.
#include "affine/affine_host.h"
#include "core/cuda.cuh"

PFK_BEGIN
namespace {

constexpr int64_t kChunk = 8192;

template <class T>
__device__ Scale<T> scale_of_kind(int kind, T u, const AffineMap<T>& m) {
  switch (kind) {
    case kExp:
      return scale_of<kExp>(u, m);
    case kTanh:
      return scale_of<kTanh>(u, m);
    case kAtan:
      return scale_of<kAtan>(u, m);
    case kSigmoid:
      return scale_of<kSigmoid>(u, m);
    case kSoftplus:
      return scale_of<kSoftplus>(u, m);
    case kSoftclipScale:
      return scale_of<kSoftclipScale>(u, m);
    default:
      return scale_of<kAdditive>(u, m);
  }
}

template <class S, bool kWide>
struct Pointers {
  using P = Pack<S, kWide>;
  static __device__ P load(const void* base, int64_t offset) {
    return P::load(static_cast<const S*>(base) + offset);
  }
  static __device__ void store(const P& pack, void* base, int64_t offset) {
    pack.store(static_cast<S*>(base) + offset);
  }
};

// The passing elements of a chunk, every block its share.
template <class S, bool kWide>
__device__ void copy_passing(const AffineArgs& a, int64_t n, int64_t chunk) {
  using Q = Pointers<S, kWide>;
  const AffineGeometry& g = a.g;
  const int64_t total = g.copy_rows * g.copy_length / Q::P::kCount;
  const void* from = a.grad_out != nullptr ? a.grad_out : a.in;
  const int64_t base = n * g.x_sample + g.copy_start;
  for (int64_t i = chunk * kThreads + threadIdx.x; i < total; i += a.chunks * kThreads) {
    const int64_t e = i * Q::P::kCount;
    const int64_t at =
        base + (g.copy_rows == 1 ? e : e / g.copy_length * g.copy_row + e % g.copy_length);
    Q::store(Q::load(from, at), a.out, at);
  }
}

template <class S, bool kBackward, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)  // two blocks: 128 registers, no spills
    affine_kernel(const AffineArgs a, const AffineMap<Compute<S>> map, Compute<S>* log_det) {
  using T = Compute<S>;
  using Q = Pointers<S, kWide>;
  using P = typename Q::P;
  constexpr int w = P::kCount;
  __shared__ double scratch[kThreads / 32];
  const AffineGeometry& g = a.g;
  const int64_t n = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  const int64_t features = g.rows * g.length;
  const int64_t end = min(features, (chunk + 1) * a.chunk);
  const bool reads_shift = !kBackward || vjp_reads_shift(map);
  const T grad_log = kBackward ? static_cast<const T*>(a.grad_log_det)[n] : T(0);
  T sum = T(0);
  for (int64_t e = chunk * a.chunk + threadIdx.x * w; e < end; e += kThreads * w) {
    const int64_t row = g.rows == 1 ? 0 : e / g.length, i = e - row * g.length;
    const int64_t x = n * g.x_sample + g.x_start + row * g.x_row + i;
    const int64_t p = n * g.p_sample + row * g.p_row + i * g.p_step;
    const P in = Q::load(a.in, x);
    P raw{}, shift{}, grad{}, out, grad_raw, grad_shift;
    if (a.kind != kAdditive) raw = Q::load(a.raw, p + g.raw_start);
    if (reads_shift) shift = Q::load(a.shift, p + g.shift_start);
    if (kBackward) grad = Q::load(a.grad_out, x);
#pragma unroll
    for (int j = 0; j < w; ++j) {
      const Scale<T> s = scale_of_kind(a.kind, T(widen(raw.lanes[j])), map);
      const T v = widen(in.lanes[j]), t = widen(shift.lanes[j]), upstream = widen(grad.lanes[j]);
      const bool moved = a.mask == nullptr || a.mask[row * g.mask_row + (i + j) * g.mask_step] != 0;
      if constexpr (kBackward) {
        const AffineGrad<T> d = affine_vjp(v, t, upstream, grad_log, s, map);
        out.lanes[j] = narrow<S>(moved ? d.in : upstream);
        grad_raw.lanes[j] = narrow<S>(moved ? d.raw : T(0));
        grad_shift.lanes[j] = narrow<S>(moved ? d.shift : T(0));
      } else {
        out.lanes[j] = moved ? narrow<S>(affine_apply(v, s.factor, t, map)) : in.lanes[j];
        sum += moved ? s.log_factor : T(0);
      }
    }
    Q::store(out, a.out, x);
    if (kBackward) {
      Q::store(grad_shift, a.grad_shift, p + g.shift_start);
      if (a.kind != kAdditive) Q::store(grad_raw, a.grad_raw, p + g.raw_start);
    }
  }
  copy_passing<S, kWide>(a, n, chunk);
  if constexpr (!kBackward) {
    const double total = block_sum(static_cast<double>(sum), scratch);
    if (threadIdx.x != 0) return;
    if (a.chunks == 1) {
      log_det[n] = static_cast<T>(total);
    } else {
      a.partial[blockIdx.x] = total;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_chunks_kernel(const AffineArgs a, T* log_det) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= a.g.samples) return;
  double sum = 0;
  for (int64_t c = 0; c < a.chunks; ++c) sum += a.partial[n * a.chunks + c];
  log_det[n] = static_cast<T>(sum);
}

// Whether every row starts, and is as long as, whole 16-byte packs.
bool fits_packs(const AffineArgs& a, int64_t width) {
  const AffineGeometry& g = a.g;
  for (const int64_t n : {g.length, g.x_start, g.x_row, g.x_sample, g.copy_length, g.copy_start,
                          g.copy_row, g.shift_start, g.raw_start, g.p_row, g.p_sample}) {
    if (n % width != 0) return false;
  }
  for (const void* p :
       {a.in, a.raw, a.shift, static_cast<const void*>(a.out), a.grad_out,
        static_cast<const void*>(a.grad_raw), static_cast<const void*>(a.grad_shift)}) {
    if (!aligned16(p)) return false;
  }
  return g.p_step == 1;
}

template <class S>
void launch(const AffineArgs& a, void* log_det, cudaStream_t stream) {
  using T = Compute<S>;
  const AffineMap<T> map = affine_map<T>(a.numbers, a.flags);
  T* result = static_cast<T*>(log_det);
  const unsigned grid = static_cast<unsigned>(a.g.samples * a.chunks);
  const bool wide = fits_packs(a, 16 / sizeof(S));
  if (log_det == nullptr) {
    auto kernel = wide ? affine_kernel<S, true, true> : affine_kernel<S, true, false>;
    PFK_LAUNCH(kernel, grid, kThreads, stream, a, map, result);
    return;
  }
  auto kernel = wide ? affine_kernel<S, false, true> : affine_kernel<S, false, false>;
  PFK_LAUNCH(kernel, grid, kThreads, stream, a, map, result);
  if (a.chunks == 1) return;
  const unsigned blocks = static_cast<unsigned>((a.g.samples + kThreads - 1) / kThreads);
  PFK_LAUNCH(sum_chunks_kernel<T>, blocks, kThreads, stream, a, result);
}

void run_affine_cuda(AffineArgs& a, const Tensor& out, Tensor* log_det) {
  const int64_t features = a.g.rows * a.g.length;
  a.chunk = kChunk;
  a.chunks = features > kChunk ? (features + kChunk - 1) / kChunk : 1;
  if (a.g.samples == 0) return;
  STD_TORCH_CHECK(a.g.samples * a.chunks < (int64_t{1} << 31), "pyflowkern::affine: ", a.g.samples,
                  " samples of ", features, " elements need more blocks than a grid has");
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  Tensor partial;  // returned to torch's allocator after the launch, in stream order
  if (log_det != nullptr && a.chunks > 1) {
    partial = empty(out, {a.g.samples * a.chunks}, ScalarType::Double);
    a.partial = static_cast<double*>(partial.mutable_data_ptr());
  }
  void* result = log_det != nullptr ? log_det->mutable_data_ptr() : nullptr;
  const cudaStream_t stream = current_stream(out);
  switch (dtype_of(out)) {
    case kFloat32:
      return launch<float>(a, result, stream);
    case kFloat64:
      return launch<double>(a, result, stream);
    case kBFloat16:
      return launch<__nv_bfloat16>(a, result, stream);
    default:
      return launch<__half>(a, result, stream);
  }
}

}  // namespace
PFK_END

PFK_REGISTER_AFFINE(CUDA, pfk::run_affine_cuda)
