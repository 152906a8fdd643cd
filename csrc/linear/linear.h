// SPDX-License-Identifier: Apache-2.0
// A matrix W over the channels of every pixel, alone or after ActNorm (the Glow step of Kingma and
// Dhariwal 2018).  With e = exp(s) (or 1), every map is y = A (x + pre) + post:
//   linear  y = W x + b              A = W              post = b
//           y = W (x - b)  (inverse) A = W              pre = -b
//   Glow    y = W diag(e) (x + b)    A = W diag(e)      pre = b
//           y = W x / e - b          A = diag(1/e) W    post = -b     (W holds the inverse matrix)
// The bias is never folded into A: where it cancels a large mean, x + pre is exact.
//
// With v = x + pre, G = sum_pixels grad_y v^T and g = sum_pixels grad_y,
//   grad_x = A^T grad_y,   grad_pre = A^T g,   grad_post = g,
//   grad_W = G diag(e) or diag(1/e) G,   grad_s = +-(column or row sums of G * A + pixels grad_ld).
#pragma once

#include "core/vec.h"

namespace pfk {

// A pixel is a vector of channels; `inner` consecutive pixels lie beside each other in memory
// within a channel, and inner = 0 says that the channels are innermost (vectors, channels_last).
struct MixArgs {
  int64_t pixels, channels, inner;
  int64_t stride;      // of the matrix; a multiple of 16, beyond `channels` all zero
  const void* matrix;  // A, or its transpose for the forward product of innermost channels
  const void* pre;     // [stride] in the type computed in, or null
  const void* post;
  const void* x;
  void* y;
  const void* grad_y;  // backward: x is then only read for G
  void* grad_x;        // or null
  double* partial;     // [tasks, channels, channels + 1]: G and g of each task; or null
  int64_t task;        // pixels of a task
};

// Where the parameters are in the table above.
struct MixMap {
  bool glow, inverse;
  PFK_HD bool bias_before() const { return glow != inverse; }
  PFK_HD double sign() const { return inverse ? -1.0 : 1.0; }
  // The channel whose scale multiplies W[i][j].
  PFK_HD int64_t scaled(int64_t i, int64_t j) const { return inverse ? i : j; }
};

}  // namespace pfk
