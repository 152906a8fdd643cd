// SPDX-License-Identifier: Apache-2.0
// A whole field of narrow layers (at most 128 wide) in one launch: a block takes a tile of samples
// through all layers, the primal and its tangents, in shared memory.
//
// Lower bound of the time: 2 (1 + K) sum(in out) operations of float32 a sample (not on tensor
// cores: TF32 is not accurate enough for the trace), and 4 (2 D + K) bytes, with 4 (1 + K) out more
// for each layer that is kept.  Three hidden layers of 64, D = 6, K = 1: 36 kflop and 52 bytes,
// which on an H100 (67 TFLOP/s, 3.35 TB/s) are 0.53 and 0.016 ns.  Arithmetic decides, also if a
// layer is kept (512 bytes, 0.15 ns).
//
// A tile has `rows` stacked rows: the primal of its samples, then each tangent.  A thread computes
// up to 8 rows by 4 columns of a product in registers: four steps of it are 12 loads of 16 bytes
// from shared memory for 128 multiply-adds.  After a barrier the result replaces the input, so that
// one buffer is enough.  Weights are transposed when they are copied to shared memory.  They stay
// there for all tiles of a block if there is room for all, else each layer is copied again for
// every tile.  All sums have a fixed order: the bits of a sample do not depend on the batch.
#pragma once

#include "core/cuda.cuh"
#include "field/field_host.h"

namespace pfk {

constexpr int kFusedLayers = 8, kFusedWidest = 128, kFusedRows = 8;  // rows of a thread

struct FusedLayer {
  const void *weight, *bias, *gate;  // as in FieldLayer
  void* kept;                        // block of this layer in what is kept, or null
  int in, out, bias_step, gate_step;
  int threads;  // for a row of the product, 4 columns each: a power of two
  int across;   // threads for a row of the activation: a power of two
  int at;       // where its weight begins in shared memory
  bool value_kept, wide;
};

struct FusedArgs {
  int64_t samples, tiles;
  int probes, features, layers, activation;
  int rows, tile_samples, stride;  // of a tile; stride: between rows
  bool resident;                   // all weights stay in shared memory
  FieldProbe probe;
  const void* x;
  void *y, *trace, *norm;
  FusedLayer layer[kFusedLayers];
};

}  // namespace pfk

