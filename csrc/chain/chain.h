// SPDX-License-Identifier: Apache-2.0
// A chain of transforms of vectors, as data: permutations, ActNorm, matrices, shifts of a circle,
// and affine or spline maps of elements whose parameters a network computes from the vector itself
// (couplings, masked autoregressive layers) or that all samples share.
//
//   z = f_T(... f_1(x)),    log_det = sum of the log-dets (+ log N(z; 0, 1) with a base),
//
// or the inverse: the steps run from the last to the first, and what is kept, and all gradients,
// are those of the steps as they run.  Inverses of autoregressive steps are in chain_walk.h.
//
// A tile of samples goes through the whole chain while it is in cache.  A feature, or a unit of a
// network, is a row of the tile, and a column a sample: so weights are read as they lie, and
// parameters of elements come in whole vectors.  For the backward pass the input of each step is
// kept; everything else is computed again.  The gradients of a task, which is a few tiles, are
// summed in the task's own memory, and those of the tasks in their order: neither tiles nor tasks
// depend on the number of threads.
//
// Units of masked networks are sorted such that a unit reads the first inputs of its layer and no
// others (`prefix`), which saves half of the products.  Other libraries keep their weights in
// another order: `columns` and `rows` say which.
#pragma once

#include "actnorm/actnorm.h"
#include "affine/affine.h"
#include "matrix/matrix.h"
#include "spline/spline.h"

