// SPDX-License-Identifier: Apache-2.0
// Small matrices on the CPU.
//
// Matrices are copied to buffers whose rows are padded to whole Vecs, so that every loop over a row
// is one over whole Vecs.  Lower bound of the time of an inverse: C^3 multiply-adds.  A step of
// Gauss-Jordan stores every element once, one Vec a cycle, which makes C^3 / lanes cycles while the
// matrix fits into L1 (up to C = 90 in float32).  Beside that, each step gathers a column, searches
// it for the pivot, divides it, and writes it back after the rows (written before, it would delay
// their loads).  Below C = 24 most of the time is the cost of the call.
#include "matrix/matrix.h"

#include "core/gemm.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void slogdet_inverse(const SlogdetArgs&, bool, int64_t, int64_t);
                   void plu(const PluArgs&, bool); void plu_backward(const PluArgs&, bool))

PFK_BEGIN

namespace {  // all families are linked into one library

// `count` blocks of `rows` rows, aligned and padded with zeros to whole Vecs.
template <class T>
struct PaddedBlocks {
  static constexpr int64_t kLanes = Vec<T>::kLanes, kAlign = 64;
  int64_t rows, width;
  char* memory;
  T* first;

  PaddedBlocks(int64_t count, int64_t rows, int64_t columns)
      : rows(rows), width((columns + kLanes - 1) / kLanes * kLanes) {
    const size_t bytes = count * rows * width * sizeof(T);
    memory = new char[bytes + kAlign];
    char* aligned = memory + (kAlign - reinterpret_cast<uintptr_t>(memory) % kAlign);
    memset(aligned, 0, bytes);
    first = reinterpret_cast<T*>(aligned);
  }
  ~PaddedBlocks() { delete[] memory; }
  PaddedBlocks(const PaddedBlocks&) = delete;
  PaddedBlocks& operator=(const PaddedBlocks&) = delete;
  T* block(int64_t b) const { return first + b * rows * width; }
};

// ---- Gauss-Jordan ------------------------------------------------------------------------------
// a_i -= f_i u for every row i, in kVecs Vecs from column j on.
template <int kVecs, class T>
void eliminate_columns(T* a, int64_t n, int64_t width, const T* factors, const T* u) {
  using V = Vec<T>;
  V pivot_row[kVecs];
  for (int v = 0; v < kVecs; ++v) pivot_row[v] = V::load(u + v * V::kLanes);
  for (int64_t i = 0; i < n; ++i, a += width) {
    const V factor = factors[i];
    for (int v = 0; v < kVecs; ++v) {
      eliminate(V::load(a + v * V::kLanes), factor, pivot_row[v]).store(a + v * V::kLanes);
    }
  }
}

template <class T>
void eliminate_rows(T* a, int64_t n, int64_t width, const T* factors, const T* u) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  int64_t j = 0;
  for (; j + 8 * kLanes <= width; j += 8 * kLanes)
    eliminate_columns<8>(a + j, n, width, factors, u + j);
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    eliminate_columns<4>(a + j, n, width, factors, u + j);
  for (; j + 2 * kLanes <= width; j += 2 * kLanes)
    eliminate_columns<2>(a + j, n, width, factors, u + j);
  for (; j < width; j += kLanes) eliminate_columns<1>(a + j, n, width, factors, u + j);
}

template <class T>
void swap_rows(T* a, T* b, int64_t width) {
  using V = Vec<T>;
  for (int64_t j = 0; j < width; j += V::kLanes) {
    const V held = V::load(a + j);
    V::load(b + j).store(a + j);
    held.store(b + j);
  }
}

// The largest |column[i]|, k <= i < n.
template <class T>
T largest_of(const T* column, int64_t k, int64_t n) {
  using V = Vec<T>;
  T lanes[V::kLanes];
  V most = T(0);
  int64_t i = k;
  for (; i + V::kLanes <= n; i += V::kLanes) most = max_(abs_(V::load(column + i)), most);
  most.store(lanes);
  T largest = T(0);
  for (const T lane : lanes) largest = max_(lane, largest);
  for (; i < n; ++i) largest = max_(abs_(column[i]), largest);
  return largest;
}

