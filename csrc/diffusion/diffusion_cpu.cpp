// SPDX-License-Identifier: Apache-2.0
// Steps of stochastic differential equations on the CPU.
//
// Lower bound of the time: a step reads the points and a drift and writes points, 12 bytes an
// element in float32.  Beside that, in AVX2 instructions for a vector of 8: Philox 28 (8 a round
// for 16 numbers), Box and Muller's transform some 30 (a logarithm, a root, a sine and a cosine for
// 16). Some 15 cycles, in which a core loads and stores 96 bytes from memory about as well.
#include "diffusion/diffusion.h"

#include "core/rows.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void diffusion_steps(const DiffusionArgs&, uint64_t, int, bool, int64_t,
                                        int64_t))

PFK_BEGIN
namespace {

template <class T, int kDrifts>
void step_task(const DiffusionArgs& a, uint64_t seed, int64_t task) {
  alignas(64) T noise[kRowBlock + kNormalPadding];
  const DiffusionStep<T> s(a);
  const int64_t first = task * kRowChunk;
  const int64_t last = first + kRowChunk < a.count ? first + kRowChunk : a.count;
  for (int64_t begin = first; begin < last; begin += kRowBlock) {  // whole Philox blocks
    const int64_t n = last - begin < kRowBlock ? last - begin : kRowBlock;
    normal_fill(begin / kNormals, (n + kNormals - 1) / kNormals, seed, a.stream, noise);
    const T *x = typed<T>(a.x) + begin, *drift = typed<T>(a.drift), *other = typed<T>(a.other);
    T* out = typed<T>(a.out) + begin;
    each_vector<T>(n, [&](int64_t i, auto part) {
      const Vec<T> at = load(x + i, part), z = Vec<T>::load(noise + i);
      if constexpr (kDrifts == 0) {
        store(diffusion_step(at, z, s), out + i, part);
      } else if constexpr (kDrifts == 1) {
        store(diffusion_step(at, load(drift + begin + i, part), z, s), out + i, part);
      } else {
        const Vec<T> u = load(drift + begin + i, part), v = load(other + begin + i, part);
        store(diffusion_step(at, u, v, z, s), out + i, part);
      }
    });
  }
}

template <class T>
void step_tasks(const DiffusionArgs& a, uint64_t seed, int drifts, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    drifts == 0   ? step_task<T, 0>(a, seed, task)
    : drifts == 1 ? step_task<T, 1>(a, seed, task)
                  : step_task<T, 2>(a, seed, task);
  }
}

}  // namespace

void diffusion_steps(const DiffusionArgs& a, uint64_t seed, int drifts, bool wide, int64_t begin,
                     int64_t end) {
  wide ? step_tasks<double>(a, seed, drifts, begin, end)
       : step_tasks<float>(a, seed, drifts, begin, end);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "diffusion/diffusion_host.h"

namespace pfk {
namespace {

Tensor diffusion_step_cpu(const Tensor& x, const std::optional<Tensor>& drift,
                          const std::optional<Tensor>& other, const Tensor& seed, int64_t stream,
                          double step, double scale) {
  const DiffusionTensors t = diffusion_tensors(x, drift, other, seed, stream, step, scale);
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const bool wide = dtype_of(x) == kFloat64;
  parallel_tasks((t.args.count + kRowChunk - 1) / kRowChunk, kRowChunk,
                 [&](int64_t begin, int64_t end) {
                   PFK_CALL_LEVEL(diffusion_steps, t.args, key, t.drifts, wide, begin, end);
                 });
  return t.out;
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("diffusion_step", TORCH_BOX(&pfk::diffusion_step_cpu));
}
#endif