namespace pfk {

struct ChainLayer {
  int64_t in, out;
  int flags;           // ChainLayerFlags
  const void* given;   // the weight, rows of `lead` numbers
  int64_t lead;        // `in`; the first layer may read the context as its last inputs
  const void* weight;  // as it is read, rows of `stride`: those in another order or with a mask are
                       // copies, sorted and with zeros
  int64_t stride;
  const int32_t *columns, *rows;  // which column belongs to an input, which row to a unit, or null
  const void *panels, *turned;    // of the weight and of its transpose (core/gemm.h), or null
  const void* bias;               // or null
  const int32_t* prefix;          // masked: the inputs that each row reads, ascending
  int64_t before, after;  // rows of the tile: the layer's inputs before and after the activation
  int64_t grad, grad_stride, grad_bias;  // places in the gradients of a task
  int64_t adjoint;  // rows of the tile: the gradient of a hidden layer's output
  // What a layer between the first and the last does with the context c: it adds C c (+ d), or
  // multiplies its sums by the gate sigmoid(C c + d); sums and gate then have rows of the tile of
  // their own.  The first layer may add a(C c + d): `gate` are then the rows of C c + d.
  const void *context, *gate_bias;  // C [out, K], or null; d
  const void* context_bias;         // d of a sum that has a bias already, or null
  bool gated, activated;
  int64_t ungated, gate;
  int64_t grad_context, grad_gate_bias;
};

// Whether products read a copy of a layer's weight.
inline bool is_copied(const ChainLayer& y) {
  return y.prefix != nullptr || y.columns != nullptr || y.rows != nullptr;
}

// Moved features [begin, end), one after the other, to which the same map is done.  Parameter k of
// feature j is row first + (j - begin) feature_step + k param_step of the network's output.
struct ChainGroup {
  ElementFamily family;
  int kind, flags;  // of a scale map
  ScaleNumbers scale;
  SplineForm form;
  SplineNumbers spline;
  int64_t begin, end, first;
  int64_t per_feature, feature_step, param_step;
  int64_t row(int64_t j) const { return first + (j - begin) * feature_step; }
  int64_t rows() const { return (end - begin) * per_feature; }
};

// Elements: features `moves` change, by parameters that a network computes from features `reads`.
struct ChainElements {
  const ChainGroup* group;
  int groups;
  bool centred;  // the log-scales of a sample have mean 0
  bool turned;   // before a spline a feature is turned by half a circle as long as its interval
  int64_t reads, moves;
  const int32_t *read, *moved;
  // What the first layer reads: a feature, or where it has a frequency w its cos(w x) and sin(w x).
  const double* frequency;  // of each read, 0 for what is no angle; null: there are no angles
  const int32_t* start;     // which of the inputs is the first of a read
  int64_t inputs;
  bool inverse, residual, activate_blocks, activate_last;
  Activation activation;
  int layers;  // 0: the parameters are a tensor, `shared`
  ChainLayer* layer;
  const void* context_weight;  // of the first layer, K numbers in rows of `context_lead`, or null
  int64_t context_lead;
  const void* shared;
  int64_t grad_context, context_stride, grad_shared;
  int64_t params, params_count;  // rows of the tile: the output of the network
  int64_t rows, widest;          // rows of the tile in all; of the widest layer
  // An inverse whose network reads what it moves finds one feature after the other.
  bool walks;
  const int32_t* places;  // of each moved feature among the reads, -1: it is not read
  const int32_t* needs;   // [moves, hidden layers]: units that parameters of features up to it need
  int64_t passes;         // reads that are not moved, their places
  const int32_t* passing;
  int64_t pulled;  // rows of the tile: the gradients of an angle's cosine and sine
};

// The group of a moved feature.
inline const ChainGroup& group_of(const ChainElements& e, int64_t j) {
  const ChainGroup* g = e.group;
  while (g->end <= j) ++g;
  return *g;
}

// The first input of the network that a feature becomes, and how many these are.
inline int64_t first_input(const ChainElements& e, int64_t r) { return e.start ? e.start[r] : r; }
inline int64_t input_count(const ChainElements& e, int64_t r) {
  return e.frequency != nullptr && e.frequency[r] != 0 ? 2 : 1;
}

struct ChainStep {
  int kind;                    // ChainStepKind
  int first_tensor;            // of the tensors of the program
  int block;                   // which of the kept inputs is this step's; -1: none
  const int32_t* index;        // of a permutation
  const void *first, *second;  // ActNorm: scale and bias; matrix; shift
  const void* given;           // ActNorm: log-scale; log|det| of a matrix, or the factors' diagonal
  double bound;
  int64_t grad, grad_second, stride;  // places in the gradients of a task; rows of a matrix
  ChainElements elements;
};

// A gradient that is returned, unless a step makes several together: sums over tasks of rows [at +
// r stride, + columns).
struct ChainGrad {
  void* out;
  int64_t rows, columns, at, stride;
  bool negative;             // the sum is that of the negative: inverses of shifts
  bool of_log_det;           // of log|det| itself: the sum of grad_log_det
  int layer = -1, step = 0;  // of a layer, whose order may be another
  int part = 0;              // of it: ChainPart
};

// The tensors of a layer: its weight, what has a number for each unit, and weights of a context.
enum ChainPart : int { kNoPart, kWeightPart, kUnitPart, kContextPart };

struct ChainArgs {
  int64_t samples, features, context;
  bool normal;   // the base
  bool inverse;  // the direction
  int64_t steps;
  ChainStep* step;
  const void *x, *c;  // c: [samples, context], or null
  void *z, *log_det;
  void* kept;                         // or null
  int64_t blocks;                     // of a tile in `kept`
  double log_det_of_all;              // what is the same for all samples
  const void *grad_z, *grad_log_det;  // backward; null: zero
  void *grad_x, *grad_c;              // or null
  void* grads;                        // [tasks, size]; the first number is the sum of grad_log_det
  int64_t size;
  int64_t tile, tiles, tasks, width;  // samples of a tile; rows of a tile lie `width` apart
  int64_t rows, widest;               // of the work space: the most of any step
};

// Samples of a tile, at most: pairs of vectors.  Weights, and even more their gradients, are read
// from L3 or memory once a tile where they are larger than L2: then tiles are larger, too.
constexpr int64_t kChainTile = 128, kWideTile = 256;
constexpr int64_t kWideUnits = 144;

// Numbers of a sample in a tile that is kept: whole vectors, whatever the level.
inline int64_t chain_columns(int64_t samples) { return (samples + 15) / 16 * 16; }

}  // namespace pfk
