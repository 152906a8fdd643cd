// SPDX-License-Identifier: Apache-2.0
// From a program and its tensors to ChainArgs.
//
// Nothing that a program says is trusted: sizes of tensors and indices are compared with it, since
// kernels would read out of bounds.
#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "affine/affine_host.h"
#include "chain/chain.h"
#include "chain/chain_order.h"
#include "chain/chain_reader.h"
#include "spline/spline_form.h"

namespace pfk {

class ChainBuilder {
 public:
  // With `on_device` nothing that tensors hold is read here, so that permutations are not checked.
  ChainBuilder(ChainTensors& t, const Tensor& like, const Tensor& program, const Tensor& numbers,
               const std::vector<Tensor>& tensors, bool inverse, bool on_device = false)
      : t_(t),
        reader_(program, numbers, tensors),
        type_(like.scalar_type()),
        on_device_(on_device) {
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
    size_t layer = 0;
    for (ChainStep& s : t.steps) {  // the vectors have stopped to grow
      if (s.kind != kElementsStep) continue;
      s.elements.layer = t.layers.data() + layer;
      layer += s.elements.layers;
    }
    a.step = t.steps.data();
  }

 private:
  const void* keep(const Tensor& given) {
    t_.dense.push_back(dense(given));
    return address_of(t_.dense.back());
  }
  const Tensor& floating(int64_t axes, int64_t rows, int64_t columns) {
    const Tensor& t = reader_.tensor(axes, rows, columns);
    STD_TORCH_CHECK(t.scalar_type() == type_,
                    "pyflowkern::chain: a tensor of another dtype than x");
    return t;
  }
  // The next tensor, and the place of its gradient: rows of `columns`, `stride` apart.
  const void* parameter(int64_t axes, int64_t rows, int64_t columns, int64_t stride, int64_t* place,
                        bool of_log_det = false) {
    const void* p = keep(floating(axes, rows, columns));
    *place = t_.args.size;
    t_.args.size += rows * stride;
    t_.grads.push_back({nullptr, rows, columns, *place, stride, false, of_log_det, -1, 0});
    return p;
  }
  // The next tensor, whose gradient is made with those of others, or is zero.
  const void* factor(int64_t axes, int64_t rows, int64_t columns) {
    t_.grads.push_back({});
    return keep(floating(axes, rows, columns));
  }
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

  static int checked_scale_flags(int64_t flags) {
    STD_TORCH_CHECK((flags & ~int64_t{kShiftFirst | kDivide}) == 0,
                    "pyflowkern::chain: flags of a scale map, got ", flags);
    return static_cast<int>(flags);
  }

