// SPDX-License-Identifier: Apache-2.0
// A fault on purpose, in every sanitized library: a run without findings counts only where the
// sanitizer reports this one.
#include <torch/csrc/stable/c/shim.h>

#include <memory>

// Reads behind an array of n numbers, or lets the tasks of a region write one number.
extern "C" __attribute__((visibility("default"))) int pyflowkern_planted_fault(int n) {
#ifdef __SANITIZE_THREAD__
  int sum = 0;
  const auto add = [](int64_t begin, int64_t end, void* sum) {
    volatile int& total = *static_cast<volatile int*>(sum);
    for (int64_t i = begin; i < end; ++i) total = total + 1;
  };
  torch_parallel_for(0, n, 1, add, &sum);
  return sum;
#else
  const std::unique_ptr<volatile int[]> numbers(new volatile int[n]());
  return numbers[n];
#endif
}
