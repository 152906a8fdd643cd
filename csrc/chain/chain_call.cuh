// SPDX-License-Identifier: Apache-2.0
// A call of a chain on a GPU: from tensors to ChainRun, once for both passes.
#pragma once

#include "chain/chain_ops.cuh"
#include "chain/chain_plan.cuh"

PFK_BEGIN

// Addresses for a kernel; `many` is the memory of those that are not given by value.
inline ChainPointers pointers_to(const std::vector<Tensor>& tensors, const Tensor& like,
                                 cudaStream_t stream, Tensor& many) {
  ChainPointers p{};
  std::vector<const void*> all;
  for (const Tensor& t : tensors) all.push_back(address_of(t));
  if (all.size() <= kChainPointers) {
    std::copy(all.begin(), all.end(), p.few);
    return p;
  }
  std::vector<int32_t> words(all.size() * sizeof(void*) / sizeof(int32_t));
  memcpy(words.data(), all.data(), all.size() * sizeof(void*));
  many = empty(like, {static_cast<int64_t>(words.size())}, ScalarType::Int);
  copy_words(words, static_cast<int32_t*>(many.mutable_data_ptr()), stream);
  p.many = static_cast<const void* const*>(many.const_data_ptr());
  return p;
}

// What a kernel reads must live until it is launched.
struct ChainCall {
  using Maybe = std::optional<Tensor>;
  std::shared_ptr<const ChainPlan> plan;
  std::vector<Tensor> dense_tensors;
  std::optional<Tensor> c;
  Tensor many, scratch;
  ChainPointers pointers;
  cudaStream_t stream;
  int64_t samples, tiles;

  ChainCall(const Tensor& like, int64_t n, const Maybe& context, const Tensor& program,
            const Tensor& numbers, const std::vector<Tensor>& tensors, bool inverse)
      : stream(current_stream(like)), samples(n) {
    const ScalarType type = like.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                    "pyflowkern::chain: float32 or float64");
    plan = chain_plans->find(like, dense(program), dense(numbers), tensors, inverse, stream);
    const int64_t size = plan->l.context;
    STD_TORCH_CHECK(
        context.has_value() == (size > 0) &&
            (!context || (context->numel() == n * size && context->scalar_type() == type &&
                          same_device(*context, like))),
        "pyflowkern::chain: a context of another size, dtype or device");
    if (context) c = dense(*context);
    for (const Tensor& t : tensors) dense_tensors.push_back(dense(t));
    pointers = pointers_to(dense_tensors, like, stream, many);
    tiles = (samples + kChainSamples - 1) / kChainSamples;
  }

  template <class T>
  ChainRun<T> run(bool backward) const {
    const ChainListing& l = plan->l;
    ChainRun<T> r{};
    r.ops = plan->at<ChainOp>(backward ? plan->backward : 0);
    r.count = static_cast<int>(backward ? l.backward.size() : l.forward.size());
    r.rows = l.rows, r.state = backward ? l.backward_state : l.forward_state;
    r.features = l.features, r.context = l.context;
    r.grad_context = l.grad_context(), r.grad_log = l.grad_log();
    r.ints = plan->at<int32_t>(plan->ints), r.maps = plan->at<ChainMap<T>>(plan->maps);
    r.samples = samples, r.tiles = tiles, r.blocks = l.blocks, r.size = l.size;
    r.c = c ? static_cast<const T*>(address_of(*c)) : nullptr;
    r.tensors = pointers;
    return r;
  }

  // Gives each of the blocks its rows, and returns its bytes of shared memory.
  template <class T>
  size_t place_rows(ChainRun<T>& r, const Tensor& like, int64_t blocks) {
    int most = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                          like.get_device_index()));
    const int64_t numbers = static_cast<int64_t>(r.rows) * kChainSamples;
    const size_t rows = numbers * sizeof(T), all = kChainShared<T> + rows;
    if (all <= static_cast<size_t>(most)) return all;
    scratch = empty(like, {blocks * numbers});
    r.scratch = static_cast<T*>(scratch.mutable_data_ptr());
    return kChainShared<T>;
  }
};

PFK_END