struct Determinant {
  double sign, log_abs;
};

// Turns a into its inverse, with column order[k] of the inverse in column k.  The row operations
// change column k, too; afterwards it is overwritten by -f_i and 1 / a_pk.  Stops at a pivot of
// zero. `factors` is a padded row.
template <class T>
Determinant invert(T* a, int64_t n, int64_t width, int64_t* order, T* factors) {
  using V = Vec<T>;
  Determinant d{1, 0};
  for (int64_t k = 0; k < n; ++k) order[k] = k;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = 0; i < n; ++i) factors[i] = a[i * width + k];
    const T largest = largest_of(factors, k, n);
    if (largest == T(0)) return {0, -INFINITY};
    int64_t p = k;
    while (abs_(factors[p]) != largest && p + 1 < n) ++p;
    T* row = a + k * width;
    if (p != k) {
      swap_rows(row, a + p * width, width);
      const int64_t held = order[k];
      order[k] = order[p], order[p] = held;
      d.sign = -d.sign;
    }
    const T pivot = row[k];
    if (pivot < T(0)) d.sign = -d.sign;
    d.log_abs += log_pivot(pivot);
    factors[p] = factors[k];
    for (int64_t i = 0; i < n; i += V::kLanes) (V::load(factors + i) / pivot).store(factors + i);
    factors[k] = T(0);  // the pivot row itself stays
    eliminate_rows(a, n, width, factors, row);
    for (int64_t j = 0; j < width; j += V::kLanes) (V::load(row + j) / pivot).store(row + j);
    for (int64_t i = 0; i < n; ++i) a[i * width + k] = -factors[i];
    row[k] = T(1) / pivot;
  }
  return d;
}

template <class T>
bool all_finite(const T* a, int64_t count) {  // x * 0 is NaN for NaN and inf
  using V = Vec<T>;
  V zeros = T(0);
  T zero = T(0);
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) zeros += V::load(a + i) * T(0);
  for (; i < count; ++i) zero += a[i] * T(0);
  return sum_lanes(zeros) + zero == 0;
}

template <class T>
void slogdet_matrices(const SlogdetArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.size;
  constexpr T kNaN = static_cast<T>(NAN);
  const PaddedBlocks<T> work(1, n + 1, n);
  T *a = work.first, *factors = a + n * work.width;
  int64_t* order = new int64_t[n];
  for (int64_t m = begin; m < end; ++m) {
    const T* from = static_cast<const T*>(args.weight) + m * n * n;
    T* to = static_cast<T*>(args.inverse) + m * n * n;
    copy_rows(from, n, a, work.width, n, n);
    Determinant d{kNaN, kNaN};
    if (all_finite(from, n * n)) d = invert(a, n, work.width, order, factors);
    static_cast<T*>(args.sign)[m] = static_cast<T>(d.sign);
    static_cast<T*>(args.log_abs_det)[m] = static_cast<T>(d.log_abs);
    if (d.sign * d.sign != 1) {
      for (int64_t i = 0; i < n * n; ++i) to[i] = kNaN;
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < n; ++k) to[i * n + order[k]] = a[i * work.width + k];
    }
  }
  delete[] order;
}

// ---- triangles ---------------------------------------------------------------------------------
// to += sum over k < depth of factor * factors[k * step] * rows[k], rows of `width`.
template <int kVecs, class T>
void add_columns(T* to, T factor, const T* factors, int64_t step, const T* rows, int64_t depth,
                 int64_t width) {
  using V = Vec<T>;
  V sum[kVecs];
  for (int v = 0; v < kVecs; ++v) sum[v] = T(0);
  for (int64_t k = 0; k < depth; ++k, rows += width) {
    const V f = factors[k * step];
    for (int v = 0; v < kVecs; ++v) sum[v] += f * V::load(rows + v * V::kLanes);
  }
  for (int v = 0; v < kVecs; ++v) {
    (V::load(to + v * V::kLanes) + V(factor) * sum[v]).store(to + v * V::kLanes);
  }
}

