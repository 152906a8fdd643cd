// SPDX-License-Identifier: Apache-2.0
// torch's parallel_for for the library that the thread sanitizer watches (--wrap of the linker puts
// it in the place of torch's).  torch hands ranges to the threads of libgomp, whose barriers are
// futexes that the sanitizer does not see: every region would look like a race with what follows
// it.  Here a region has threads of its own, whose start and end the sanitizer knows.  A range is
// cut as finely as there are threads, whatever the grain: a kernel may rely on no smallest part.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 4;
thread_local bool in_region = false;

}  // namespace

extern "C" AOTITorchError __wrap_torch_parallel_for(int64_t begin, int64_t end, int64_t /*grain*/,
                                                    ParallelFunc f, void* context) {
  std::atomic<bool> failed{false};
  const auto run = [&](int64_t from, int64_t to) {
    const bool outer = in_region;
    in_region = true;
    try {
      f(from, to, context);
    } catch (...) {
      failed = true;
    }
    in_region = outer;
  };
  const int64_t parts = in_region ? 1 : std::min(kThreads, end - begin);
  std::vector<std::thread> others;
  for (int64_t k = 1; k < parts; ++k) {
    others.emplace_back(run, begin + (end - begin) * k / parts,
                        begin + (end - begin) * (k + 1) / parts);
  }
  if (begin < end) run(begin, begin + (end - begin) / parts);
  for (std::thread& other : others) other.join();
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}
