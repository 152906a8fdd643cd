// SPDX-License-Identifier: Apache-2.0
// Small invertible matrices: one that is given (inverse, sign and log|det| by Gauss-Jordan
// elimination), and one that is built from triangles, W = P L U with U = upper + diag(sign e^d).
//
// Gauss-Jordan with partial pivoting (Peters and Wilkinson 1975) works in place.  Step k takes the
// row p with the largest |a_pk| of those not yet taken.  With f_i = a_ik / a_pk, and with column k
// then counted as 0 in the rows i and as 1 in row p,
//   a_i -= f_i a_p  (i != p),   a_p /= a_pk.
// At the end row p of step k is row k of the inverse, and column k its column p.  The rows not yet
// taken are those of an LU factorization: the same pivots, and a duplicate row cancels exactly.
// The error of the inverse is that of LU with substitution; the tests hold it to LAPACK's.
//
// Products with inverse triangles are computed by substitution.  With G = P^T grad W and W^-1 = V:
//   forward:  grad L = G U^T,         grad U = L^T G;
//   inverse:  Y = grad V P,  B = U^-T Y L^-T,   grad L = -L^-T B,   grad U = -B U^-T;
// the strict lower triangle of grad L, the upper one of grad U, and grad d = diag(grad U) sign e^d.
// P gathers rows: any indices within range have a meaning, repeated ones, too.
#pragma once

#include "core/math.h"

namespace pfk {

struct SlogdetArgs {
  int64_t size;
  const void* weight;  // [batch, C, C]
  void *sign, *log_abs_det, *inverse;
};

struct PluArgs {
  int64_t size;
  bool inverse;
  const int64_t* permutation;
  const void *lower, *upper, *log_diag, *sign;
  const void* grad;  // backward only
  void* out;         // forward only
  void *grad_lower, *grad_upper, *grad_log_diag;
};

}  // namespace pfk

PFK_BEGIN

template <class V>
PFK_HD V eliminate(V a, V factor, V pivot_row) {
  return a - factor * pivot_row;
}

// The term of a pivot in log|det|, in double: a product of pivots would overflow.
template <class T>
PFK_HD double log_pivot(T pivot) {
  return log_(abs_(static_cast<double>(pivot)));
}

// A triangular matrix; only the strict triangle of `entries` is read.
template <class T>
struct Triangle {
  const T* entries;
  int64_t row, column;  // strides
  bool is_lower;
  const T *log_diag, *sign;  // or null: a diagonal of ones

  PFK_HD const T* at(int64_t i, int64_t k) const { return entries + i * row + k * column; }
  PFK_HD bool holds(int64_t i, int64_t k) const { return is_lower ? k < i : k > i; }
  PFK_HD T diagonal(int64_t i) const {
    return log_diag == nullptr ? T(1) : sign[i] * exp_(log_diag[i]);
  }
  PFK_HD Triangle transposed() const { return {entries, column, row, !is_lower, log_diag, sign}; }
};

template <class T>
PFK_HD Triangle<T> lower_of(const PluArgs& a) {
  return {static_cast<const T*>(a.lower), a.size, 1, true, nullptr, nullptr};
}
template <class T>
PFK_HD Triangle<T> upper_of(const PluArgs& a) {
  return {static_cast<const T*>(a.upper), a.size, 1, false, static_cast<const T*>(a.log_diag),
          static_cast<const T*>(a.sign)};
}

PFK_END
