// SPDX-License-Identifier: Apache-2.0
// Splines on a GPU.
//
// Lower bound of the time: the bytes of spline_cpu.cpp over the copy bandwidth.  At K = 8 raw
// parameters are 92 of 100 bytes an element.  They are moved to shared memory, in 16-byte packs
// where rows are contiguous; there one thread works on each element.  A warp adds up the log-det of
// a sample; where a sample takes several blocks, a second kernel adds up their sums in order.
#include "core/teams.cuh"
#include "spline/spline_host.h"
#include "spline/spline_kernel.cuh"

PFK_BEGIN
namespace {

// The channels that a mask over channels transforms, in order; -1 where it has fewer than it
// should.
__global__ void __launch_bounds__(kThreads)
    channels_kernel(const bool* mask, int64_t channels, int64_t space, int32_t* moved_channels,
                    int64_t moved) {
  if (threadIdx.x != 0) return;
  int64_t rank = 0;
  for (int64_t c = 0; c < channels && rank < moved; ++c) {
    if (mask[c * space]) moved_channels[rank++] = static_cast<int32_t>(c);
  }
  for (; rank < moved; ++rank) moved_channels[rank] = -1;
}

// Copies elements that are not transformed: rows of `length`, or whole samples.
template <class S, bool kWide>
__global__ void __launch_bounds__(kThreads)
    pass_kernel(const S* from, S* to, int64_t total, Divider length, int64_t start, int64_t step) {
  using P = Pack<S, kWide>;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * P::kCount;
  if (i >= total) return;
  const int64_t row = length.quotient(i), at = start + row * step + (i - row * length.divisor);
  P::load(from + at).store(to + at);
}

template <class S>
void launch_pass(const SplineArgs& a, bool whole, cudaStream_t stream) {
  const int64_t inner = a.channels_last ? 1 : a.space;
  const int64_t step = a.channels_last ? a.channels : a.x_features;
  const int64_t length = whole ? step : a.pass_channels * inner;
  const int64_t start = whole ? 0 : a.pass_start * inner;
  const int64_t total = a.samples * (a.channels_last ? a.space : 1) * length;
  if (total == 0) return;
  const S* from = static_cast<const S*>(a.backward ? a.grad_out : a.in);
  constexpr int64_t w = 16 / sizeof(S);
  const bool wide =
      length % w == 0 && start % w == 0 && step % w == 0 && aligned16(from) && aligned16(a.out);
  auto kernel = wide ? pass_kernel<S, true> : pass_kernel<S, false>;
  PFK_LAUNCH(kernel, grid_for((total + (wide ? w : 1) - 1) / (wide ? w : 1)), kThreads, stream,
             from, static_cast<S*>(a.out), total, Divider(length), start, step);
}

template <class S, bool kBackward>
void launch_kind(const SplineArgs& a, const SplineGrid& g, const bool* mask, size_t bytes,
                 int64_t blocks, cudaStream_t stream) {
  const SplineMap<Compute<S>> m =
      spline_map<Compute<S>>(a.numbers, a.form, a.flags & kSplineInverse);
  auto kernel = m.kind == kRational       ? spline_kernel<kRational, S, kBackward>
                : m.kind == kLinearSpline ? spline_kernel<kLinearSpline, S, kBackward>
                : m.kind == kQuadratic    ? spline_kernel<kQuadratic, S, kBackward>
                                          : spline_kernel<kCubic, S, kBackward>;
  PFK_LAUNCH_SHARED(kernel, grid_of(blocks), kSplineThreads, bytes, stream, a, m, g, mask);
}

// Whether the raw parameters of every block, and their gradients, are contiguous and begin on
// packs.
template <class S>
bool fits_packs(const SplineArgs& a, const SplineGrid& g) {
  constexpr int64_t w = 16 / sizeof(S);
  for (int j = 0; j < a.sources; ++j) {
    const SplineSource& s = a.source[j];
    const int64_t between = a.length == 1 ? s.outer : s.inner;
    const int64_t elements = g.rows > 0 ? g.rows * a.features : g.elements;
    if (s.bin != 1 || between != s.columns || s.sample != a.features * between ||
        (a.length != 1 && s.outer != a.length * between) || elements * s.columns % w != 0 ||
        (g.rows == 0 && a.features * s.columns % w != 0) || !aligned16(s.raw) || !aligned16(s.grad))
      return false;
  }
  return true;
}

template <class S>
void launch(SplineArgs& a, void* workspace, const bool* mask, SplineGrid g, cudaStream_t stream) {
  using T = Compute<S>;
  const SplineMap<T> m = spline_map<T>(a.numbers, a.form, false);
  g.stride = (m.columns + m.scratch) | 1;
  auto bytes_of = [&](int64_t n) {
    return static_cast<size_t>(n) * (g.stride * sizeof(T) + 2 * sizeof(T) + sizeof(int64_t));
  };
  g.elements = kSplineThreads;
  while (g.elements > 32 && bytes_of(g.elements) > 48 * 1024) g.elements /= 2;
  int64_t blocks;  // none without a transformed element
  g.rows = 0;
  if (a.features > 0 && a.features <= g.elements)
    g.rows = static_cast<int>(g.elements / a.features);
  g.chunks = (a.features + g.elements - 1) / g.elements;
  blocks = g.rows > 0 ? (a.samples + g.rows - 1) / g.rows : a.samples * g.chunks;
  g.features = Divider(a.features > 0 ? a.features : 1);
  g.length = Divider(a.length > 0 ? a.length : 1);
  g.wide = fits_packs<S>(a, g);
  const int64_t group = g.rows > 0 ? g.rows * a.features : g.elements;
  g.wide_x = !(a.flags & kSplineCoupling) && group % (16 / sizeof(S)) == 0 &&
             (g.rows > 0 || a.features % (16 / sizeof(S)) == 0) && aligned16(a.in) &&
             aligned16(a.out) && aligned16(a.grad_out);
  g.partial = static_cast<double*>(workspace);
  const size_t bytes = bytes_of(g.elements);
  if (a.flags & kSplineCoupling && !a.full) launch_pass<S>(a, a.masked, stream);
  if (a.backward) {
    if (blocks > 0) launch_kind<S, true>(a, g, mask, bytes, blocks, stream);
    return;
  }
  if (blocks > 0) launch_kind<S, false>(a, g, mask, bytes, blocks, stream);
  if (g.rows > 0 || a.flags & kSplineElementwise) return;
  TeamPlan plan{a.samples, a.features, g.elements, g.chunks, kThreads};
  launch_sum_chunks(plan, TeamSums<T>{static_cast<T*>(a.log_det), g.partial, 0.0, nullptr}, stream);
}

void run_spline_cuda(SplineArgs& a, const Tensor& out, const std::optional<Tensor>& mask) {
  if (a.samples == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const cudaStream_t stream = current_stream(out);
  // for the largest number of chunks; torch's allocator reuses memory in stream order
  const bool sums = !a.backward && !(a.flags & kSplineElementwise) && a.features > 32;
  const Tensor partial =
      empty(out, {sums ? a.samples * ((a.features + 31) / 32) : 0}, ScalarType::Double);
  const bool* moved = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  SplineGrid g{};
  Tensor channel;
  if (a.masked && !a.full && a.features > 0) {
    const int64_t count = a.features / a.space;
    channel = empty(out, {count}, ScalarType::Int);
    int32_t* channels = static_cast<int32_t*>(channel.mutable_data_ptr());
    PFK_LAUNCH(channels_kernel, 1, kThreads, stream, moved, a.channels, a.space, channels, count);
    g.channel = channels;
  }
  each_storage(
      out, [&](auto s) { launch<decltype(s)>(a, partial.mutable_data_ptr(), moved, g, stream); });
}

}  // namespace
PFK_END

PFK_REGISTER_SPLINE(CUDA, pfk::run_spline_cuda)
