// SPDX-License-Identifier: Apache-2.0
// From a program and its tensors to ChainArgs.
//
// Nothing that a program says is trusted: sizes of tensors and indices are compared with it, since
// kernels would read out of bounds.
#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "chain/chain.h"
#include "chain/chain_elements_host.h"
#include "chain/chain_reader.h"

namespace pfk {

class ChainBuilder : ChainElementsBuilder {
 public:
  // With `on_device` nothing that tensors hold is read here, so that permutations are not checked.
  ChainBuilder(ChainTensors& t, const Tensor& like, const Tensor& program, const Tensor& numbers,
               const std::vector<Tensor>& tensors, bool inverse, bool on_device = false)
      : ChainElementsBuilder(t, like, program, numbers, tensors, on_device) {
    t.like = like;
    t.dense.reserve(tensors.size());
    t.grads.reserve(tensors.size());
    t.layers.reserve(tensors.size());
    ChainArgs& a = t.args;
    a.features = reader_.size(), a.context = reader_.size();
    a.normal = checked_kind("base", reader_.next(), kChainBases) == kNormalBase;
    a.steps = reader_.size();
    a.inverse = inverse;
    STD_TORCH_CHECK(!(inverse && a.normal), "pyflowkern::chain: an inverse has no base");
    a.size = 1;  // of a task's gradients; the first is the sum of grad_log_det
    a.widest = padded(a.features > a.context ? a.features : a.context);
    t.steps.reserve(a.steps < 1024 ? a.steps : 1024);
    for (int64_t s = 0; s < a.steps; ++s) read_step();
    reader_.end();
    a.blocks = blocks_ + 1;
    size_t layer = 0, group = 0;
    for (ChainStep& s : t.steps) {  // the vectors have stopped to grow
      if (s.kind != kElementsStep) continue;
      s.elements.layer = t.layers.data() + layer;
      s.elements.group = t.groups.data() + group;
      layer += s.elements.layers, group += s.elements.groups;
    }
    a.step = t.steps.data();
  }

 private:
  // A permutation in any dtype: averages of equal indices may be off by a rounding.
  const int64_t* permutation(int64_t n) {
    t_.grads.push_back({});
    const Tensor given = dense(reader_.tensor(1, 1, n));
    const ScalarType type = given.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Long || type == ScalarType::Float || type == ScalarType::Double,
        "pyflowkern::chain: a permutation of another dtype");
    if (on_device_) return nullptr;
    std::vector<int64_t>& order = t_.orders.emplace_back(n);
    const void* p = given.const_data_ptr();
    for (int64_t i = 0; i < n; ++i) {
      const double saved = type == ScalarType::Long    ? static_cast<const int64_t*>(p)[i]
                           : type == ScalarType::Float ? static_cast<const float*>(p)[i]
                                                       : static_cast<const double*>(p)[i];
      const double index = std::nearbyint(saved);
      STD_TORCH_CHECK(index >= 0 && index < n, "permutation must hold indices from 0 to ", n - 1,
                      ", got ", index);
      order[i] = static_cast<int64_t>(index);
    }
    return order.data();
  }

  void read_step() {
    ChainStep s{};
    const int64_t n = t_.args.features;
    s.kind = checked_kind("step", reader_.next(), kChainSteps);
    s.first_tensor = static_cast<int>(reader_.tensors_read());
    s.block = s.kind == kPermuteStep ? -1 : static_cast<int>(blocks_++);
    switch (s.kind) {
      case kPermuteStep:
        s.index = reader_.indices(n, n);
        break;
      case kActNormStep:
        s.given = factor(1, 1, n), s.second = factor(1, 1, n);
        s.grad = t_.args.size, s.grad_second = s.grad + n;
        t_.args.size += 2 * n;
        t_.prepared += padded(n);
        break;
      case kLinearStep: {
        s.stride = padded(n);
        s.first = parameter(2, n, n, s.stride, &s.grad);
        int64_t of_log_det = 0;
        s.given = parameter(0, 1, 1, 1, &of_log_det, true);
        break;
      }
      case kPluStep:
        read_factors(s);
        break;
      case kLuStep:
        read_triangles(s);
        break;
      case kShiftStep: {
        s.bound = reader_.numbers(reader_.next(), 1)[0];
        s.first = parameter(1, 1, n, n, &s.grad);
        t_.grads.back().negative = t_.args.inverse;
        break;
      }
      default:
        read_elements(s.elements);
    }
    t_.steps.push_back(s);
  }

  // A matrix that is made of factors, and the place of its gradient.
  PluArgs new_factors(ChainStep& s) {
    PluArgs f{};
    f.size = t_.args.features;
    f.inverse = t_.args.inverse;
    s.stride = padded(f.size);
    s.grad = t_.args.size;
    t_.args.size += f.size * s.stride;
    t_.prepared += 3 * f.size * s.stride + 2 * s.stride;
    return f;
  }

  void read_factors(ChainStep& s) {
    PluArgs f = new_factors(s);
    const int64_t n = f.size;
    f.permutation = permutation(n);
    f.lower = factor(2, n, n), f.upper = factor(2, n, n);
    s.given = f.log_diag = factor(1, 1, n), f.sign = factor(1, 1, n);
    t_.factors.push_back(f);
  }

  void read_triangles(ChainStep& s) {
    const int64_t n = t_.args.features, packed = n * (n - 1) / 2;
    STD_TORCH_CHECK(!on_device_ && n <= 128, "pyflowkern::chain: triangles of ", n, " features");
    s.bound = reader_.numbers(reader_.next(), 1)[0];
    PluArgs f = new_factors(s);
    f.permutation = unchanged_order(n);
    f.lower = factor(1, 1, packed), f.upper = factor(1, 1, packed);
    s.given = f.log_diag = factor(1, 1, n);
    s.second = parameter(1, 1, n, n, &s.grad_second);
    t_.grads.back().negative = t_.args.inverse;
    t_.factors.push_back(f);
  }

  const int64_t* unchanged_order(int64_t n) {
    std::vector<int64_t>& order = t_.orders.emplace_back(n);
    std::iota(order.begin(), order.end(), 0);
    return order.data();
  }

  int64_t blocks_ = 0;
};

// In an even number of tiles of whole vectors, whatever the number of threads; four at least where
// tiles are large.
inline void place_tiles(ChainArgs& a) {
  const bool large = a.widest > kWideUnits && a.samples > 2 * kWideTile;
  const int64_t most = 2 * (large ? kWideTile : kChainTile);
  const int64_t pairs = (a.samples + most - 1) / most;
  const int64_t share = a.samples <= 32 ? a.samples : (a.samples + 2 * pairs - 1) / (2 * pairs);
  a.tile = share > 0 ? chain_columns(share) : 16;
  a.tiles = (a.samples + a.tile - 1) / a.tile;
  a.width = padded(a.tile);
}

// As many tasks as there are tiles, unless their gradients would need more than 16 MiB: then fewer,
// but four at least.
inline void place_tasks(ChainArgs& a, int64_t element_size) {
  const int64_t room = (int64_t{16} << 20) / (a.size * element_size) / 2 * 2;
  const int64_t most = room < 4 ? 4 : room > 16 ? 16 : room;
  a.tasks = a.tiles < most ? a.tiles : most;
}

}  // namespace pfk
