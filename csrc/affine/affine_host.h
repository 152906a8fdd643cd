// SPDX-License-Identifier: Apache-2.0
// From tensors to AffineArgs: the memory layout of every split and parameter layout, once for CPU
// and CUDA.
#pragma once

#include "affine/affine.h"
#include "core/host.h"

namespace pfk {

inline AffineGeometry coupling_geometry(const ImageShape& x, bool channels_last, bool masked,
                                        int layout, int kind, int flags) {
  const int64_t half = x.channels / 2, first = x.channels - half, s = x.space;
  const bool swap = flags & kSwap;
  const int64_t moved = masked ? x.channels : swap ? first : half;
  const int64_t start = masked || swap ? 0 : first;
  const int64_t passing = x.channels - moved, copy_start = swap ? first : 0;
  AffineGeometry g{};
  g.samples = x.samples;
  g.x_sample = x.features();
  if (channels_last) {
    g.rows = g.copy_rows = s;
    g.length = moved, g.copy_length = passing;
    g.x_row = g.copy_row = x.channels;
    g.x_start = start, g.copy_start = copy_start;
    g.mask_row = 1, g.mask_step = s;
  } else {
    g.rows = g.copy_rows = 1;
    g.length = moved * s, g.copy_length = passing * s;
    g.x_start = start * s, g.copy_start = copy_start * s;
    g.mask_step = 1;
  }
  const bool raw_first = layout >= kRawFirst;
  if (kind == kAdditive) {  // there are shifts only; feature-major ones, [N, moved, *space, 1], are
                            // contiguous
    const bool strided = channels_last && layout % kRawFirst == kFeatureMajor;
    g.p_sample = moved * s;
    g.p_step = strided ? s : 1;
    g.p_row = !channels_last ? 0 : strided ? 1 : moved;
    return g;
  }
  g.p_sample = 2 * moved * s;
  int64_t second = 0;
  switch (layout % kRawFirst) {
    case kBlocked:
      g.p_step = 1;
      g.p_row = channels_last ? 2 * moved : 0;
      second = channels_last ? moved : moved * s;
      break;
    case kInterleaved:
      if (channels_last || s == 1) {
        g.p_step = 2;
        g.p_row = channels_last ? 2 * moved : 0;
        second = 1;
      } else {  // each channel is a row
        g.rows = moved, g.length = s, g.x_row = s;
        g.mask_row = s;
        g.p_step = 1;
        g.p_row = 2 * s;
        second = s;
      }
      break;
    default:  // feature-major, contiguous [N, moved, *space, 2]
      g.p_step = channels_last ? 2 * s : 2;
      g.p_row = channels_last ? 2 : 0;
      second = 1;
  }
  (raw_first ? g.shift_start : g.raw_start) = second;
  return g;
}

// x, raw and shift have one shape and format: each sample is one row.
inline AffineGeometry elementwise_geometry(const ImageShape& x) {
  AffineGeometry g{};
  g.samples = x.samples;
  g.rows = 1;
  g.length = g.x_sample = g.p_sample = x.features();
  g.p_step = 1;
  return g;
}

inline ScaleNumbers scale_numbers(const std::vector<double>& n) {
  STD_TORCH_CHECK(n.size() == 6, "a scale map takes 6 numbers, got ", n.size());
  return {n[0], n[1], n[2], n[3], n[4], n[5]};
}

inline void set_map(AffineArgs& a, int64_t scale_kind, const std::vector<double>& scale_numbers_,
                    int64_t flags) {
  a.numbers = scale_numbers(scale_numbers_);
  a.kind = checked_kind("scale_kind", scale_kind, kScaleKinds);
  a.flags = checked_flags("flags", flags, kAllAffineFlags);
}

struct AffineTensors {
  Canonical x;  // forward: input; backward: what was kept
  Tensor raw, shift;
  std::optional<Tensor> mask;
  AffineArgs args;
};

inline AffineTensors elementwise_tensors(const Tensor& x, const std::optional<Tensor>& raw,
                                         const Tensor& shift, int64_t kind,
                                         const std::vector<double>& numbers, int64_t flags) {
  const Canonical c = canonical(x);
  AffineTensors t{c,
                  raw ? with_format(*raw, c.channels_last) : Tensor(),
                  with_format(shift, c.channels_last),
                  std::nullopt,
                  {}};
  t.args.g = elementwise_geometry(image_shape(x));
  set_map(t.args, kind, numbers, flags);
  STD_TORCH_CHECK(raw || kind == kAdditive, "a scale map of kind ", kind, " needs raw_scale");
  t.args.in = c.tensor.const_data_ptr();
  t.args.raw = raw ? address_of(t.raw) : nullptr;
  t.args.shift = t.shift.const_data_ptr();
  return t;
}

inline AffineTensors coupling_tensors(const Tensor& x, const Tensor& params,
                                      const std::optional<Tensor>& mask, int64_t layout,
                                      int64_t kind, const std::vector<double>& numbers,
                                      int64_t flags) {
  checked_kind("params_layout", layout, kParamsLayouts);
  const Canonical c = canonical(x);
  const ImageShape shape = image_shape(x);
  const bool feature_major = layout % kRawFirst == kFeatureMajor;
  AffineTensors t{
      c, Tensor(), with_format(params, c.channels_last && !feature_major), std::nullopt, {}};
  if (mask) t.mask = torch::stable::contiguous(*mask);
  AffineArgs& a = t.args;
  set_map(a, kind, numbers, flags);
  a.g = coupling_geometry(shape, c.channels_last, mask.has_value(), static_cast<int>(layout),
                          a.kind, a.flags);
  a.in = c.tensor.const_data_ptr();
  a.shift = a.raw = t.shift.const_data_ptr();  // one tensor; the geometry says where both start
  a.mask = mask ? static_cast<const uint8_t*>(address_of(*t.mask)) : nullptr;
  return t;
}

// ---- the ops, given what runs a filled AffineArgs on the device ---------------------------------
using RunAffine = void (*)(AffineArgs&, const Tensor& out, Tensor* log_det);

template <RunAffine kRun>
std::tuple<Tensor, Tensor> run_forward(AffineTensors t) {
  Tensor y = empty_like_canonical(t.x), log_det = empty_per_sample(y, t.args.g.samples);
  t.args.out = y.mutable_data_ptr();
  kRun(t.args, y, &log_det);
  return {y, log_det};
}

template <RunAffine kRun>
Tensor run_backward(AffineTensors& t, const Tensor& grad_y, const Tensor& grad_log_det) {
  const Tensor gy = with_format(grad_y, t.x.channels_last);
  const Tensor gl = dense_sums(grad_log_det, t.x.tensor);
  Tensor grad_x = empty_like_canonical(t.x);
  t.args.out = grad_x.mutable_data_ptr();
  t.args.grad_out = gy.const_data_ptr();
  t.args.grad_log_det = gl.const_data_ptr();
  kRun(t.args, grad_x, nullptr);
  return grad_x;
}

template <RunAffine kRun>
struct AffineOps {
  static std::tuple<Tensor, Tensor> affine(const Tensor& x, const std::optional<Tensor>& raw,
                                           const Tensor& shift, int64_t kind,
                                           std::vector<double> numbers, int64_t flags) {
    return run_forward<kRun>(elementwise_tensors(x, raw, shift, kind, numbers, flags));
  }