  void read_elements(ChainElements& e) {
    ChainArgs& a = t_.args;
    e.inverse = a.inverse;
    e.family = static_cast<ElementFamily>(checked_kind("family", reader_.next(), kElementFamilies));
    const int32_t* p = reader_.many(7);  // kind, tails, parameterization, bins, flags, numbers
    const std::vector<double> numbers = reader_.numbers(p[5], p[6]);
    int64_t per_feature = 0;
    if (e.family == kAffineElements) {
      e.kind = checked_kind("scale map", p[0], kScaleKinds);
      e.flags = checked_scale_flags(p[4]) | (e.inverse ? kInverse : 0);
      e.scale = scale_numbers(numbers);
      per_feature = e.kind == kAdditive ? 1 : 2;
    } else {
      e.form = checked_form(p[0], p[1], p[2], p[3]);
      e.spline = spline_numbers(numbers);
      per_feature = spline_map<float>(e.spline, e.form, false).columns;
    }
    e.per_feature = reader_.size(), e.feature_step = reader_.size(), e.param_step = reader_.size();
    e.reads = reader_.size(), e.moves = reader_.size();
    e.layers = static_cast<int>(reader_.size());
    e.residual = reader_.next() != 0, e.activate_last = reader_.next() != 0;
    e.activation =
        static_cast<Activation>(checked_kind("activation", reader_.next(), kMaskedActivations));
    const int first_context = checked_kind("context", reader_.next(), kChainContexts);
    STD_TORCH_CHECK(first_context == kNoContext || (a.context > 0 && e.layers > 0),
                    "pyflowkern::chain: a context that is not there, or without a network");
    e.read = reader_.indices(e.reads, a.features), e.moved = reader_.indices(e.moves, a.features);
    e.params_count = e.moves * e.per_feature;
    const int64_t last_row = (e.moves - 1) * e.feature_step + (e.per_feature - 1) * e.param_step;
    STD_TORCH_CHECK(e.per_feature == per_feature && (e.moves == 0 || last_row < e.params_count),
                    "pyflowkern::chain: elements of ", e.per_feature, " parameters, not ",
                    per_feature);
    STD_TORCH_CHECK(!e.residual || e.layers % 2 == 0,
                    "pyflowkern::chain: residual blocks are pairs of layers");
    e.rows = e.reads, e.widest = e.reads;
    if (e.layers == 0) {
      e.shared = parameter(1, 1, e.params_count, e.params_count, &e.grad_shared);
    }
    int64_t inputs = e.reads;
    for (int l = 0; l < e.layers; ++l) {
      inputs = read_layer(e, l, inputs, l == 0 && first_context == kJoinContext);
    }
    STD_TORCH_CHECK(e.layers == 0 || inputs == e.params_count, "pyflowkern::chain: a network of ",
                    inputs, " outputs for ", e.params_count);
    if (first_context != kNoContext) read_first_context(e, first_context);
    e.params = e.rows;
    e.rows += e.params_count;
    int64_t of_gradients = 3 * e.widest;
    if (e.inverse && e.layers > 0) {
      ChainLayer* layer = t_.layers.data() + t_.layers.size() - e.layers;
      const int64_t more = plan_walk(e, layer, a.features, t_.walks.emplace_back());
      of_gradients = more > of_gradients ? more : of_gradients;
      STD_TORCH_CHECK(!e.walks || !on_device_,
                      "pyflowkern::chain: autoregressive inverses are computed on CPUs alone");
    }
    e.rows += of_gradients;
    a.rows = e.rows > a.rows ? e.rows : a.rows;
  }

  // What the next tensors' gradients belong to.
  void of_layer(int l, ChainPart part) {
    ChainGrad& g = t_.grads.back();
    g.layer = l, g.step = static_cast<int>(t_.steps.size()), g.part = part;
  }

  void read_first_context(ChainElements& e, int how) {
    ChainLayer& y = t_.layers[t_.layers.size() - e.layers];
    STD_TORCH_CHECK(!on_device_ || (how == kAddContext && y.rows == nullptr),
                    "pyflowkern::chain: a context that only CPUs know");
    const int64_t count = t_.args.context;
    e.context_stride = padded(count);
    e.context_lead = count;
    if (how == kAddContext) {
      e.context_weight = parameter(2, y.out, count, e.context_stride, &e.grad_context);
      of_layer(0, kContextPart);
    } else if (how == kJoinContext) {
      const int64_t size = type_ == ScalarType::Double ? 8 : 4;
      e.context_weight = static_cast<const char*>(y.given) + y.in * size;
      e.context_lead = y.lead;
    } else {
      y.context = parameter(2, y.out, count, e.context_stride, &y.grad_context);
      of_layer(0, kContextPart);
      y.gate_bias = parameter(1, 1, y.out, y.out, &y.grad_gate_bias);
      of_layer(0, kUnitPart);
      y.activated = true;
      y.gate = e.rows;
      e.rows += y.out;
    }
    if (y.rows != nullptr) t_.prepared += y.out * padded(count) + padded(y.out);
  }