// to += factor * (row i of the strict triangle) times `rows`.
template <class T>
void add_product(const Triangle<T>& t, int64_t i, int64_t n, T factor, const T* rows, int64_t width,
                 T* to) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t from = t.is_lower ? 0 : i + 1, depth = t.is_lower ? i : n - 1 - i;
  const T *factors = t.at(i, from), *b = rows + from * width;
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    add_columns<4>(to + j, factor, factors, t.column, b + j, depth, width);
  for (; j < width; j += kLanes)
    add_columns<1>(to + j, factor, factors, t.column, b + j, depth, width);
}

// x = t^-1 x by substitution.
template <class T>
void solve(const Triangle<T>& t, int64_t n, T* x, int64_t width) {
  using V = Vec<T>;
  for (int64_t s = 0; s < n; ++s) {
    const int64_t i = t.is_lower ? s : n - 1 - s;
    T* row = x + i * width;
    add_product(t, i, n, T(-1), x, width, row);
    if (t.log_diag == nullptr) continue;
    const V diagonal = t.diagonal(i);
    for (int64_t j = 0; j < width; j += V::kLanes) (V::load(row + j) / diagonal).store(row + j);
  }
}

// to = t x.
template <class T>
void multiply(const Triangle<T>& t, int64_t n, const T* x, int64_t width, T* to) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; ++i, to += width) {
    const V diagonal = t.diagonal(i);
    for (int64_t j = 0; j < width; j += V::kLanes) {
      (diagonal * V::load(x + i * width + j)).store(to + j);
    }
    add_product(t, i, n, T(1), x, width, to);
  }
}

template <class T>
void transpose_square(const T* from, int64_t n, int64_t width, T* to) {
  transpose_padded<T>({from, width}, n, n, {to, width});
}

template <class T>
void plu_of(const PluArgs& a) {
  const int64_t n = a.size;
  const Triangle<T> lower = lower_of<T>(a), upper = upper_of<T>(a);
  const PaddedBlocks<T> work(2, n, n);
  const int64_t width = work.width;
  T *x = work.block(0), *y = work.block(1), *out = static_cast<T*>(a.out);
  if (a.inverse) {
    for (int64_t i = 0; i < n; ++i) x[i * width + i] = T(1);
    solve(lower, n, x, width);
    solve(upper, n, x, width);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) out[i * n + j] = x[i * width + a.permutation[j]];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    memcpy(x + i * width + i, upper.at(i, i), (n - i) * sizeof(T));
    x[i * width + i] = upper.diagonal(i);
  }
  multiply(lower, n, x, width, y);
  for (int64_t i = 0; i < n; ++i) {
    memcpy(out + i * n, y + a.permutation[i] * width, n * sizeof(T));
  }
}

