// SPDX-License-Identifier: Apache-2.0
// Which SIMD level runs.  Every *_cpu.cpp is compiled once for each level, in an inline namespace
// of that name, so that the linker cannot merge AVX-512 code into the baseline.  The object of the
// baseline also registers the ops; it chooses the level at each call.
#pragma once

namespace pfk {

// 0 baseline, 1 AVX2 + FMA + F16C, 2 AVX-512.  Chosen once from the processor and the environment
// variable PYFLOWKERN_SIMD (baseline | avx2 | avx512); a level that the processor lacks is never
// chosen.
int simd_level();

}  // namespace pfk

// A library may be built without the last levels, as those for sanitizers are.
#if defined(PFK_SIMD_LEVELS) && PFK_SIMD_LEVELS > 1
#define PFK_DECLARE_LEVELS(...) \
  namespace pfk {               \
  namespace baseline {          \
  __VA_ARGS__;                  \
  }                             \
  namespace avx2 {              \
  __VA_ARGS__;                  \
  }                             \
  namespace avx512 {            \
  __VA_ARGS__;                  \
  }                             \
  }
#if PFK_SIMD_LEVELS > 2
#define PFK_CALL_LEVEL(function, ...)                                \
  (::pfk::simd_level() == 2   ? ::pfk::avx512::function(__VA_ARGS__) \
   : ::pfk::simd_level() == 1 ? ::pfk::avx2::function(__VA_ARGS__)   \
                              : ::pfk::baseline::function(__VA_ARGS__))
#else
#define PFK_CALL_LEVEL(function, ...)                            \
  (::pfk::simd_level() == 1 ? ::pfk::avx2::function(__VA_ARGS__) \
                            : ::pfk::baseline::function(__VA_ARGS__))
#endif
#else
#define PFK_DECLARE_LEVELS(...) \
  namespace pfk {               \
  namespace baseline {          \
  __VA_ARGS__;                  \
  }                             \
  }
#define PFK_CALL_LEVEL(function, ...) ::pfk::baseline::function(__VA_ARGS__)
#endif
