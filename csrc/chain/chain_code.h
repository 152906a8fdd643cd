// SPDX-License-Identifier: Apache-2.0
// A chain as a GPU runs it: instructions on the rows of a tile, one after the other.
//
// The host turns a program into a list of instructions for the forward pass and one for the
// backward pass (chain_listing.h), which know tensors by their numbers and rows of the tile by
// their places.  Lists hold no addresses: a program's stay on the device from its first call on.
#pragma once

#include "affine/affine.h"
#include "spline/spline.h"

PFK_BEGIN

constexpr int kChainSamples = 16;  // of a tile, whatever the GPU: a row has so many numbers

enum ChainOpKind : int {
  kProductOp,      // out = (M a(in)) f'(before) + bias + add
  kOuterOp,        // gradients += in a(add)^T; the sums of `in` too
  kSolveOp,        // out = T^-1 in, T a triangle
  kMoveOp,         // out[out_order] = in[in_order]
  kGatherOp,       // out[i] = in[p_i], p a tensor
  kScatterOp,      // its transpose
  kSpreadOp,       // out = a tensor, the same for all samples
  kElementsOp,     // out by parameters
  kElementsVjpOp,  // and the gradients: `in` is the input, `out` the gradient
  kActNormOp,
  kActNormVjpOp,
  kShiftOp,
  kRowSumsOp,  // gradients += sums of `in`
  kRowDotsOp,  // gradients += sums of in add, times the diagonal of a triangle
  kLogOp,      // log_det += the sum of a tensor
  kNormalOp,   // log_det += log N(in; 0, 1)
  kNormalVjpOp,
  kKeepOp,  // block of what is kept = in
  kLoadOp   // out = block of what is kept
};
enum ChainOpFlags : int {
  kTurned = 1,       // M^T; the transpose of a triangle
  kAdds = 2,         // out += ...
  kLower = 4,        // M is unit lower triangular
  kUpper = 8,        // M is upper triangular, with the diagonal sign e^log_diag
  kForContext = 16,  // left out where the context needs no gradient
  kForTensors = 32,  // left out where tensors need none
  kBackwards = 64,   // of an inverse
  kAffine = 128,     // elements: a scale map, not a spline
};

// What an instruction has not is -1: tensors, places in the integers of the list, rows.
struct alignas(16) ChainOp {
  int kind, flags = 0;
  int rows = 0, depth = 0;  // numbers of a column of the result, and of the sums
  int in = -1, out = -1, add = -1, before = -1;                    // rows of the tile
  int in_order = -1, out_order = -1;                               // integers
  int tensor = -1, second = -1, third = -1, bias = -1;             // tensors
  int stride = 0, prefix = -1, row_order = -1, column_order = -1;  // of a matrix
  int activation = 0, slope = 0;                                   // of `in`, and of `before`
  int map = -1, scale_kind = 0, feature_step = 0, param_step = 0, params = -1, scratch = -1;
  int block = -1;
  int64_t grad = 0, grad_bias = -1;  // places in the gradients of a task
};

template <class T>
struct ChainMap {
  AffineMap<T> affine;
  SplineMap<T> spline;
  T bound;  // of a shift
};

// How the gradient of a tensor follows from the sums over tasks, number by number.
enum ChainGradFlags : int {
  kGradZero = 1,
  kGradNegative = 2,
  kGradWithLog = 4,  // plus every sample's grad_log_det
  kGradNoSum = 8,    // that alone
  kGradLower = 16,   // a strict triangle
  kGradUpper = 32
};
struct ChainGradCode {
  int flags = kGradZero;
  int rows = 1, columns = 0;
  int prefix = -1, row_order = -1, column_order = -1;
  int64_t at = 0;
  int64_t first_block = 0;
};

// Addresses of tensors go to a kernel by value; where there are more, in memory.
constexpr int kChainPointers = 440;  // with the rest of ChainRun less than the 4 KiB of a kernel
struct ChainPointers {
  const void* const* many;
  const void* few[kChainPointers];
};

template <class T>
struct ChainRun {
  const ChainOp* ops;
  int count;
  int rows;   // of a tile
  int state;  // the rows where the result stands in the end
  int features, context, grad_context, grad_log, with_context;
  const int32_t* ints;
  const ChainMap<T>* maps;
  int64_t samples, tiles, tasks, blocks, size;
  const T *x, *c, *grad_z, *grad_log_det;
  T *z, *log_det, *kept, *grad_x, *grad_c, *grads;
  T* scratch;  // rows of each block, or null: they lie in shared memory
  ChainPointers tensors;
};

struct ChainFinish {
  const ChainGradCode* codes;
  int count;
  bool inverse;
  const int32_t* ints;
  const void* grads;
  int64_t tasks, size;
  ChainPointers out;
};

static_assert(sizeof(ChainRun<double>) <= 4096 && sizeof(ChainFinish) <= 4096);

PFK_END
