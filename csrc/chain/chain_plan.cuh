// SPDX-License-Identifier: Apache-2.0
// The lists of a program on the device.
//
// A program is compared with those of earlier calls, and read and copied the first time only: later
// calls launch nothing for it, also where a CUDA graph captures them.  Lists are never freed or
// changed, since a graph may hold their addresses, so only so many are kept; programs beyond, and
// those that are new to a capture, are copied at each call, by kernels whose arguments hold them.
#pragma once

#include <memory>
#include <mutex>

#include "chain/chain_lister.h"
#include "core/teams.cuh"

PFK_BEGIN

// What a kernel can be given by value.
struct ChainWords {
  static constexpr int kMost = 960;
  int32_t word[kMost];
};

namespace {
__global__ void __launch_bounds__(kThreads)
    chain_words_kernel(const __grid_constant__ ChainWords words, int count, int32_t* to) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) to[i] = words.word[i];
}
}  // namespace

// Copies what lies on the host to the device, as part of the stream.
inline void copy_words(const std::vector<int32_t>& words, int32_t* to, cudaStream_t stream) {
  const int64_t total = static_cast<int64_t>(words.size());
  for (int64_t at = 0; at < total; at += ChainWords::kMost) {
    ChainWords some{};
    const int count = static_cast<int>(std::min<int64_t>(ChainWords::kMost, total - at));
    memcpy(some.word, words.data() + at, count * sizeof(int32_t));
    PFK_LAUNCH(chain_words_kernel, grid_for(count), kThreads, stream, some, count, to + at);
  }
}

inline bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  int32_t type[2] = {};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &type[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &type[1]));
  return type[0] == type[1] && a.get_device_index() == b.get_device_index();
}

// A program and the kind of its call, by which calls are told apart.
struct ChainKey {
  int device;
  ScalarType type;
  bool inverse;
  std::vector<int32_t> program;
  std::vector<double> numbers;
  std::vector<ScalarType> types;  // of the tensors

  bool is(const Tensor& like, const Tensor& p, const Tensor& v, const std::vector<Tensor>& tensors,
          bool backwards) const {
    if (device != like.get_device_index() || type != like.scalar_type() || inverse != backwards ||
        static_cast<int64_t>(program.size()) != p.numel() ||
        static_cast<int64_t>(numbers.size()) != v.numel() || types.size() != tensors.size() ||
        memcmp(program.data(), p.const_data_ptr(), program.size() * sizeof(int32_t)) != 0 ||
        memcmp(numbers.data(), v.const_data_ptr(), numbers.size() * sizeof(double)) != 0) {
      return false;
    }
    for (size_t i = 0; i < types.size(); ++i) {
      if (types[i] != tensors[i].scalar_type()) return false;
    }
    return true;
  }
};

class ChainPlan {
 public:
  ChainListing l;
  Tensor memory;  // instructions forward and backward, gradients, maps, integers
  int64_t backward, grads, maps, ints;  // places of the parts, in bytes; the first one is at 0

  // Reads the program, and has the lists copied.
  ChainPlan(const Tensor& like, const Tensor& program, const Tensor& numbers,
            const std::vector<Tensor>& tensors, bool inverse, cudaStream_t stream) {
    ChainTensors t;
    ChainBuilder(t, like, program, numbers, tensors, inverse, true);
    ChainLister(l, t, tensors);
    for (const Tensor& tensor : tensors) {
      shapes_.emplace_back(tensor.sizes().begin(), tensor.sizes().end());
    }
    std::vector<int32_t> words;
    auto add = [&words](const auto& part) {
      using Element = typename std::decay_t<decltype(part)>::value_type;
      const size_t at = words.size(), bytes = part.size() * sizeof(Element);
      words.resize(at + (bytes + 15) / 16 * 4);
      if (bytes > 0) memcpy(words.data() + at, part.data(), bytes);
      return static_cast<int64_t>(at * sizeof(int32_t));
    };
    add(l.forward);
    backward = add(l.backward), grads = add(l.grads);
    with_compute_type(dtype_of(like), [&](auto type) { maps = add(typed_maps<decltype(type)>()); });
    ints = add(l.ints);
    memory = empty(like, {static_cast<int64_t>(words.size())}, ScalarType::Int);
    copy_words(words, static_cast<int32_t*>(memory.mutable_data_ptr()), stream);
  }
  template <class Element>
  const Element* at(int64_t place) const {
    return reinterpret_cast<const Element*>(static_cast<const char*>(memory.const_data_ptr()) +
                                            place);
  }
  // The kernels would read out of bounds.
  void check(const std::vector<Tensor>& tensors) const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto found = tensors[i].sizes();
      STD_TORCH_CHECK(found.size() == shapes_[i].size() &&
                          std::equal(found.begin(), found.end(), shapes_[i].begin()),
                      "pyflowkern::chain: tensor ", i, " has ", tensors[i].numel(),
                      " numbers in another shape than the program says");
    }
  }

 private:
  template <class T>
  std::vector<ChainMap<T>> typed_maps() const {
    std::vector<ChainMap<T>> found;
    for (const ChainMapNumbers& m : l.maps) {
      ChainMap<T> to{};
      if (m.affine) to.affine = affine_map<T>(m.scale, m.flags);
      if (m.has_spline) to.spline = spline_map<T>(m.spline, m.form, l.inverse);
      to.bound = static_cast<T>(m.bound);
      found.push_back(to);
    }
    return found;
  }

  std::vector<std::vector<int64_t>> shapes_;
};

// The plans of earlier calls.
class ChainPlans {
 public:
  std::shared_ptr<const ChainPlan> find(const Tensor& like, const Tensor& program,
                                        const Tensor& numbers, const std::vector<Tensor>& tensors,
                                        bool inverse, cudaStream_t stream) {
    for (const Tensor& t : tensors) {
      STD_TORCH_CHECK(same_device(t, like), "pyflowkern::chain: tensors on several devices");
    }
    const std::lock_guard<std::mutex> guard(mutex_);
    for (const Known& k : known_) {
      if (!k.key.is(like, program, numbers, tensors, inverse)) continue;
      k.plan->check(tensors);
      return k.plan;
    }
    auto plan = std::make_shared<const ChainPlan>(like, program, numbers, tensors, inverse, stream);
    const int64_t size = plan->memory.numel();
    if (is_captured(stream) || known_.size() == kMost || total_ + size > kMostNumbers) return plan;
    STD_CUDA_CHECK(cudaStreamSynchronize(stream));  // the next call may be on another stream
    const auto* p = static_cast<const int32_t*>(program.const_data_ptr());
    const auto* v = static_cast<const double*>(numbers.const_data_ptr());
    ChainKey key{like.get_device_index(), like.scalar_type(), inverse, {}, {}, {}};
    key.program.assign(p, p + program.numel()), key.numbers.assign(v, v + numbers.numel());
    for (const Tensor& t : tensors) key.types.push_back(t.scalar_type());
    known_.push_back({std::move(key), plan});
    total_ += size;
    return plan;
  }

 private:
  struct Known {
    ChainKey key;
    std::shared_ptr<const ChainPlan> plan;
  };
  static constexpr size_t kMost = 256;
  static constexpr int64_t kMostNumbers = int64_t{16} << 20;
  std::mutex mutex_;
  std::vector<Known> known_;
  int64_t total_ = 0;
};

// Never destroyed: at the end of a process the driver may be gone first.
inline ChainPlans* const chain_plans = new ChainPlans;

PFK_END
