// SPDX-License-Identifier: Apache-2.0
// What decides on a GPU how Sinkhorn's iteration goes on: errors, prolonged steps, the next
// epsilon.
#pragma once

#include "transport/transport_kernels.cuh"

PFK_BEGIN
namespace {

// Adds up the errors of a problem's marginals, by a block, and decides whether it goes on.
enum CheckKind : int { kCheckOne, kCheckBoth, kOnlyError };

__device__ inline double error_of(const DeviceCloud& c, int64_t p, double* scratch) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < c.blocks; b += kThreads) sum += c.errors[p * c.blocks + b];
  return block_join(sum, scratch, Plus());
}

__global__ void __launch_bounds__(kThreads) check_kernel(const DeviceProblems d, int kind) {
  __shared__ double scratch[kThreads];
  const int64_t p = blockIdx.x;
  ProblemState& s = d.state[p];
  if (s.solved && kind != kOnlyError) return;
  double error = error_of(d.cloud[1], p, scratch);
  if (kind == kCheckBoth) {
    const double other = error_of(d.cloud[0], p, scratch);
    error = other > error || other != other ? other : error;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  s.error = error;
  if (kind == kOnlyError) return;
  const bool goes_on = d.o.tolerance > 0 ? error > d.o.tolerance : error == error;
  if (!(s.epsilon > d.o.epsilon) && !goes_on) {
    s.solved = 1;
  } else {
    ++s.done, ++s.level;
  }
}

// Prolongs the step of y, by a block a problem: see Prolonging in transport_solve.h.
__global__ void __launch_bounds__(kThreads) prolong_kernel(const DeviceProblems d) {
  __shared__ double scratch[kThreads];
  const int64_t p = blockIdx.x;
  ProblemState& s = d.state[p];
  if (s.solved) return;
  const DeviceCloud& c = d.cloud[1];
  const int64_t begin = p * c.count;
  const int memory = s.level > 1 ? s.memory : kNoStep;
  const bool smallest = has_not_grown(s.error, s.last_error);
  const bool back = memory == kProlongedStep && !smallest;
  double length = 0;
  if (memory != kNoStep && smallest) {
    double product = 0, square = 0;
    for (int64_t i = threadIdx.x; i < c.count; i += kThreads) {
      const int64_t at = begin + i;
      const double step = c.next[at] - c.potential[at], change = step - c.step[at];
      product += c.mass[at] * step * change, square += c.mass[at] * change * change;
    }
    product = block_join(product, scratch, Plus());
    square = block_join(square, scratch, Plus());
    length = prolonged_by(product, square);
  }
  for (int64_t i = threadIdx.x; i < c.count; i += kThreads) {
    const int64_t at = begin + i;
    const double next = c.next[at], before = c.last[at];
    c.last[at] = next, c.step[at] = next - c.potential[at];
    if (back) c.next[at] = before;
    if (length > 0) c.next[at] = next + length * (next - before);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  s.last_error = smallest_error(memory != kNoStep, s.last_error, s.error);
  s.memory = back ? kNoStep : length > 0 ? kProlongedStep : kPlainStep;
}

// After an iteration with a larger epsilon: the next one, by a thread a problem.  `last` leaves no
// larger one.
__global__ void __launch_bounds__(kThreads) epsilon_kernel(const DeviceProblems d, bool last) {
  const int64_t p = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (p >= d.problems) return;
  ProblemState& s = d.state[p];
  if (last) s.epsilon = d.o.epsilon;
  if (s.solved || !(s.epsilon > d.o.epsilon)) return;
  if (d.o.symmetric) {
    if (s.epsilon == s.extent && s.level < 2) return;  // as in transport_solve.h
  } else if (s.level < kLevelIterations && s.error > kLevelTolerance) {
    return;
  }
  s.epsilon = max(s.epsilon * d.o.scaling, d.o.epsilon);
  s.level = 0;
}

}  // namespace
PFK_END