template <class T>
void plu_grad(const PluArgs& a) {
  const int64_t n = a.size;
  const Triangle<T> lower = lower_of<T>(a), upper = upper_of<T>(a);
  const PaddedBlocks<T> work(4, n, n);
  const int64_t width = work.width;
  const T* grad = static_cast<const T*>(a.grad);
  T *x = work.block(0), *y = work.block(1);
  const T *to_lower = x, *to_upper = y;  // grad L, and the transpose of grad U, times `sign`
  if (a.inverse) {
    for (int64_t i = 0; i < n; ++i) {  // Y^T
      T* row = x + a.permutation[i] * width;
      for (int64_t j = 0; j < n; ++j) row[j] += grad[j * n + i];
    }
    solve(lower, n, x, width);
    transpose_square(x, n, width, y);
    solve(upper.transposed(), n, y, width);  // B
    transpose_square(y, n, width, x);
    solve(lower.transposed(), n, y, width);
    solve(upper, n, x, width);
    to_lower = y, to_upper = x;
  } else {
    T *product = work.block(2), *g = work.block(3);
    for (int64_t i = 0; i < n; ++i) {  // G
      T* row = x + a.permutation[i] * width;
      for (int64_t j = 0; j < n; ++j) row[j] += grad[i * n + j];
    }
    transpose_square(x, n, width, y);
    multiply(lower.transposed(), n, x, width, product);
    multiply(upper, n, y, width, g);
    transpose_square(product, n, width, y);
    transpose_square(g, n, width, x);
  }
  const T sign = a.inverse ? T(-1) : T(1);
  T *grad_lower = static_cast<T*>(a.grad_lower), *grad_upper = static_cast<T*>(a.grad_upper);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      grad_lower[i * n + j] = j < i ? sign * to_lower[i * width + j] : T(0);
      grad_upper[i * n + j] = j > i ? sign * to_upper[j * width + i] : T(0);
    }
    static_cast<T*>(a.grad_log_diag)[i] = sign * to_upper[i * width + i] * upper.diagonal(i);
  }
}

}  // namespace

void slogdet_inverse(const SlogdetArgs& a, bool is_double, int64_t begin, int64_t end) {
  is_double ? slogdet_matrices<double>(a, begin, end) : slogdet_matrices<float>(a, begin, end);
}
void plu(const PluArgs& a, bool is_double) { is_double ? plu_of<double>(a) : plu_of<float>(a); }
void plu_backward(const PluArgs& a, bool is_double) {
  is_double ? plu_grad<double>(a) : plu_grad<float>(a);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "matrix/matrix_host.h"

namespace pfk {
namespace {

std::tuple<Tensor, Tensor, Tensor> slogdet_inverse_cpu(const Tensor& weight) {
  const SlogdetTensors t = slogdet_tensors(weight);
  const int64_t n = t.args.size;
  const bool is_double = is_wide(weight);
  // a multiply-add costs an eighth of an elementwise operation, a step of the elimination some 32
  parallel_tasks(t.batch, n * (n * n / 8 + 32), [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(slogdet_inverse, t.args, is_double, begin, end);
  });
  return {t.sign, t.log_abs_det, t.inverse};
}

void check_permutation(const PluArgs& a) {
  for (int64_t i = 0; i < a.size; ++i) {
    STD_TORCH_CHECK(a.permutation[i] >= 0 && a.permutation[i] < a.size,
                    "permutation must hold indices from 0 to ", a.size - 1, ", got ",
                    a.permutation[i]);
  }
}

Tensor plu_cpu(const Tensor& permutation, const Tensor& lower, const Tensor& upper,
               const Tensor& log_diag, const Tensor& sign, bool inverse) {
  PluTensors t = plu_tensors(permutation, lower, upper, log_diag, sign, inverse);
  check_permutation(t.args);
  Tensor out = empty(lower, lower.sizes());
  t.args.out = out.mutable_data_ptr();
  PFK_CALL_LEVEL(plu, t.args, is_wide(lower));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> plu_grad_cpu(const Tensor& grad, const Tensor& permutation,
                                                const Tensor& lower, const Tensor& upper,
                                                const Tensor& log_diag, const Tensor& sign,
                                                bool inverse) {
  PluTensors t = plu_tensors(permutation, lower, upper, log_diag, sign, inverse);
  check_permutation(t.args);
  const Tensor upstream = with_format(grad, false);
  t.args.grad = upstream.const_data_ptr();
  const std::tuple<Tensor, Tensor, Tensor> grads = plu_grads(t);
  PFK_CALL_LEVEL(plu_backward, t.args, is_wide(lower));
  return grads;
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("slogdet_inverse", TORCH_BOX(&pfk::slogdet_inverse_cpu));
  m.impl("plu_matrix", TORCH_BOX(&pfk::plu_cpu));
  m.impl("plu_matrix_backward", TORCH_BOX(&pfk::plu_grad_cpu));
}
#endif