  int64_t read_layer(ChainElements& e, int l, int64_t inputs, bool joined) {
    ChainArgs& a = t_.args;
    ChainLayer y{};
    y.out = reader_.size(), y.in = reader_.size();
    const bool with_bias = reader_.next() != 0;
    y.flags = checked_flags("flags", reader_.next(), kAllChainLayerFlags);
    STD_TORCH_CHECK(y.in == inputs, "pyflowkern::chain: a layer of ", y.in, " inputs for ", inputs);
    // what a residual block adds to is as wide as what it adds
    const int64_t hidden = l > 0 ? t_.layers[t_.layers.size() - l].out : y.out;
    STD_TORCH_CHECK(!e.residual || l == e.layers - 1 || y.out == hidden,
                    "pyflowkern::chain: residual blocks of several widths");
    if (y.flags & kLayerMasked) {
      y.prefix = reader_.many(y.out);
      int32_t before = 0;
      for (int64_t r = 0; r < y.out; ++r) {
        STD_TORCH_CHECK(y.prefix[r] >= before && y.prefix[r] <= y.in,
                        "pyflowkern::chain: prefixes must ascend");
        before = y.prefix[r];
      }
    }
    if (y.flags & kLayerColumns) y.columns = reader_.order(y.in);
    if (y.flags & kLayerRows) y.rows = reader_.order(y.out);
    STD_TORCH_CHECK(!on_device_ || y.prefix != nullptr || !is_copied(y),
                    "pyflowkern::chain: orders of dense layers are known to CPUs alone");
    if (is_copied(y)) t_.prepared += y.out * padded(y.in);
    if (y.rows != nullptr || (y.flags & kLayerContextBias)) t_.prepared += padded(y.out);
    if (l > 0) {
      y.before = e.rows, y.after = e.rows + y.in;
      e.rows += 2 * y.in;
    }
    e.widest = y.in > e.widest ? y.in : e.widest;
    // the gradient of the context's part stands beside that of the others
    y.grad_stride = padded(y.in) + (joined ? padded(a.context) : 0);
    a.widest = y.grad_stride > a.widest ? y.grad_stride : a.widest;
    y.lead = y.stride = y.in + (joined ? a.context : 0);
    y.given = y.weight = parameter(2, y.out, y.lead, y.grad_stride, &y.grad);
    t_.grads.back().columns = y.in;
    of_layer(l, kWeightPart);
    if (with_bias) {
      y.bias = parameter(1, 1, y.out, y.out, &y.grad_bias);
      of_layer(l, kUnitPart);
    }
    STD_TORCH_CHECK(!(y.flags & kLayerContextBias) || (y.flags & kLayerContext),
                    "pyflowkern::chain: a bias of a context that is not added");
    if (y.flags & (kLayerContext | kLayerGate)) read_context(e, y, l);
    t_.layers.push_back(y);
    return y.out;
  }

  void read_context(ChainElements& e, ChainLayer& y, int l) {
    y.gated = y.flags & kLayerGate;
    STD_TORCH_CHECK(l > 0 && l < e.layers - 1 && t_.args.context > 0 &&
                        !(y.gated && (y.flags & kLayerContext)) && !on_device_,
                    "pyflowkern::chain: a context of a layer that takes none");
    e.context_stride = padded(t_.args.context);
    y.context = parameter(2, y.out, t_.args.context, e.context_stride, &y.grad_context);
    of_layer(l, kContextPart);
    if (y.rows != nullptr) {
      t_.prepared += y.out * padded(t_.args.context) + padded(y.out);
    }
    if (y.flags & kLayerContextBias) read_context_bias(y, l);
    if (!y.gated) return;
    y.gate_bias = parameter(1, 1, y.out, y.out, &y.grad_gate_bias);
    of_layer(l, kUnitPart);
    y.ungated = e.rows, y.gate = e.rows + y.out;
    e.rows += 2 * y.out;
  }

  // Its gradient is that of the layer's own bias, with which it is added.
  void read_context_bias(ChainLayer& y, int l) {
    const void* bias = keep(floating(1, 1, y.out));
    if (y.bias != nullptr) {
      y.context_bias = bias;
    } else {
      y.bias = bias;
      y.grad_bias = t_.args.size;
      t_.args.size += y.out;
    }
    t_.grads.push_back({nullptr, 1, y.out, y.grad_bias, y.out, false, false, -1, 0});
    of_layer(l, kUnitPart);
  }

  ChainTensors& t_;
  ChainReader reader_;
  ScalarType type_;
  bool on_device_;
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
