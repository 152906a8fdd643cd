// SPDX-License-Identifier: Apache-2.0
// Elements of a program, and the networks that give their parameters.
#pragma once

#include <algorithm>
#include <vector>

#include "affine/affine_host.h"
#include "chain/chain.h"
#include "chain/chain_order.h"
#include "chain/chain_reader.h"
#include "spline/spline_form.h"

namespace pfk {

class ChainElementsBuilder {
 protected:
  ChainElementsBuilder(ChainTensors& t, const Tensor& like, const Tensor& program,
                       const Tensor& numbers, const std::vector<Tensor>& tensors, bool on_device)
      : t_(t),
        reader_(program, numbers, tensors),
        type_(like.scalar_type()),
        on_device_(on_device) {}

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
  static int checked_scale_flags(int64_t flags) {
    STD_TORCH_CHECK((flags & ~int64_t{kShiftFirst | kDivide}) == 0,
                    "pyflowkern::chain: flags of a scale map, got ", flags);
    return static_cast<int>(flags);
  }

  // One map for some of the moved features; returns how many rows its parameters are.
  int64_t read_group(const ChainElements& e, int64_t begin, int64_t first) {
    ChainGroup g{};
    g.family = static_cast<ElementFamily>(checked_kind("family", reader_.next(), kElementFamilies));
    const int32_t* p = reader_.many(7);  // kind, tails, parameterization, bins, flags, numbers
    const std::vector<double> numbers = reader_.numbers(p[5], p[6]);
    int64_t per_feature = 0;
    if (g.family == kAffineElements) {
      g.kind = checked_kind("scale map", p[0], kScaleKinds);
      g.flags = checked_scale_flags(p[4]) | (e.inverse ? kInverse : 0);
      g.scale = scale_numbers(numbers);
      per_feature = g.kind == kAdditive ? 1 : 2;
    } else {
      g.form = checked_form(p[0], p[1], p[2], p[3]);
      g.spline = spline_numbers(numbers);
      per_feature = spline_map<float>(g.spline, g.form, false).columns;
    }
    const int64_t count = reader_.size();
    g.per_feature = reader_.size(), g.feature_step = reader_.size(), g.param_step = reader_.size();
    g.begin = begin, g.end = begin + count, g.first = first;
    const int64_t last = (count - 1) * g.feature_step + (g.per_feature - 1) * g.param_step;
    STD_TORCH_CHECK(g.per_feature == per_feature && (count == 0 || last < g.rows()),
                    "pyflowkern::chain: elements of ", g.per_feature, " parameters, not ",
                    per_feature);
    STD_TORCH_CHECK(!e.centred || (g.family == kAffineElements && g.kind != kAdditive),
                    "pyflowkern::chain: maps without scales have none of mean 0");
    STD_TORCH_CHECK(!e.turned || (g.family == kSplineElements && g.form.tails == kIdentityTails),
                    "pyflowkern::chain: splines with linear tails alone are turned");
    t_.groups.push_back(g);
    return g.rows();
  }

  void read_groups(ChainElements& e) {
    e.groups = static_cast<int>(reader_.size());
    int64_t moves = 0;
    for (int i = 0; i < e.groups; ++i) {
      e.params_count += read_group(e, moves, e.params_count);
      moves = t_.groups.back().end;
    }
    e.reads = reader_.size(), e.moves = reader_.size();
    STD_TORCH_CHECK(moves == e.moves && !(e.centred && e.groups != 1),
                    "pyflowkern::chain: maps of ", moves, " features for ", e.moves);
  }

  // Cosines and sines in the place of angles.
  void read_frequencies(ChainElements& e, int64_t at) {
    e.inputs = e.reads;
    if (at < 0) return;
    STD_TORCH_CHECK(!on_device_, "pyflowkern::chain: angles are known to CPUs alone");
    e.frequency = t_.frequencies.emplace_back(reader_.numbers(at, e.reads)).data();
    std::vector<int32_t>& start = t_.tables.emplace_back(e.reads);
    e.inputs = 0;
    for (int64_t r = 0; r < e.reads; ++r) {
      start[r] = static_cast<int32_t>(e.inputs);
      e.inputs += input_count(e, r);
    }
    e.start = start.data();
  }

  // With a mean of all scales, the parameters of no feature are known before the others.
  void check_centred(const ChainElements& e) const {
    std::vector<bool> moves(t_.args.features, false);
    for (int64_t j = 0; j < e.moves; ++j) moves[e.moved[j]] = true;
    for (int64_t r = 0; r < e.reads; ++r) {
      STD_TORCH_CHECK(!moves[e.read[r]], "pyflowkern::chain: scales of mean 0 are of couplings");
    }
  }

  void read_elements(ChainElements& e) {
    ChainArgs& a = t_.args;
    e.inverse = a.inverse;
    const int flags = checked_flags("flags", reader_.next(), kAllChainElementsFlags);
    e.centred = flags & kCentredElements, e.turned = flags & kTurnedElements;
    STD_TORCH_CHECK(!on_device_ || flags == 0, "pyflowkern::chain: elements that only CPUs know");
    read_groups(e);
    e.layers = static_cast<int>(reader_.size());
    const int form = checked_flags("flags", reader_.next(), kAllChainNetworkFlags);
    e.residual = form & kResidualNetwork;
    e.activate_blocks = form & kActivateBlocks, e.activate_last = form & kActivateLast;
    e.activation =
        static_cast<Activation>(checked_kind("activation", reader_.next(), kMaskedActivations));
    const int first_context = checked_kind("context", reader_.next(), kChainContexts);
    STD_TORCH_CHECK(first_context == kNoContext || (a.context > 0 && e.layers > 0),
                    "pyflowkern::chain: a context that is not there, or without a network");
    read_frequencies(e, reader_.next());
    e.read = reader_.indices(e.reads, a.features), e.moved = reader_.indices(e.moves, a.features);
    if (e.centred) check_centred(e);
    STD_TORCH_CHECK(!e.residual || e.layers % 2 == 0,
                    "pyflowkern::chain: residual blocks are pairs of layers");
    e.rows = e.inputs, e.widest = e.inputs;
    if (e.layers == 0) {
      e.shared = parameter(1, 1, e.params_count, e.params_count, &e.grad_shared);
    }
    int64_t inputs = e.inputs;
    for (int l = 0; l < e.layers; ++l) {
      inputs = read_layer(e, l, inputs, l == 0 && first_context == kJoinContext);
    }
    STD_TORCH_CHECK(e.layers == 0 || inputs == e.params_count, "pyflowkern::chain: a network of ",
                    inputs, " outputs for ", e.params_count);
    if (first_context != kNoContext) read_first_context(e, first_context);
    e.params = e.rows;
    e.rows += e.params_count;
    int64_t of_gradients = 3 * e.widest;
    if (e.inverse && e.layers > 0) of_gradients = std::max(of_gradients, read_walk(e));
    e.rows += of_gradients;
    a.rows = e.rows > a.rows ? e.rows : a.rows;
  }

  // Returns the rows of a tile that its gradients need.
  int64_t read_walk(ChainElements& e) {
    ChainLayer* layer = t_.layers.data() + t_.layers.size() - e.layers;
    e.group = t_.groups.data() + t_.groups.size() - e.groups;  // until the vector grows
    const int64_t rows = plan_walk(e, layer, t_.args.features, t_.tables.emplace_back());
    STD_TORCH_CHECK(!e.walks || !on_device_,
                    "pyflowkern::chain: autoregressive inverses are computed on CPUs alone");
    return rows;
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
};

}  // namespace pfk
