// SPDX-License-Identifier: Apache-2.0
// The arguments of a spline kernel: where elements and their raw parameters lie.  All steps count
// elements.
#pragma once

#include "spline/spline.h"

namespace pfk {

// One tensor of raw parameters.  Column c of element q of sample n lies at
//   n sample + (q / length) outer + (q % length) inner + c bin.
// Gradients lie alike, or in rows that are grad_step apart.
struct SplineSource {
  const void* raw;
  void* grad;
  int columns, first;  // parameters of an element, and the column of a tile where they begin
  int64_t sample, outer, inner, bin;
  int64_t grad_step;
};

struct SplineArgs {
  SplineNumbers numbers;
  SplineForm form;
  int flags, columns;
  int64_t samples, features;  // transformed elements of a sample
  int64_t x_features;         // elements of a sample of x
  int64_t length;             // elements of a row; see SplineSource
  int64_t x_start, x_outer, x_inner;
  bool backward;
  bool masked;           // index says which elements are transformed
  const int32_t* index;  // their places in a sample of x; null where there are none
  bool full;             // masked: elements that are not transformed have parameters, too
  int64_t channels, space, pass_start, pass_channels;  // pass: not transformed; without a mask
  bool channels_last;
  int sources;
  SplineSource source[3];
  const void* in;
  void* out;      // forward: output; backward: gradient of the input
  void* log_det;  // forward, accumulation type, [N] or like x
  const void* grad_out;
  const void* grad_log;  // backward, accumulation type
};

}  // namespace pfk