PFK_BEGIN
namespace {

template <class T>
struct alignas(16) Four {
  T lanes[4];
  static __device__ Four load(const T* p) { return *reinterpret_cast<const Four*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Four*>(p) = *this; }
};

__host__ __device__ constexpr int fours(int n) { return (n + 3) / 4 * 4; }
// The step between rows of a weight [in, out] in shared memory: 4 more than a multiple of 32 words,
// so that stores use different banks.
__host__ __device__ constexpr int weight_stride(int threads) { return 4 * threads + 4; }

// ---- into shared memory ------------------------------------------------------------------------
template <class T>
__device__ __forceinline__ void stage_weight(const FusedLayer& y, T* to) {
  const int columns = 4 * y.threads, stride = weight_stride(y.threads);
  const T* from = static_cast<const T*>(y.weight);
  for (int k = static_cast<int>(threadIdx.x % 32); k < fours(y.in); k += 32) {
#pragma unroll 4
    for (int c = static_cast<int>(threadIdx.x / 32); c < columns; c += kThreads / 32) {
      to[k * stride + c] = k < y.in && c < y.out ? from[c * y.in + k] : T(0);
    }
  }
}

// Element j of probe k of sample n.
template <class T>
__device__ __forceinline__ T probe_at(const FusedArgs& a, int64_t k, int64_t n, int j) {
  const FieldProbe& p = a.probe;
  if (p.data) return static_cast<const T*>(p.data)[k * p.step_probe + n * p.step_sample + j];
  const int64_t i = (k * a.samples + n) * a.features + j;
  const PhiloxBlock<uint32_t> b =
      philox_block(static_cast<uint64_t>(i / kSignBits), static_cast<uint64_t>(*p.seed));
  return static_cast<T>(sign_of(b, static_cast<int>(i % kSignBits)));
}

// Loads the stacked input; what no sample or feature fills becomes zero.
template <class T>
__device__ __forceinline__ void stage_input(const FusedArgs& a, int64_t first, T* h) {
  const unsigned depth = fours(a.features), samples = a.tile_samples;
  for (unsigned i = threadIdx.x; i < a.rows * depth; i += kThreads) {
    const unsigned r = i / depth, k = r / samples;
    const int j = static_cast<int>(i - r * depth);
    const int64_t n = first + (r - k * samples);
    T v = T(0);
    if (j < a.features && n < a.samples && k <= static_cast<unsigned>(a.probes)) {
      v = k == 0 ? static_cast<const T*>(a.x)[n * a.features + j]
                 : probe_at<T>(a, static_cast<int64_t>(k) - 1, n, j);
    }
    h[r * a.stride + j] = v;
  }
}

// ---- a layer -----------------------------------------------------------------------------------
// h = h W^T in place.  The four rows that a quarter warp reads at once lie in different banks: the
// stride is an odd multiple of 16 bytes, and a thread's rows are `step` apart.
template <int kRows, class T>
__device__ __forceinline__ void multiply(const FusedLayer& y, const T* w, T* h, int row_stride) {
  const int t = static_cast<int>(threadIdx.x), step = kThreads / y.threads;
  int across = t & (y.threads - 1), r = t / y.threads;
  if (y.threads > 8) {  // a warp has 8 by 4 threads
    const int warp = t / 32, warps = y.threads / 8;
    across = t % 8 + 8 * (warp & (warps - 1));
    r = t % 32 / 8 + 4 * (warp / warps);
  }
  const int c = 4 * across, stride = weight_stride(y.threads);
  T sum[kRows][4] = {};
  for (int k = 0; k < y.in; k += 4) {
    Four<T> row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = Four<T>::load(h + (r + i * step) * row_stride + k);
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      const Four<T> b = Four<T>::load(w + (k + l) * stride + c);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += row[i].lanes[l] * b.lanes[j];
      }
    }
  }
  __syncthreads();
  if (c >= y.out) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    Four<T> product;
#pragma unroll
    for (int j = 0; j < 4; ++j) product.lanes[j] = c + j < y.out ? sum[i][j] : T(0);
    product.store(h + (r + i * step) * row_stride + c);
  }
}

template <class T>
__device__ __forceinline__ void multiply_any(const FusedArgs& a, const FusedLayer& y, const T* w,
                                             T* h) {
  switch (a.rows * y.threads / kThreads) {
    case 1:
      return multiply<1>(y, w, h, a.stride);
    case 2:
      return multiply<2>(y, w, h, a.stride);
    case 4:
      return multiply<4>(y, w, h, a.stride);
    default:
      return multiply<8>(y, w, h, a.stride);
  }
}

// Replaces products by h' and its tangents, and stores what is kept for the backward pass.
template <int kKind, bool kWide, class T>
__device__ __forceinline__ void activate(const FusedArgs& a, const FusedLayer& y, int64_t first,
                                         T* h) {
  using P = Pack<T, kWide>;
  const int t = static_cast<int>(threadIdx.x), j = (t & (y.across - 1)) * P::kCount;
  if (j >= y.out) return;
  T* const kept = static_cast<T*>(y.kept);
  for (int s = t / y.across; s < a.tile_samples; s += kThreads / y.across) {
    const int64_t n = first + s;
    if (n >= a.samples) return;
    T* const at = h + s * a.stride + j;
    const P pre = P::load(at);
    const P bias = P::load(static_cast<const T*>(y.bias) + n * y.bias_step + j);
    P gate, value, slope, keep;
    if (y.gate) gate = P::load(static_cast<const T*>(y.gate) + n * y.gate_step + j);
#pragma unroll
    for (int l = 0; l < P::kCount; ++l) {
      const T g = y.gate ? gate.lanes[l] : T(1);
      const Curve<T> c = curve_at<kKind>(g * pre.lanes[l] + bias.lanes[l]);
      value.lanes[l] = c.value;
      slope.lanes[l] = c.slope * g;
      keep.lanes[l] = y.value_kept ? c.value : pre.lanes[l];
    }
    value.store(at);
    if (kept) keep.store_whole(kept + n * y.out + j);
    for (int k = 1; k <= a.probes; ++k) {
      T* const tangent = at + k * a.tile_samples * a.stride;
      P moved = P::load(tangent);
      if (kept) moved.store_whole(kept + (k * a.samples + n) * y.out + j);
#pragma unroll
      for (int l = 0; l < P::kCount; ++l) moved.lanes[l] *= slope.lanes[l];
      moved.store(tangent);
    }
  }
}

