// SPDX-License-Identifier: Apache-2.0
// A program and its tensors, which are read one after the other and not trusted.
#pragma once

#include <vector>

#include "chain/chain.h"
#include "core/host.h"

namespace pfk {

// What a program and its tensors become.
struct ChainTensors {
  Tensor like;  // dtype and device of all
  std::optional<Tensor> c;
  std::vector<Tensor> dense;  // parameters, contiguous
  std::vector<ChainStep> steps;
  std::vector<ChainLayer> layers;
  std::vector<ChainGroup> groups;
  std::vector<ChainGrad> grads;  // one for each tensor, those without a gradient with no rows
  std::vector<std::vector<int32_t>> tables;  // of angles, and inverses of autoregressive steps
  std::vector<std::vector<double>> frequencies;
  std::vector<std::vector<int64_t>> orders;  // the permutations of `factors`
  std::vector<PluArgs> factors;              // of the steps kPluStep and kLuStep, in their order
  ChainArgs args{};
  int64_t prepared = 0;  // numbers of what is computed once a call
};

// Refuses a program for other data than x before anything is as large as it says.
inline void check_features(const Tensor& program, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "pyflowkern::chain: x must have two axes");
  STD_TORCH_CHECK(program.scalar_type() == ScalarType::Int && program.numel() > 0,
                  "pyflowkern::chain: a program is int32");
  const int64_t features = *static_cast<const int32_t*>(program.const_data_ptr());
  STD_TORCH_CHECK(x.sizes()[1] == features, "pyflowkern::chain: x of ", x.sizes()[1],
                  " features for ", features);
}

// Reads the integers of a program one after the other.
class ChainReader {
 public:
  ChainReader(const Tensor& program, const Tensor& numbers, const std::vector<Tensor>& tensors)
      : program_(program), numbers_(numbers), tensors_(tensors) {
    STD_TORCH_CHECK(program.scalar_type() == ScalarType::Int && program.is_contiguous() &&
                        numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous(),
                    "pyflowkern::chain: a program is int32 and its numbers are float64");
    ints_ = static_cast<const int32_t*>(program.const_data_ptr());
    count_ = program.numel();
  }
  int64_t next() { return *many(1); }
  int64_t size(int64_t least = 0) {
    const int64_t n = next();
    STD_TORCH_CHECK(n >= least, "pyflowkern::chain: a size of ", n, " in a program");
    return n;
  }
  const int32_t* many(int64_t n) {
    STD_TORCH_CHECK(n >= 0 && at_ + n <= count_, "pyflowkern::chain: a program of ", count_,
                    " numbers ends too early");
    at_ += n;
    return ints_ + at_ - n;
  }
  // Each of 0 ... n - 1 once: a gradient has no other rows.
  const int32_t* order(int64_t n) {
    const int32_t* p = indices(n, n);
    std::vector<bool> seen(n);
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(!seen[p[i]], "pyflowkern::chain: an order that has ", p[i], " twice");
      seen[p[i]] = true;
    }
    return p;
  }
  const int32_t* indices(int64_t n, int64_t end) {
    const int32_t* p = many(n);
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(p[i] >= 0 && p[i] < end, "pyflowkern::chain: index ", p[i], " of ", end);
    }
    return p;
  }
  std::vector<double> numbers(int64_t at, int64_t n) const {
    STD_TORCH_CHECK(at >= 0 && n >= 0 && at + n <= numbers_.numel(),
                    "pyflowkern::chain: numbers that a program has not");
    const double* p = static_cast<const double*>(numbers_.const_data_ptr()) + at;
    return {p, p + n};
  }
  // The next tensor, with this many axes: a number, `columns`, or [rows, columns].
  const Tensor& tensor(int64_t axes, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(next_tensor_ < tensors_.size(), "pyflowkern::chain: too few tensors");
    const Tensor& t = tensors_[next_tensor_++];
    STD_TORCH_CHECK(t.dim() == axes && (axes < 1 || t.sizes()[axes - 1] == columns) &&
                        (axes < 2 || t.sizes()[0] == rows),
                    "pyflowkern::chain: tensor ", next_tensor_ - 1, " has ", t.dim(), " axes and ",
                    t.numel(), " numbers, for ", rows, " rows of ", columns);
    return t;
  }
  size_t tensors_read() const { return next_tensor_; }
  void end() const {
    STD_TORCH_CHECK(at_ == count_ && next_tensor_ == tensors_.size(),
                    "pyflowkern::chain: a program that does not end with its tensors");
  }

 private:
  const Tensor &program_, &numbers_;
  const std::vector<Tensor>& tensors_;
  const int32_t* ints_;
  int64_t count_, at_ = 0;
  size_t next_tensor_ = 0;
};

}  // namespace pfk
