// SPDX-License-Identifier: Apache-2.0
// What networks of convolutions multiply: arguments, packed weights, and tiles of products.
#pragma once

#include <stdint.h>

#include "core/gemm.h"

// Plain data is the same for every SIMD level.
namespace pfk {

struct ConvLayer {
  int64_t in, out;
  int side;                 // of the filter: 1 or 3
  const void* weight;       // [out, in, side, side]
  const void* bias;         // [out]
  void* packed;             // blocks of rows: forward of out, backward of in
  int64_t kept;             // where its input lies among what a group of images keeps
  int64_t sums, bias_sums;  // where its gradients lie among the sums of a task
  void* grad_weight;
  void* grad_bias;
};

struct Planes {  // images whose pixels are a constant step apart
  void* p;       // or null
  int64_t image, channel, pixel;
};

struct ConvArgs {
  int64_t samples, height, width;
  int layers;
  bool residual, activate_last, backward;
  ConvLayer* layer;
  Planes x;
  Planes out;           // backward: its gradient
  Planes grad_x;        // or null
  const void* context;  // [samples, out of the first layer], or null
  void* grad_context;   // or null
  void* kept;           // or null
  int64_t kept_size;    // of a group of images
  int64_t images, groups, tasks;
  int64_t plane, stride;  // numbers from an image to the next, from a channel to the next
  int64_t rows;           // of a band of an image
  int64_t copy_stride, band_stride, widest;
  double* sums;  // backward: [tasks, size]
  int64_t size;
};

constexpr int64_t kConvMargin = 16;  // numbers before and after images, which vectors may read
constexpr int64_t kConvGroup = 128;  // pixels of a group of small images
constexpr int64_t kConvBand = 128;   // pixels of a band of a large image
constexpr int64_t kConvRun = 512;   // pixels whose gradients are summed in the dtype of the weights
constexpr int64_t kConvTask = 512;  // pixels of a task of a backward pass, at least
constexpr int64_t kConvTasks = 16;  // of a backward pass, at most

// Whole vectors of every SIMD level, but no multiple of 256 bytes: the numbers of a column would
// compete for few places in L1.
inline int64_t conv_padded(int64_t n) {
  const int64_t p = (n + 15) / 16 * 16;
  return p % 64 == 0 ? p + 16 : p;
}

// Whether the gradient of a weight takes vectors of the cotangents, and shifts the input.
inline bool conv_shifts_input(const ConvLayer& y) { return y.in < y.out; }

}  // namespace pfk

PFK_BEGIN

namespace {

// Rows of the next block where `left` rows are left.
template <class T>
int conv_block(int64_t left) {
  return static_cast<int>(left >= kMostRows<T> ? kMostRows<T>
                          : left >= kGemmRows  ? kGemmRows
                                               : left);
}

// The weight as blocks of rows for gemm.h: [row of the filter][column][channel][row of the block].
// Backward the filter is turned by half a turn, and its input and output are exchanged.
template <class T>
void conv_pack(const ConvLayer& y, bool backward) {
  const T* from = typed<T>(y.weight);
  T* to = typed<T>(y.packed);
  const int64_t rows = backward ? y.in : y.out, depth = backward ? y.out : y.in;
  const int64_t taps = y.side * y.side;
  const int64_t row_step = backward ? taps : y.in * taps, step = backward ? y.in * taps : taps;
  for (int64_t first = 0; first < rows;) {
    const int n = conv_block<T>(rows - first);
    for (int64_t k = 0; k < depth; ++k) {
      for (int r = 0; r < n; ++r) {
        const T* p = from + (first + r) * row_step + k * step;
        for (int64_t tap = 0; tap < taps; ++tap) {
          to[(tap * depth + k) * n + r] = p[backward ? taps - 1 - tap : tap];
        }
      }
    }
    to += taps * depth * n;
    first += n;
  }
}

// A sum of `outer` products of `depth`: left (r, k) times rows k of right, in two vectors.
template <class T>
struct ConvProduct {
  Left<T> left;
  int64_t left_outer;
  const T* right;
  int64_t second;  // from the first vector of right to the second one
  int64_t stride, right_outer;
  int64_t outer, depth;
};

// kPacked: left lies as conv_pack() puts it.
template <class T, int R, int C, bool kPacked>
void conv_tile(const ConvProduct<T>& p, Rows<T> out, bool add) {
  constexpr int w = Vec<T>::kLanes;
  const int64_t row = kPacked ? 1 : p.left.row, step = kPacked ? R : 1;
  Vec<T> sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      sum[r][c] = add ? Vec<T>::load(out.p + r * out.stride + c * w) : Vec<T>(T(0));
    }
  }
  for (int64_t o = 0; o < p.outer; ++o) {
    const T* l = p.left.p + o * p.left_outer;
    const T* right = p.right + o * p.right_outer;
    for (int64_t k = 0; k < p.depth; ++k) {
      Vec<T> b[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) b[c] = Vec<T>::load(right + c * p.second);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec<T> a = l[r * row];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sum[r][c] += a * b[c];
      }
      l += step;
      right += p.stride;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sum[r][c].store(out.p + r * out.stride + c * w);
  }
}

template <class T, int C, bool kPacked>
void conv_rows(int rows, const ConvProduct<T>& p, Rows<T> out, bool add) {
  constexpr int kMost = kMostRows<T>;
  if (rows == kMost) return conv_tile<T, kMost, C, kPacked>(p, out, add);
  switch (rows) {
    case 1:
      return conv_tile<T, 1, C, kPacked>(p, out, add);
    case 2:
      return conv_tile<T, 2, C, kPacked>(p, out, add);
    case 3:
      return conv_tile<T, 3, C, kPacked>(p, out, add);
    case 4:
      return conv_tile<T, 4, C, kPacked>(p, out, add);
    case 5:
      return conv_tile<T, 5, C, kPacked>(p, out, add);
    default:
      return conv_tile<T, kGemmRows, C, kPacked>(p, out, add);
  }
}

// Elements [begin, end) of the sums of all tasks, to those of the first one.
inline void conv_total(const ConvArgs& n, int64_t begin, int64_t end) {
  for (int64_t t = 1; t < n.tasks; ++t) {
    const double* from = n.sums + t * n.size;
    for (int64_t i = begin; i < end; ++i) n.sums[i] += from[i];
  }
}

// The gradients of a layer from the sums.
template <class T>
void conv_unpack(const ConvArgs& n, const ConvLayer& y) {
  const bool shifts_input = conv_shifts_input(y);
  const int64_t left = shifts_input ? y.in : y.out, right = shifts_input ? y.out : y.in;
  const int64_t taps = y.side * y.side, stride = conv_padded(right);
  T* to = typed<T>(y.grad_weight);
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t r = 0; r < left; ++r) {
      const double* from = n.sums + y.sums + (tap * left + r) * stride;
      // shifting the cotangents by one pixel is shifting the input by one the other way
      T* at = shifts_input ? to + r * taps + tap : to + r * right * taps + taps - 1 - tap;
      const int64_t step = shifts_input ? y.in * taps : taps;
      for (int64_t c = 0; c < right; ++c) at[c * step] = static_cast<T>(from[c]);
    }
  }
  for (int64_t c = 0; c < y.out; ++c) {
    typed<T>(y.grad_bias)[c] = static_cast<T>(n.sums[y.bias_sums + c]);
  }
}

}  // namespace

PFK_END