template <bool kWide, class T>
__device__ __forceinline__ void activate_any(const FusedArgs& a, const FusedLayer& y, int64_t first,
                                             T* h) {
  with_kind(a.activation, [&](auto kind) { activate<kind.value, kWide>(a, y, first, h); });
}

// ---- the output --------------------------------------------------------------------------------
// The outputs.  Four lanes add up a row of a tangent.
template <class T>
__device__ __forceinline__ void reduce_output(const FusedArgs& a, const FusedLayer& y,
                                              int64_t first, const T* h) {
  const unsigned samples = a.tile_samples, features = a.features, rows = a.probes * samples;
  const T* const gates = static_cast<const T*>(y.gate);
  for (unsigned i = threadIdx.x; i < samples * features; i += kThreads) {
    const unsigned s = i / features, j = i - s * features;
    const int64_t n = first + s;
    if (n >= a.samples) break;
    const T g = gates ? gates[n * y.gate_step + j] : T(1);
    static_cast<T*>(a.y)[n * features + j] =
        g * h[s * a.stride + j] + static_cast<const T*>(y.bias)[n * y.bias_step + j];
  }
  for (unsigned base = 0; base < rows; base += kThreads / 4) {
    const unsigned r = base + threadIdx.x / 4, k = r / samples, s = r - k * samples;
    const int64_t n = first + s;
    const bool mine = r < rows && n < a.samples;
    double trace = 0, norm = 0;
    for (unsigned j = threadIdx.x % 4; mine && j < features; j += 4) {
      const T g = gates ? gates[n * y.gate_step + j] : T(1);
      const T je = g * h[(r + samples) * a.stride + j];
      trace += je * probe_at<T>(a, k, n, static_cast<int>(j));
      norm += je * je;
    }
    trace = lanes_sum(trace, 4);
    norm = lanes_sum(norm, 4);
    if (!mine || threadIdx.x % 4 != 0) continue;
    static_cast<T*>(a.trace)[k * a.samples + n] = static_cast<T>(trace);
    if (a.norm) static_cast<T*>(a.norm)[k * a.samples + n] = static_cast<T>(norm);
  }
}

// ---- the kernel --------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    fused_field_kernel(const FusedArgs a) {
  PFK_SHARED_MEMORY(memory);
  T* const h = reinterpret_cast<T*>(memory);
  T* const weights = h + a.rows * a.stride;
  for (int l = 0; a.resident && l < a.layers; ++l) {
    stage_weight(a.layer[l], weights + a.layer[l].at);
  }
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t first = tile * a.tile_samples;
    stage_input(a, first, h);
    for (int l = 0; l < a.layers; ++l) {
      const FusedLayer y = a.layer[l];
      if (!a.resident)
        stage_weight(y, weights);  // all threads have read the last one: see multiply
      __syncthreads();
      multiply_any(a, y, weights + y.at, h);
      __syncthreads();
      if (l == a.layers - 1) break;
      y.wide ? activate_any<true>(a, y, first, h) : activate_any<false>(a, y, first, h);
    }
    reduce_output(a, a.layer[a.layers - 1], first, h);
    __syncthreads();
  }
}

// ---- launches ----------------------------------------------------------------------------------
inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}
inline int power_of_two(int64_t least, int from = 1) {
  while (from < least) from *= 2;
  return from;
}

