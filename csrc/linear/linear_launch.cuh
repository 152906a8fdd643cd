// SPDX-License-Identifier: Apache-2.0
// Channel mixing on a GPU: from tensors to launches.  Forward pass and gradients are compiled
// apart, because each takes a minute.
#pragma once

#include <type_traits>

#include "core/teams.cuh"
#include "linear/linear_mix.cuh"

PFK_BEGIN

// Gradients of weight, log_abs_det, log_scale and bias, into tensors of the accumulation dtype.
void mix_parameter_gradients(const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x,
                             const Tensor& weight, const std::optional<Tensor>& log_scale,
                             const std::optional<Tensor>& bias, bool inverse, Tensor& grad_weight,
                             Tensor& grad_log_abs_det, Tensor& grad_log_scale, Tensor& grad_bias);

namespace {

struct Plan {
  Canonical x;
  ImageShape shape;
  Pixels p;
  Tensor weight, log_scale, bias;  // contiguous
  bool scaled, biased, inverse;
};

inline Plan plan_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& log_scale,
                    const std::optional<Tensor>& bias, bool inverse) {
  Plan plan{
      canonical(x),          image_shape(x),   {},     torch::stable::contiguous(weight), {}, {},
      log_scale.has_value(), bias.has_value(), inverse};
  if (plan.scaled) plan.log_scale = torch::stable::contiguous(*log_scale);
  if (plan.biased) plan.bias = torch::stable::contiguous(*bias);
  const ImageShape& s = plan.shape;
  STD_TORCH_CHECK(s.channels <= kMost, "pyflowkern: linear_mix takes at most 128 channels, got ",
                  s.channels);
  plan.p = {s.samples * s.space, s.channels, plan.x.channels_last || s.space == 1 ? 0 : s.space,
            false};
  return plan;
}

template <class T>
Parameters<T> parameters_of(const Plan& p) {
  auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  return {{p.scaled, p.inverse},
          data(p.weight),
          p.scaled ? data(p.log_scale) : nullptr,
          p.biased ? data(p.bias) : nullptr};
}

// Pixels whose 16-byte packs are aligned in both tensors.
template <class S>
Pixels pixels_of(const Plan& plan, const void* a, const void* b) {
  Pixels p = plan.p;
  const int64_t run = p.inner == 0 ? p.channels : p.inner;
  p.wide = run % (16 / static_cast<int64_t>(sizeof(S))) == 0 && aligned16(a) && aligned16(b);
  return p;
}

// Calls f with the number of 8-channel groups that hold `channels`, as a constant.
template <class S, class F>
void each_size(int64_t channels, F f) {
#define PFK_SIZE(groups) \
  if (channels <= 8 * groups) return f(std::integral_constant<int, groups>{})
  PFK_SIZE(2);
  if constexpr (sizeof(S) == 4) {
    PFK_SIZE(3);
    PFK_SIZE(4);
    PFK_SIZE(6);
    PFK_SIZE(8);
    PFK_SIZE(12);
  } else {
    PFK_SIZE(4);
    PFK_SIZE(8);
  }
  f(std::integral_constant<int, 16>{});
#undef PFK_SIZE
}

inline unsigned blocks_of(int64_t pixels, int64_t tile, int64_t most) {
  const int64_t tiles = (pixels + tile - 1) / tile;
  return static_cast<unsigned>(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

}  // namespace
PFK_END
