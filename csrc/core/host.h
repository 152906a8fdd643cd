// SPDX-License-Identifier: Apache-2.0
// Tensors by LibTorch's stable ABI (target 2.11): their shapes and memory formats, and new ones. No
// other header uses that ABI.  It is included where ops are registered, never by code that is
// compiled for a SIMD level above the baseline.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "core/dtype.h"

namespace pfk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Byte:
      return kUInt8;
    default:
      STD_TORCH_CHECK(false, "pyflowkern: dtype without a kernel");
  }
  return kFloat32;
}
// That of a tensor for kernels of float32 and float64 alone, which would read others beyond their
// end.
inline DType full_dtype(const Tensor& t) {
  const DType dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kFloat64,
                  "pyflowkern: this op has kernels of float32 and float64 alone");
  return dtype;
}
inline bool is_wide(const Tensor& t) { return full_dtype(t) == kFloat64; }

// An integer of an op's schema as the kind that it names, or the flags that it is made of (see
// core/codes.h): kernels index and branch with them.
inline int checked_kind(const char* name, int64_t value, int count) {
  STD_TORCH_CHECK(value >= 0 && value < count, "pyflowkern: ", name, " must be from 0 to ",
                  count - 1, ", got ", value);
  return static_cast<int>(value);
}
inline int checked_flags(const char* name, int64_t value, int all) {
  return checked_kind(name, value, all + 1);
}

// The dtype of log-dets and parameter sums.
inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [N, C, *space], space flattened.
struct ImageShape {
  int64_t samples, channels, space;
  int64_t features() const { return channels * space; }
  int64_t numel() const { return samples * channels * space; }
};

inline ImageShape image_shape(const Tensor& t) {
  const auto sizes = t.sizes();
  ImageShape s{sizes[0], sizes.size() > 1 ? sizes[1] : 1, 1};
  for (size_t d = 2; d < sizes.size(); ++d) s.space *= sizes[d];
  return s;
}

// Dense with the channels innermost, as torch.channels_last (4-D) and channels_last_3d (5-D) lay
// them out.
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t dim = t.dim();
  if (dim != 4 && dim != 5) return false;
  int64_t expected = 1;
  auto fits = [&](int64_t d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
    return true;
  };
  if (!fits(1)) return false;
  for (int64_t d = dim - 1; d >= 2; --d) {
    if (!fits(d)) return false;
  }
  return fits(0);
}

// A tensor in a format that kernels take: contiguous or channels last.  Any other is copied here,
// and nowhere else.
struct Canonical {
  Tensor tensor;
  bool channels_last;
};
inline Canonical canonical(const Tensor& t) {
  if (t.is_contiguous()) return {t, false};
  if (is_channels_last(t)) return {t, true};
  return {torch::stable::contiguous(t), false};
}
inline Tensor with_format(const Tensor& t, bool channels_last) {
  if (!channels_last) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  if (is_channels_last(t)) return t;
  return torch::stable::contiguous(t, t.dim() == 5 ? torch::headeronly::MemoryFormat::ChannelsLast3d
                                                   : torch::headeronly::MemoryFormat::ChannelsLast);
}

// Whether new tensors on the CPU are filled with NaN.  Tests switch it on, so that an element that
// no kernel writes shows.
inline std::atomic<bool> fresh_is_nan{false};

inline void fill_with_nan(AtenTensorHandle tensor) {
  void* data = nullptr;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &bytes));
  if (bytes > 0) memset(data, 0xff, static_cast<size_t>(bytes));  // NaN in every floating type
}

// A new tensor without values, on the device of `like`.  It comes straight from the allocator: the
// dispatcher's new_empty costs a microsecond more, a tenth of a small call.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                            int64_t dim, ScalarType type) {
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(type),
                                                  device, index, &handle));
  if (fresh_is_nan.load(std::memory_order_relaxed) && device == aoti_torch_device_type_cpu()) {
    fill_with_nan(handle);
  }
  return Tensor(handle);
}
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType type) {
  constexpr int64_t kMostAxes = 64;
  const int64_t dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim <= kMostAxes, "pyflowkern: too many axes");
  int64_t strides[kMostAxes], step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return empty_strided(like, sizes.data(), strides, dim, type);
}
inline Tensor empty(const Tensor& like, Sizes sizes) {
  return empty(like, sizes, like.scalar_type());
}

// Shaped and laid out like a canonical tensor.
inline Tensor empty_like_canonical(const Canonical& c, ScalarType type) {
  const Tensor& t = c.tensor;
  if (!c.channels_last) return empty(t, t.sizes(), type);
  return empty_strided(t, t.sizes().data(), t.strides().data(), t.dim(), type);
}
inline Tensor empty_like_canonical(const Canonical& c) {
  return empty_like_canonical(c, c.tensor.scalar_type());
}
inline Tensor empty_per_sample(const Tensor& t, int64_t samples) {
  return empty(t, {samples}, accumulation_type(t));
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline void check_gradient(const Tensor& grad, int64_t count, const Tensor& like) {
  STD_TORCH_CHECK(grad.numel() == count && grad.scalar_type() == like.scalar_type(),
                  "a gradient must fit its result in size and dtype");
}
// Log-dets, their gradients and what all samples share: of the dtype of sums.
inline Tensor dense_sums(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(
      t.scalar_type() == accumulation_type(like),
      "pyflowkern: log-dets and parameters of all samples are float64 as x is, or float32");
  return dense(t);
}
inline void* data_of(const Tensor& t) { return t.mutable_data_ptr(); }
// Where the numbers of a tensor lie that may be missing: null stands for that alone, not for a
// tensor without numbers, which torch may give no address.
inline const void* address_of(const Tensor& t) {
  alignas(16) static const char nothing[16] = {};
  const void* address = t.const_data_ptr();
  return address == nullptr ? nothing : address;
}

// The step between rows of n numbers in a copy for core/gemm.h: whole vectors, but no multiple of
// 256 bytes, with which the numbers of a column would compete for few places in L1.
inline int64_t padded(int64_t n) {
  const int64_t p = (n + 15) / 16 * 16;
  return p % 64 == 0 ? p + 16 : p;
}

// A contiguous tensor of float or double on the CPU, read and written as doubles; or none.
struct Values {
  Tensor tensor;
  bool given = false, wide = false;
  int64_t count = 0;
  void* data = nullptr;

  explicit Values(const std::optional<Tensor>& t) : given(t.has_value()) {
    if (!given) return;
    tensor = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    wide = is_wide(tensor);
    count = tensor.numel();
    data = tensor.mutable_data_ptr();
  }
  double operator[](int64_t i) const {
    return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  void put(int64_t i, double value) const {
    if (wide) {
      static_cast<double*>(data)[i] = value;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }
  void fill(double value) const {
    for (int64_t i = 0; i < count; ++i) put(i, value);
  }
  double sum() const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += (*this)[i];
    return total;
  }
};

// Runs f(begin, end) over tasks of about `work` elements each; a thread gets 8,192 elements at
// least.
template <class F>
void parallel_tasks(int64_t tasks, int64_t work, const F& f) {
  const int64_t grain = work >= 8192 ? 1 : 8192 / (work > 0 ? work : 1);
  torch::stable::parallel_for(0, tasks, grain, f);
}

}  // namespace pfk

// Called by tests through ctypes; returns what was in force.
extern "C" __attribute__((visibility("default"), used)) inline int pyflowkern_fresh_is_nan(int on) {
  return pfk::fresh_is_nan.exchange(on != 0);
}
