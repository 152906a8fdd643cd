// SPDX-License-Identifier: Apache-2.0
// Networks of linear layers and ReLUs on the CPU.
//
// Lower bound of the time: 2 multiply-adds forward and 4 backward for each element of a weight and
// sample.  Products of torch's BLAS with passes over memory between them reached 72% of it at 512
// samples and a width of 256 (MKL, AVX2, 2 threads, Zen 4).  A tile that goes through all layers
// waits for no other thread in between.
#include "core/simd.h"
#include "relu_network/relu_network.h"

PFK_DECLARE_LEVELS(void network_run(const NetworkArgs&, bool, int64_t, int64_t);
                   void network_pack(const NetworkArgs&, bool, int64_t, int64_t);
                   void network_weight(const NetworkArgs&, int, bool, int64_t, int64_t))

PFK_BEGIN

void network_run(const NetworkArgs& a, bool wide, int64_t begin, int64_t end) {
  wide ? network_tasks<double>(a, begin, end) : network_tasks<float>(a, begin, end);
}
void network_pack(const NetworkArgs& a, bool wide, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; ++l) {
    wide ? pack_layer<double>(a.layer[l], a.backward) : pack_layer<float>(a.layer[l], a.backward);
  }
}
void network_weight(const NetworkArgs& a, int l, bool wide, int64_t begin, int64_t end) {
  wide ? weight_rows<double>(a, a.layer[l], begin, end)
       : weight_rows<float>(a, a.layer[l], begin, end);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include <algorithm>

#include "core/host.h"

namespace pfk {
namespace {

using Tensors = std::vector<Tensor>;

struct Network {
  Tensor x;
  Tensors weights;
  std::vector<NetworkLayer> layers;
  NetworkArgs args{};
  Tensor packed;
  bool wide;
  int64_t kept_size = 0, grads_size = 0;  // of a sample

  Network(const Tensor& x_, const Tensors& weights_, bool residual, bool activate_last,
          bool backward)
      : x(dense(x_)), wide(is_wide(x_)) {
    args.samples = x.sizes()[0];
    args.layers = static_cast<int>(weights_.size());
    args.residual = residual;
    args.activate_last = activate_last;
    args.backward = backward;
    args.x = x.const_data_ptr();
    args.wave_end = args.samples;
    int64_t size = 0, in = x.sizes()[1];
    for (const Tensor& weight : weights_) {
      STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.sizes()[1] == in,
                      "pyflowkern::relu_network: a weight of ", weight.sizes()[1], " inputs for ",
                      in, ", or of another dtype");
      in = weight.sizes()[0];
      weights.push_back(dense(weight));
      NetworkLayer y{};
      y.out = weight.sizes()[0];
      y.in = weight.sizes()[1];
      y.in_stride = padded(y.in);
      y.out_stride = padded(y.out);
      y.weight = weights.back().const_data_ptr();
      size += backward ? y.out * y.in_stride : y.in * y.out_stride;
      grads_size += y.out_stride;
      if (!layers.empty()) kept_size += y.in_stride;
      layers.push_back(y);
    }
    args.layer = layers.data();
    packed = empty(x, {size});
    int64_t at = 0;
    for (NetworkLayer& y : layers) {
      y.packed = at_element(packed, at);
      at += backward ? y.out * y.in_stride : y.in * y.out_stride;
    }
  }

  void* at_element(const Tensor& t, int64_t i) const {
    return static_cast<char*>(data_of(t)) + i * (wide ? sizeof(double) : sizeof(float));
  }
  // The inputs of the layers one behind the other, each of all samples.
  void set_kept(const Tensor& kept) {
    int64_t at = 0;
    for (size_t l = 1; l < layers.size(); ++l) {
      layers[l].input = at_element(kept, at);
      at += args.samples * layers[l].in_stride;
    }
  }
  void pack() const {
    const int64_t work = packed.numel() / args.layers;
    parallel_tasks(args.layers, work, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(network_pack, args, wide, begin, end);
    });
  }
  // In an even number of tiles of whole blocks of rows, whatever the number of threads.
  void run() {
    const int64_t samples = args.wave_end - args.wave;
    const int64_t pairs = (samples + 2 * kNetworkTile - 1) / (2 * kNetworkTile);
    const int64_t share = pairs > 0 ? (samples + 2 * pairs - 1) / (2 * pairs) : 0;
    args.tile = (share + kGemmRows - 1) / kGemmRows * kGemmRows;
    const int64_t tiles = args.tile > 0 ? (samples + args.tile - 1) / args.tile : 0;
    parallel_tasks(tiles, packed.numel() * 8, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(network_run, args, wide, begin, end);
    });
  }
  void run_weights() const {
    std::vector<std::pair<int, int64_t>> tasks;
    for (int l = args.layers - 1; l >= 0; --l) {
      for (int64_t at = 0; at < layers[l].out; at += kWeightRows) tasks.emplace_back(l, at);
    }
    if (tasks.empty()) return;
    // a thread gets consecutive tasks, which must contain the same share of every layer
    std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) {
      return a.second * layers[b.first].out < b.second * layers[a.first].out;
    });
    const int64_t work = packed.numel() / static_cast<int64_t>(tasks.size()) * args.samples / 8;
    parallel_tasks(static_cast<int64_t>(tasks.size()), work, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto [l, at] = tasks[t];
        const int64_t stop = at + kWeightRows < layers[l].out ? at + kWeightRows : layers[l].out;
        PFK_CALL_LEVEL(network_weight, args, l, wide, at, stop);
      }
    });
  }
};

