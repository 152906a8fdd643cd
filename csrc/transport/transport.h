// SPDX-License-Identifier: Apache-2.0
// Entropic optimal transport between two clouds of points, whose plan is
//   P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon),   C_ij = scale |x_i - y_j|^2.
//
// No matrix of n x m numbers is ever held: every pass makes the scores
//   t_ij = w_j + kappa r_ij - h_i,   in units of log 2,
// tile by tile and uses them at once.  r_ij is a squared distance where points have few coordinates
// (kappa = -scale / (epsilon log 2)), which loses no digits, else a product <x_i, y_j> (kappa = 2
// scale / (epsilon log 2)); the squares of the points are then part of w and h.  Both clouds are
// centred, so that the squares are as small as they can be.
//
// Half an iteration of Sinkhorn (Sinkhorn and Knopp 1967; Cuturi 2013) is the soft minimum
//   s_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon),   f_i = damp s_i,
// where damp is 1, or rho / (rho + epsilon) if the marginal of x is only penalized, by rho KL
// (Chizat, Peyre, Schmitzer and Vialard 2018).  Row i of the plan then sums to a_i exp((f_i - s_i)
// / epsilon) with the old f, which gives the error of the marginals without another pass.
#pragma once

#include "core/math.h"

namespace pfk {

constexpr double kLog2 = 0.69314718055994530942;
constexpr int kDirectDepth = 4;  // coordinates up to which r_ij is a squared distance
// Bytes of products of a small problem that are kept from one iteration to the next, for each order
// of rows and columns: at 64 coordinates that is four times as fast as making them anew.
constexpr int64_t kKeptBytes = int64_t{1} << 22;

// What a pass over tiles reads.  Rows and columns are the two clouds, in either order.
struct ScoreArgs {
  int64_t rows, columns, depth;
  const void* points;   // [rows, depth]
  const void* packed;   // the columns' points as panels of core/matmul.h, padded with zeros
  const void* weights;  // w_j, padded with numbers that no score survives
  double kappa;
  bool direct;
  const void* kept;  // all r_ij, padded rows of `kept_row` numbers, or null: made tile by tile
  int64_t kept_row;
};

struct SoftminArgs {
  ScoreArgs scores;
  int64_t task;             // rows of a task
  double* shift;            // [rows]: the last log2 of the sum, NaN where there was none
  const double* squares;    // [rows]: scale |x_i|^2, or null where r_ij is a squared distance
  double unit, epsilon;     // unit = epsilon log 2
  double damp, penalty;     // penalty: rho, 0 for a marginal that holds exactly
  const double* origin;     // [rows]: what centring took from the potential; null where damp is 1
  double blend;             // the step towards the new potential: 1, or 1/2 where both move at once
  const double* potential;  // [rows]
  double* result;           // [rows], the new potentials
  const double* mass;       // [rows]: a_i
  double* errors;           // [tasks]: sum of |marginal - what it should be| over the rows
};

// Iterations of a small problem, whose Gibbs kernel K_ij = 2^t_ij is kept (without masses).  The
// potentials move by factors: f_i by epsilon log u_i, g_j by epsilon log v_j.
struct GibbsArgs {
  ScoreArgs scores;     // rows are x
  int64_t task, row;    // rows of a task; numbers of a padded row of K
  const double* shift;  // h_i
  void* kernel;         // [rows, row]
  const double* mass;   // a_i
  const void* columns;  // [row]: b_j v_j, padded with zeros, or null where u is given
  double* factors;      // [rows]: u_i = 1 / sum_j K_ij b_j v_j
  void* sums;           // [tasks, row]: sum_i a_i u_i K_ij over the rows of a task
  int squarings;        // for a smaller epsilon, with v_j in `columns`
};

struct PlanProductArgs {
  ScoreArgs scores;
  int64_t task;
  const double* shift;  // h_i, such that 2^t_ij is an entry of the plan
  int64_t width;        // columns of the matrix
  const void* matrix;   // [columns, width], as panels
  void* out;            // [rows, width]
};

struct PlanDrawArgs {
  ScoreArgs scores;
  int64_t task;
  const double* shift;     // h_i
  const double* uniforms;  // [rows], in [0, 1)
  int64_t* out;            // [rows]: a column of each row
};

}  // namespace pfk
