// SPDX-License-Identifier: Apache-2.0
// What CUDA C++ adds to C++, for a host compiler: enough for csrc/*/*_cuda.cu to compile unchanged
// and run on fibers.h.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <type_traits>

#include "fibers.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
#define __restrict__ __restrict

#define threadIdx ::pfk_host::thread_index
#define blockIdx ::pfk_host::block_index
#define blockDim ::pfk_host::block_size
#define gridDim ::pfk_host::grid_size
#define __syncthreads() ::pfk_host::sync_threads(__FILE__, __LINE__)
#define __syncwarp(...) ::pfk_host::warp_barrier(__FILE__, __LINE__, ##__VA_ARGS__)
#define __shfl_down_sync(...) ::pfk_host::shuffle_down(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) ::pfk_host::shuffle_xor(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_sync(...) ::pfk_host::shuffle(__FILE__, __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, holds) ::pfk_host::ballot(mask, holds, __FILE__, __LINE__)
#define __any_sync(mask, holds) (__ballot_sync(mask, holds) != 0)
#define __all_sync(mask, holds) (__ballot_sync(mask, holds) == (mask))

struct dim3 : pfk_host::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : pfk_host::Index{x, y, z} {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMultiProcessorCount
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = pfk_host::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  if (which == cudaDevAttrMultiProcessorCount) {
    *value = 2;  // a block has more than one tile to do
  } else {
    *value = pfk_host::shared_limit;
  }
  return cudaSuccess;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Atomic for ThreadSanitizer's sake; relaxed, as on a GPU: they order nothing else.
template <class T>
T atomicExch(T* p, T value) {
  T old;
  __atomic_exchange(p, &value, &old, __ATOMIC_RELAXED);
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  __atomic_compare_exchange(p, &expected, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T, class F>
T atomic_update(T* p, F f) {
  T old, updated;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    updated = f(old);
  } while (
      !__atomic_compare_exchange(p, &old, &updated, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [&](T old) { return old + value; });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [&](T old) { return value < old ? value : old; });
}

namespace pfk_host {

template <class T>
T read(const void* p) {
  T value;
  memcpy(&value, p, sizeof(T));
  return value;
}

// A lane beyond its group of `width` gets its own value back, as on a GPU.
template <class T>
T shuffle(const char* file, int line, uint32_t mask, T value, int from, int width = 32) {
  const int first = lane() / width * width;
  return read<T>(exchange(mask, &value, sizeof(T), first + from % width, file, line));
}
template <class T>
T shuffle_down(const char* file, int line, uint32_t mask, T value, unsigned delta, int width = 32) {
  const int in_group = lane() % width + static_cast<int>(delta);
  const int source = in_group < width ? lane() + static_cast<int>(delta) : lane();
  return read<T>(exchange(mask, &value, sizeof(T), source, file, line));
}
template <class T>
T shuffle_xor(const char* file, int line, uint32_t mask, T value, int bits, int width = 32) {
  const int source = lane() ^ bits;
  const bool inside = source / width == lane() / width;
  return read<T>(exchange(mask, &value, sizeof(T), inside ? source : lane(), file, line));
}
inline void warp_barrier(const char* file, int line, uint32_t mask = 0xffffffffu) {
  sync_warp(mask, file, line);
}

// As much as a block of an H100 may ask for; before each launch full of NaN.
constexpr size_t kMostShared = 227 * 1024;
alignas(16) inline unsigned char shared_memory[kMostShared];

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            const Arguments&... arguments) {
  if (shared > kMostShared) throw std::runtime_error("too much shared memory");
  memset(shared_memory, 0xff, shared);
  poison_shared();
  auto body = [&] { kernel(arguments...); };
  run(name, grid, block, [](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body);
}

}  // namespace pfk_host

#define PFK_LAUNCH(kernel, grid, block, stream, ...) \
  PFK_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define PFK_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...)                    \
  do {                                                                                \
    (void)(stream);                                                                   \
    ::pfk_host::launch(#kernel, kernel, dim3(grid), dim3(block), bytes, __VA_ARGS__); \
  } while (0)
#define PFK_SHARED_MEMORY(name) unsigned char* const name = ::pfk_host::shared_memory

// There is no device to fail or to guard.
#include <torch/csrc/stable/macros.h>
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) ((void)(call))
#include <torch/csrc/stable/accelerator.h>
namespace torch::stable::accelerator {
struct HostGuard {
  explicit HostGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard HostGuard

// Memory is handed out full of NaN: an element that no thread writes shows.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
namespace pfk_host {
constexpr int64_t kPoisoned = int64_t{1} << 30;  // beyond, tests count on pages that nobody touches
inline AOTITorchError empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                    int32_t type, int32_t device, int32_t index,
                                    AtenTensorHandle* out) {
  const AOTITorchError error =
      aoti_torch_empty_strided(dim, sizes, strides, type, device, index, out);
  void* data = nullptr;
  int64_t bytes = 0;
  if (error == AOTI_TORCH_SUCCESS && aoti_torch_get_data_ptr(*out, &data) == AOTI_TORCH_SUCCESS &&
      aoti_torch_get_storage_size(*out, &bytes) == AOTI_TORCH_SUCCESS && data &&
      bytes <= kPoisoned) {
    memset(data, 0xff, static_cast<size_t>(bytes));
    watch(data, static_cast<size_t>(bytes));
  }
  return error;
}
}  // namespace pfk_host
#define aoti_torch_empty_strided ::pfk_host::empty_strided

// The library registers under a namespace of its own, for tensors on the CPU.
#include <torch/csrc/stable/library.h>
#undef STABLE_TORCH_LIBRARY_IMPL
#define PFK_REGISTER_IN(ns, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) PFK_REGISTER_IN(PFK_OPS, m)