std::tuple<Tensor, Tensor> relu_network(const Tensor& x, const std::optional<Tensor>& context,
                                        Tensors weights, Tensors biases, bool residual,
                                        bool activate_last, bool keep) {
  Network n(x, weights, residual, activate_last, false);
  Tensors own;
  for (size_t l = 0; l < n.layers.size(); ++l) {
    STD_TORCH_CHECK(
        biases[l].scalar_type() == x.scalar_type() && biases[l].numel() == n.layers[l].out,
        "pyflowkern::relu_network: a bias of another size or dtype");
    own.push_back(dense(biases[l]));
    n.layers[l].bias = own.back().const_data_ptr();
  }
  if (context) {
    STD_TORCH_CHECK(context->scalar_type() == x.scalar_type() &&
                        context->numel() == n.args.samples * n.layers[0].out,
                    "pyflowkern::relu_network: a context of another size or dtype");
    own.push_back(dense(*context));
  }
  n.args.context = context ? address_of(own.back()) : nullptr;
  Tensor out = empty(n.x, {n.args.samples, n.layers.back().out});
  Tensor kept = empty(n.x, {keep ? n.args.samples * n.kept_size : 0});
  if (keep) n.set_kept(kept);
  n.args.out = data_of(out);
  n.pack();
  n.run();
  return {out, kept};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> relu_network_backward(
    const Tensor& grad, const Tensor& x, Tensors weights, const Tensor& kept, bool residual,
    bool activate_last, bool with_x, bool with_context) {
  constexpr int64_t kWave = 8192;  // samples whose cotangents are in memory
  Network n(x, weights, residual, activate_last, true);
  NetworkArgs& a = n.args;
  const Tensor grad_out = dense(grad);
  a.grad_out = grad_out.const_data_ptr();
  STD_TORCH_CHECK(kept.scalar_type() == x.scalar_type() && kept.is_contiguous() &&
                      kept.numel() == a.samples * n.kept_size,
                  "pyflowkern::relu_network_backward: needs what a forward pass with keep kept");
  STD_TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && grad.numel() == a.samples * n.layers.back().out,
      "pyflowkern::relu_network_backward: a gradient of another size or dtype");
  n.set_kept(kept);
  const Tensor input = empty(n.x, {a.samples * n.layers[0].in_stride});
  n.layers[0].input = data_of(input);
  const int64_t wave = a.samples < kWave ? a.samples : kWave;
  const Tensor grads = empty(n.x, {wave * n.grads_size});
  Tensor grad_x = empty(n.x, {with_x ? a.samples : 0, n.layers[0].in});
  Tensor grad_context = empty(n.x, {with_context ? a.samples : 0, n.layers[0].out});
  a.grad_x = with_x ? data_of(grad_x) : nullptr;
  a.grad_context = with_context ? data_of(grad_context) : nullptr;
  Tensors grad_weights, grad_biases;
  int64_t at = 0;
  for (NetworkLayer& y : n.layers) {
    y.grad_output = n.at_element(grads, at);
    at += wave * y.out_stride;
    grad_weights.push_back(empty(n.x, {y.out, y.in}));
    grad_biases.push_back(empty(n.x, {y.out}));
    y.grad_weight = data_of(grad_weights.back());
    y.grad_bias = data_of(grad_biases.back());
  }
  n.pack();
  do {  // an empty batch has zeros for gradients, too
    a.wave_end = a.wave + wave < a.samples ? a.wave + wave : a.samples;
    n.run();
    n.run_weights();
    a.add = true;
    a.wave = a.wave_end;
  } while (a.wave < a.samples);
  return {grad_x, grad_context, grad_weights, grad_biases};
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  using namespace pfk;
  m.impl("relu_network", TORCH_BOX(&relu_network));
  m.impl("relu_network_backward", TORCH_BOX(&relu_network_backward));
}
#endif