  static std::tuple<Tensor, Tensor, Tensor> affine_grad(
      const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& kept,
      const std::optional<Tensor>& raw, const Tensor& shift, int64_t kind,
      std::vector<double> numbers, int64_t flags) {
    AffineTensors t = elementwise_tensors(kept, raw, shift, kind, numbers, flags);
    Tensor grad_raw =
        empty_like_canonical({kind == kAdditive ? t.shift : t.raw, t.x.channels_last});
    if (kind == kAdditive) torch::stable::zero_(grad_raw);  // a shift alone has no other gradient
    Tensor grad_shift = empty_like_canonical({t.shift, t.x.channels_last});
    t.args.grad_raw = grad_raw.mutable_data_ptr();
    t.args.grad_shift = grad_shift.mutable_data_ptr();
    Tensor grad_x = run_backward<kRun>(t, grad_y, grad_log_det);
    return {grad_x, grad_raw, grad_shift};
  }

  static std::tuple<Tensor, Tensor> coupling(const Tensor& x, const Tensor& params,
                                             const std::optional<Tensor>& mask, int64_t layout,
                                             int64_t kind, std::vector<double> numbers,
                                             int64_t flags) {
    return run_forward<kRun>(coupling_tensors(x, params, mask, layout, kind, numbers, flags));
  }

  static std::tuple<Tensor, Tensor> coupling_grad(const Tensor& grad_y, const Tensor& grad_log_det,
                                                  const Tensor& kept, const Tensor& params,
                                                  const std::optional<Tensor>& mask, int64_t layout,
                                                  int64_t kind, std::vector<double> numbers,
                                                  int64_t flags) {
    AffineTensors t = coupling_tensors(kept, params, mask, layout, kind, numbers, flags);
    const bool feature_major = layout % kRawFirst == kFeatureMajor;
    Tensor grad_params = empty_like_canonical({t.shift, t.x.channels_last && !feature_major});
    t.args.grad_raw = t.args.grad_shift = grad_params.mutable_data_ptr();
    Tensor grad_x = run_backward<kRun>(t, grad_y, grad_log_det);
    return {grad_x, grad_params};
  }
};

}  // namespace pfk

#define PFK_REGISTER_AFFINE(key, run)                                                   \
  STABLE_TORCH_LIBRARY_IMPL(pyflowkern, key, m) {                                       \
    m.impl("affine", TORCH_BOX(&pfk::AffineOps<run>::affine));                          \
    m.impl("affine_backward", TORCH_BOX(&pfk::AffineOps<run>::affine_grad));            \
    m.impl("affine_coupling", TORCH_BOX(&pfk::AffineOps<run>::coupling));               \
    m.impl("affine_coupling_backward", TORCH_BOX(&pfk::AffineOps<run>::coupling_grad)); \
  }