// Sets the layers for tiles of so many rows; returns the bytes of shared memory, or 0 if a thread's
// part of a product would be too large.
template <class T>
size_t lay_out(FusedArgs& a, int rows, bool resident) {
  a.rows = rows;
  a.resident = resident;
  a.tile_samples = rows / (1 + a.probes);
  a.tiles = a.tile_samples == 0 ? 0 : (a.samples + a.tile_samples - 1) / a.tile_samples;
  int widest = fours(a.features), together = 0, largest = 0;
  for (int l = 0; l < a.layers; ++l) {
    FusedLayer& y = a.layer[l];
    y.threads = power_of_two((y.out + 3) / 4, kThreads / rows);
    if (a.tile_samples == 0 || rows * y.threads > kFusedRows * kThreads) return 0;
    const int size = fours(y.in) * weight_stride(y.threads);
    y.at = resident ? together : 0;
    together += size;
    largest = max(largest, size);
    widest = max(widest, fours(y.out));
  }
  a.stride = (widest + 7) / 8 * 8 + 4;
  return (int64_t{rows} * a.stride + (resident ? together : largest)) * sizeof(T);
}

// Chooses the largest tile with which every multiprocessor has one, else the smallest; with all
// weights in shared memory if some tile leaves room for them.
template <class T>
size_t plan_tiles(FusedArgs& a, size_t most, int64_t processors) {
  for (const bool resident : {true, false}) {
    int fits = 0;
    for (int rows = 128; rows >= 32; rows /= 2) {
      const size_t bytes = lay_out<T>(a, rows, resident);
      if (bytes == 0 || bytes > most) continue;
      fits = rows;
      if (a.tiles >= processors) break;
    }
    if (fits) return lay_out<T>(a, fits, resident);
  }
  return 0;
}

template <class T>
bool describe(const Field& f, FusedArgs& a) {
  const FieldArgs& from = f.args;
  if (from.layers > kFusedLayers || from.features == 0 || from.probes >= kFusedWidest) return false;
  a.samples = from.samples;
  a.probes = static_cast<int>(from.probes);
  a.features = static_cast<int>(from.features);
  a.layers = from.layers;
  a.activation = from.activation;
  a.probe = from.probe;
  a.x = from.x;
  a.y = from.y;
  a.trace = from.trace;
  a.norm = from.norm;
  for (int l = 0; l < a.layers; ++l) {
    const FieldLayer& y = f.layers[l];
    if (y.in == 0 || y.out == 0 || max(y.in, y.out) > kFusedWidest) return false;
    void* const kept =
        from.kept && y.kept >= 0 ? static_cast<T*>(from.kept) + y.kept : static_cast<T*>(nullptr);
    const int lanes = 16 / sizeof(T);
    const bool wide =
        y.out % lanes == 0 && aligned16(kept) && aligned16(y.bias) && aligned16(y.gate);
    a.layer[l] = {y.weight,
                  y.bias,
                  y.gate,
                  kept,
                  static_cast<int>(y.in),
                  static_cast<int>(y.out),
                  static_cast<int>(y.bias_step),
                  static_cast<int>(y.gate_step),
                  0,
                  power_of_two(wide ? y.out / lanes : y.out),
                  0,
                  y.value_kept,
                  wide};
  }
  return true;
}

// Returns false, without doing anything, if the field is too wide.
template <class T>
bool fused_forward(const Field& f, cudaStream_t stream) {
  FusedArgs a{};
  if (!describe<T>(f, a)) return false;
  const int device = f.x.get_device_index();
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, device);
  const size_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const size_t bytes = plan_tiles<T>(a, most, processors);
  if (bytes == 0) return false;
  if (a.tiles == 0) return true;
  const size_t room = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int64_t side_by_side = sizeof(T) == 4 && 2 * (bytes + 1024) <= room ? 2 : 1;
  const auto blocks = static_cast<unsigned>(min(a.tiles, processors * side_by_side));
  PFK_LAUNCH_SHARED(fused_field_kernel<T>, blocks, kThreads, bytes, stream, a);
  return true;
}

}  // namespace
PFK_END
