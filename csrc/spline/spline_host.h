// SPDX-License-Identifier: Apache-2.0
// From tensors to SplineArgs: where elements and their raw parameters lie, once for CPU and CUDA.
#pragma once

#include "core/host.h"
#include "spline/spline_args.h"
#include "spline/spline_form.h"

namespace pfk {

// A tensor [..., columns] whose rows are equally far apart, as kernels want it; a copy if they were
// not.
struct EvenRows {
  Tensor tensor;
  int64_t step;
};
inline EvenRows rows_of(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = t.dim() - 1;
  int64_t step = sizes[last], reach = 0;
  bool even = sizes[last] == 1 || strides[last] == 1, outer_seen = false;
  for (int64_t d = last - 1; d >= 0 && even; --d) {
    if (sizes[d] == 1) continue;
    if (!outer_seen) step = strides[d];
    even = outer_seen ? strides[d] == reach : step >= sizes[last];
    outer_seen = true;
    reach = strides[d] * sizes[d];
  }
  if (even) return {t, step};
  return {torch::stable::contiguous(t), sizes[last]};
}

struct SplineTensors {
  Canonical x;
  Tensor parts[3];
  std::optional<Tensor> mask;
  SplineArgs args{};
};

inline void add_source(SplineTensors& t, const Tensor& part, const SplineSource& where) {
  SplineArgs& a = t.args;
  t.parts[a.sources] = part;
  a.source[a.sources] = where;
  a.source[a.sources].raw = part.const_data_ptr();
  ++a.sources;
}

inline SplineArgs spline_args(const SplineForm& form, const SplineNumbers& numbers, int64_t flags) {
  SplineArgs a{};
  a.numbers = numbers, a.form = form;
  a.flags = checked_flags("flags", flags, kAllSplineFlags);
  a.columns = spline_map<float>(numbers, form, false).columns;
  return a;
}

// The raw parameters: side by side in one tensor, or in one each for widths, heights and
// derivatives.
struct SplineParts {
  const std::optional<Tensor>&packed, &widths, &heights, &derivatives;
};

// Every element has a row of its own, in each of one or three tensors.
inline SplineTensors elementwise_spline(const Tensor& x, const SplineParts& parts,
                                        const SplineArgs& args) {
  SplineTensors t{{x.is_contiguous() ? x : torch::stable::contiguous(x), false}, {}, {}, args};
  SplineArgs& a = t.args;
  a.samples = x.sizes()[0];
  a.features = a.x_features = image_shape(x).features();
  a.length = 1, a.x_outer = 1;
  int columns = 0;
  for (const auto* part : {&parts.packed, &parts.widths, &parts.heights, &parts.derivatives}) {
    if (!*part) continue;
    STD_TORCH_CHECK(t.args.sources < 3, "packed parameters, or widths, heights and derivatives");
    const EvenRows rows = rows_of(**part);
    const int64_t count = (*part)->sizes()[(*part)->dim() - 1];
    add_source(t, rows.tensor,
               {nullptr, nullptr, static_cast<int>(count), columns, a.features * rows.step,
                rows.step, 0, 1, 0});
    columns += static_cast<int>(count);
  }
  STD_TORCH_CHECK(columns == a.columns, "a spline of ", a.form.bins, " bins takes ", a.columns,
                  " numbers an element, got ", columns);
  return t;
}

// A part of x, whose parameters lie channel by channel.
inline SplineTensors coupling_spline(const Tensor& x, const Tensor& params,
                                     const std::optional<Tensor>& mask, const SplineArgs& args) {
  const Canonical c = canonical(x);
  SplineTensors t{c, {}, {}, args};
  SplineArgs& a = t.args;
  const ImageShape shape = image_shape(x);
  const int64_t space = shape.space, channels = shape.channels, p = a.columns;
  const int64_t moved = params.sizes()[1] / p, half = channels / 2;
  const bool swap = a.flags & kSplineSwap;
  a.samples = shape.samples, a.x_features = shape.features();
  a.features = moved * space;
  int64_t start = 0;
  if (mask) {
    t.mask = torch::stable::contiguous(*mask);
    a.masked = true, a.full = moved == channels;
  } else {
    a.pass_channels = channels - moved, a.pass_start = swap ? moved : 0;
    start = swap ? 0 : channels - half;
  }
  a.channels = channels, a.space = space, a.channels_last = c.channels_last;
  SplineSource s{nullptr, nullptr, static_cast<int>(p), 0, moved * p * space, 0, 0, 0, 0};
  if (c.channels_last) {
    a.length = moved, a.x_start = start, a.x_outer = channels, a.x_inner = 1;
    s.outer = moved * p, s.inner = p, s.bin = 1;
  } else {
    a.length = space, a.x_start = start * space, a.x_outer = space, a.x_inner = 1;
    s.outer = p * space, s.inner = 1, s.bin = space;
  }
  add_source(t, with_format(params, c.channels_last), s);
  return t;
}

// ---- the ops, given what runs filled SplineArgs on the device ----------------------------------
using RunSpline = void (*)(SplineArgs&, const Tensor& out, const std::optional<Tensor>& mask);

template <RunSpline kRun>
struct SplineOps {
  using Maybe = std::optional<Tensor>;

