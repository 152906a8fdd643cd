// SPDX-License-Identifier: Apache-2.0
#include "core/simd.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace pfk {
namespace {

int supported_level() {
#if defined(__x86_64__) && PFK_SIMD_LEVELS > 1
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 && PFK_SIMD_LEVELS > 2 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int initial_level() {
  const char* names[] = {"baseline", "avx2", "avx512"};
  const int supported = supported_level();
  const char* wanted = std::getenv("PYFLOWKERN_SIMD");
  for (int level = 0; wanted != nullptr && level <= supported; ++level) {
    if (std::strcmp(wanted, names[level]) == 0) return level;
  }
  return supported;
}

std::atomic<int>& current() {
  static std::atomic<int> level{initial_level()};
  return level;
}

}  // namespace

int simd_level() { return current().load(std::memory_order_relaxed); }

}  // namespace pfk

// Called by Python through ctypes: tests run every level, show_config() prints the one in force.
extern "C" __attribute__((visibility("default"))) int pyflowkern_simd_level() {
  return pfk::simd_level();
}

// Returns the level now in force, which is the wanted one unless the processor lacks it.
extern "C" __attribute__((visibility("default"))) int pyflowkern_set_simd_level(int level) {
  if (level >= 0 && level <= pfk::supported_level()) pfk::current().store(level);
  return pfk::simd_level();
}

// Which release of the package the kernels belong to: Python refuses those of another one.
extern "C" __attribute__((visibility("default"))) const char* pyflowkern_version() {
  return PFK_VERSION;
}

// Counts the changes of the ops' schemas and of the numbers in core/codes.h: Python refuses a
// library that was built for other ones, as a kernel takes its arguments as they come.
extern "C" __attribute__((visibility("default"))) int pyflowkern_schemas() { return 10; }
