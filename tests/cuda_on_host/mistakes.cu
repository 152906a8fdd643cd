// SPDX-License-Identifier: Apache-2.0
// Kernels with one mistake each, which running on the host must show; and one without, of the
// functions that no kernel of the package uses yet.
#include "core/cuda.cuh"

PFK_BEGIN
namespace {

__global__ void forgets_the_last_element(float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n - 1) out[i] = 1.0f;
}

template <class T>  // most kernels are templates, whose variables are linked in another way
__global__ void reads_what_nobody_wrote(T* out, int n) {
  __shared__ T shared[kThreads];
  if (threadIdx.x > 0) shared[threadIdx.x] = 1.0f;
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) out[i] = shared[i];
}

__global__ void barrier_in_a_branch(float* out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) out[i] = 1.0f;
  if (i < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_without_a_lane(float* out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (i % 32 == 3) return;
  const float value = __shfl_down_sync(0xffffffffu, 1.0f, 1);
  if (i < n) out[i] = value;
}

__global__ void lane_beside_its_mask(float* out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  const float value = __shfl_down_sync(0x0000ffffu, 1.0f, 1);
  if (i < n) out[i] = value;
}

__global__ void pack_across_a_boundary(float* out, int) {
  if (threadIdx.x == 0) Pack<float, true>{{1.0f, 1.0f, 1.0f, 1.0f}}.store(out + 1);
}

// out: lanes with an odd number, whether any or all are below 16, and the sum and the largest of
// all threads.
__global__ void votes_and_atomics(float* out, int) {
  const int lane = static_cast<int>(threadIdx.x % 32), i = static_cast<int>(threadIdx.x);
  const unsigned odd = __ballot_sync(0xffffffffu, lane % 2 == 1);
  const bool any = __any_sync(0xffffffffu, lane < 16), all = __all_sync(0xffffffffu, lane < 16);
  __shared__ int sum, largest;
  if (i == 0) sum = largest = 0;
  __syncthreads();
  atomicAdd(&sum, i);
  atomicMax(&largest, i);
  __syncthreads();
  if (i != 77) return;
  out[0] = static_cast<float>(__popc(odd));
  out[1] = any;
  out[2] = all;
  out[3] = static_cast<float>(sum);
  out[4] = static_cast<float>(largest);
}

std::string last_error;

}  // namespace
PFK_END

// Runs mistake `which` with n elements of out; returns the error of the launch, or "".
extern "C" __attribute__((visibility("default"))) const char* pfk_mistake(int which, float* out,
                                                                          int n) {
  using namespace pfk;
  void (*const kernels[])(float*, int) = {forgets_the_last_element, reads_what_nobody_wrote<float>,
                                          barrier_in_a_branch,      shuffle_without_a_lane,
                                          lane_beside_its_mask,     pack_across_a_boundary,
                                          votes_and_atomics};
  last_error.clear();
  try {
    PFK_LAUNCH(kernels[which], 1, kThreads, nullptr, out, n);
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return last_error.c_str();
}