  static SplineTensors tensors(const Tensor& x, const Maybe& mask, const SplineParts& parts,
                               const SplineArgs& args) {
    if (!(args.flags & kSplineCoupling)) return elementwise_spline(x, parts, args);
    STD_TORCH_CHECK(parts.packed, "a coupling takes packed parameters");
    return coupling_spline(x, *parts.packed, mask, args);
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const Maybe& mask, const Maybe& packed,
                                            const Maybe& widths, const Maybe& heights,
                                            const Maybe& derivatives, int64_t kind, int64_t tails,
                                            int64_t parameterization, int64_t bins,
                                            std::vector<double> numbers, int64_t flags) {
    SplineTensors t = tensors(x, mask, {packed, widths, heights, derivatives},
                              spline_args(checked_form(kind, tails, parameterization, bins),
                                          spline_numbers(numbers), flags));
    Tensor y = empty_like_canonical(t.x);
    Tensor log_det = flags & kSplineElementwise ? empty_like_canonical(t.x, accumulation_type(y))
                                                : empty_per_sample(y, t.args.samples);
    t.args.in = t.x.tensor.const_data_ptr();
    t.args.out = y.mutable_data_ptr(), t.args.log_det = log_det.mutable_data_ptr();
    kRun(t.args, y, t.mask);
    return {y, log_det};
  }

  // Gradients of x, and of the parameters as they were given: of packed ones the second result; of
  // three tensors the third, fourth and fifth.  The others are empty.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x, const Maybe& mask,
      const Maybe& packed, const Maybe& widths, const Maybe& heights, const Maybe& derivatives,
      int64_t kind, int64_t tails, int64_t parameterization, int64_t bins,
      std::vector<double> numbers, int64_t flags) {
    SplineTensors t = tensors(x, mask, {packed, widths, heights, derivatives},
                              spline_args(checked_form(kind, tails, parameterization, bins),
                                          spline_numbers(numbers), flags));
    SplineArgs& a = t.args;
    const Tensor gy = with_format(grad_y, t.x.channels_last);
    const Tensor gl = dense_sums(grad_log_det, x);
    Tensor grad_x = empty_like_canonical(t.x), grads[3];
    for (int i = 0; i < 3; ++i) {
      if (i >= a.sources) {
        grads[i] = empty(grad_x, {0});
        continue;
      }
      SplineSource& s = a.source[i];
      const Canonical like{t.parts[i], flags & kSplineCoupling && t.x.channels_last};
      grads[i] = empty_like_canonical(like);
      s.grad = grads[i].mutable_data_ptr();
      s.grad_step = flags & kSplineCoupling ? 0 : s.columns;  // rows of a new tensor are contiguous
    }
    a.backward = true;
    a.in = t.x.tensor.const_data_ptr();
    a.out = grad_x.mutable_data_ptr();
    a.grad_out = gy.const_data_ptr(), a.grad_log = gl.const_data_ptr();
    kRun(a, grad_x, t.mask);
    if (packed) return {grad_x, grads[0], grads[1], grads[2], empty(grad_x, {0})};
    return {grad_x, empty(grad_x, {0}), grads[0], grads[1], grads[2]};
  }
};

}  // namespace pfk

#define PFK_REGISTER_SPLINE(key, run)                                     \
  STABLE_TORCH_LIBRARY_IMPL(pyflowkern, key, m) {                         \
    m.impl("spline", TORCH_BOX(&pfk::SplineOps<run>::forward));           \
    m.impl("spline_backward", TORCH_BOX(&pfk::SplineOps<run>::backward)); \
  }
