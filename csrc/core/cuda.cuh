// SPDX-License-Identifier: Apache-2.0
// What every CUDA kernel shares: storage types, 16-byte packs, block sums, launches on torch's
// current stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "core/host.h"
#include "core/math.h"

// Launches, and shared memory whose size is known at the launch, are macros.  Tests that run
// kernels on the host, where there is no <<<>>>, define others.
#if !defined(PFK_LAUNCH)
#define PFK_LAUNCH(kernel, grid, block, stream, ...) \
  PFK_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define PFK_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  do {                                                             \
    ::pfk::allow_shared(kernel, bytes);                            \
    kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__);           \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                                \
  } while (0)
#define PFK_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

PFK_BEGIN

constexpr int kThreads = 256;

#if defined(__CUDACC__)
// A kernel that uses more than 48 KiB of shared memory must say so first.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
}
#endif

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// ---- storage ------------------------------------------------------------------------------------
// Calls f with a value of the storage type of `t`.
template <class F>
void each_storage(const Tensor& t, F f) {
  switch (dtype_of(t)) {
    case kFloat32:
      return f(float{});
    case kFloat64:
      return f(double{});
    case kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(__half{});
  }
}

PFK_HD float widen(float x) { return x; }
PFK_HD double widen(double x) { return x; }
PFK_HD float widen(__half x) { return __half2float(x); }
PFK_HD float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class S>
PFK_HD S narrow(Compute<S> x) {
  if constexpr (sizeof(S) == sizeof(x)) {
    return x;
  } else {
    return S(x);
  }
}

// kCount consecutive elements moved in one access: 16 bytes, or a single element where rows are not
// aligned.
template <class S, bool kWide>
struct alignas(kWide ? 16 : sizeof(S)) Pack {
  static constexpr int kCount = kWide ? 16 / sizeof(S) : 1;
  S lanes[kCount];
  static PFK_HD Pack load(const S* p) { return *reinterpret_cast<const Pack*>(p); }
  PFK_HD void store(S* p) const { *reinterpret_cast<Pack*>(p) = *this; }
  // One instruction for the whole pack, by name.  From store() the compiler usually makes one, too,
  // but sometimes several (tests/test_cuda_report.py counts them).  This one costs more registers,
  // so it is used only where that happens.
  __device__ void store_whole(S* p) const {
#if defined(__CUDACC__)
    if constexpr (kWide) {
      uint4 bits;
      memcpy(&bits, this, sizeof(bits));
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(bits.x), "r"(bits.y),
                   "r"(bits.z), "r"(bits.w)
                   : "memory");
      return;
    }
#endif
    store(p);
  }
};

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Divides by a number that the host knows, by a multiplication and a shift (Granlund and Montgomery
// 1994): a 64-bit division takes a GPU some 70 instructions.  With 2^(s-1) < d <= 2^s and
// magic = ceil(2^(62+s) / d) <= 2^63, the error of 4 n magic / 2^(64+s) is below 1 / d for n <
// 2^62.
struct Divider {
  int64_t divisor = 1;
  uint64_t magic = uint64_t{1} << 62;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d) {
    while ((int64_t{1} << shift) < d) ++shift;
    const auto power = static_cast<unsigned __int128>(1) << (62 + shift);
    magic =
        static_cast<uint64_t>((power + static_cast<uint64_t>(d) - 1) / static_cast<uint64_t>(d));
  }
  __device__ int64_t quotient(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n) << 2, magic) >> shift);
  }
};

// ---- sums in a fixed order: the same bits every run ---------------------------------------
// Sum over groups of `size` neighbouring lanes of a warp, a power of two: the first of a group has
// it.  All lanes of the warp take part.
template <class T>
__device__ inline T lanes_sum(T value, int size = 32) {
  for (int offset = size / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset, size);
  }
  return value;
}

// Sum over the block; thread 0 has it.  `scratch` holds kThreads / 32 values.
template <class T>
__device__ inline T block_sum(T value, T* scratch) {
  value = lanes_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) value += scratch[w];
  }
  return value;
}

PFK_END
