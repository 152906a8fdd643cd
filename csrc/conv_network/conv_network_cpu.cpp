// SPDX-License-Identifier: Apache-2.0
// Networks of 3x3 and 1x1 convolutions and ReLUs on the CPU.
//
// Lower bound of the time: a multiply-add forward and two backward for each element of a weight and
// pixel.  One thread of Zen 4 multiplies and adds 117 Gflop/s in float32; torch's convolutions,
// with the ReLUs between them, reached 40 to 52% of it forward and backward on 32 images of 16x16
// pixels with 64 hidden channels, in the order of channels and of pixels.
#include "conv_network/conv_network.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(int64_t conv_work_bytes(const ConvArgs&, bool);
                   void conv_run(const ConvArgs&, bool, void*, int64_t, int64_t);
                   void conv_pack_layers(const ConvArgs&, bool, int64_t, int64_t);
                   void conv_sum(const ConvArgs&, int64_t, int64_t);
                   void conv_unpack_layers(const ConvArgs&, bool, int64_t, int64_t))

PFK_BEGIN

int64_t conv_work_bytes(const ConvArgs& n, bool wide) {
  return wide ? ConvWork<double>::numbers(n) * sizeof(double)
              : ConvWork<float>::numbers(n) * sizeof(float);
}
void conv_run(const ConvArgs& n, bool wide, void* memory, int64_t begin, int64_t end) {
  if (n.backward) {
    wide ? backward_tasks<double>(n, memory, begin, end)
         : backward_tasks<float>(n, memory, begin, end);
  } else {
    wide ? forward_tasks<double>(n, memory, begin, end)
         : forward_tasks<float>(n, memory, begin, end);
  }
}
void conv_pack_layers(const ConvArgs& n, bool wide, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; ++l) {
    wide ? conv_pack<double>(n.layer[l], n.backward) : conv_pack<float>(n.layer[l], n.backward);
  }
}
void conv_sum(const ConvArgs& n, int64_t begin, int64_t end) { conv_total(n, begin, end); }
void conv_unpack_layers(const ConvArgs& n, bool wide, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; ++l) {
    wide ? conv_unpack<double>(n, n.layer[l]) : conv_unpack<float>(n, n.layer[l]);
  }
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include <algorithm>

#include "core/host.h"
#include "core/workspace.h"

namespace pfk {
namespace {

using Tensors = std::vector<Tensor>;

// A tensor whose pixels are a constant step apart, copied where they are not.
struct Images {
  Tensor tensor;
  Planes planes{};
  explicit Images(const Tensor& t) : tensor(t) {
    auto stride = tensor.strides();
    const int64_t height = t.sizes()[2], width = t.sizes()[3];
    if (height > 1 && width > 1 && stride[2] != width * stride[3]) {
      tensor = torch::stable::contiguous(t);
      stride = tensor.strides();
    }
    planes = {data_of(tensor), stride[0], stride[1], width > 1 ? stride[3] : stride[2]};
  }
};

// A new tensor of images.
Images new_images(const Tensor& like, int64_t samples, int64_t channels, bool channels_last) {
  const int64_t height = like.sizes()[2], width = like.sizes()[3], space = height * width;
  const int64_t sizes[] = {samples, channels, height, width};
  const int64_t first[] = {channels * space, space, width, 1};
  const int64_t last[] = {channels * space, 1, width * channels, channels};
  return Images(empty_strided(like, sizes, channels_last ? last : first, 4, like.scalar_type()));
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct ConvNetwork {
  Images x;
  bool wide;
  Tensors weights;
  std::vector<ConvLayer> layers;
  ConvArgs args{};
  Tensor packed;

  ConvNetwork(const Tensor& x_, const Tensors& weights_, bool residual, bool activate_last,
              bool backward)
      : x(x_), wide(is_wide(x_)) {
    ConvArgs& n = args;
    n.samples = x_.sizes()[0];
    n.height = x_.sizes()[2];
    n.width = x_.sizes()[3];
    n.residual = residual;
    n.activate_last = activate_last;
    n.backward = backward;
    n.x = x.planes;
    int64_t in = x_.sizes()[1], size = 0;
    for (const Tensor& weight : weights_) {
      const int64_t side = weight.sizes()[2];
      STD_TORCH_CHECK(weight.scalar_type() == x_.scalar_type() && weight.sizes()[1] == in &&
                          (side == 1 || side == 3) && weight.sizes()[3] == side,
                      "pyflowkern::conv_network: a weight of ", weight.sizes()[1], " inputs for ",
                      in, ", of another dtype, or of a filter other than 1x1 and 3x3");
      weights.push_back(dense(weight));
      ConvLayer y{};
      y.in = in;
      y.out = in = weight.sizes()[0];
      y.side = static_cast<int>(side);
      y.weight = weights.back().const_data_ptr();
      size += weight.numel();
      n.widest = std::max(n.widest, std::max(y.in, y.out));
      layers.push_back(y);
    }
    n.layers = static_cast<int>(layers.size());
    n.layer = layers.data();
    packed = empty(x_, {size});
    set_groups();
    size = 0;
    n.kept_size = kConvMargin;
    for (ConvLayer& y : layers) {
      y.packed = at_element(packed, size);
      size += y.in * y.out * y.side * y.side;
      y.sums = n.size;
      const bool shifts = conv_shifts_input(y);
      n.size += y.side * y.side * (shifts ? y.in : y.out) * conv_padded(shifts ? y.out : y.in);
      y.bias_sums = n.size;
      n.size += y.out;
      if (&y == layers.data()) continue;
      y.kept = n.kept_size;
      n.kept_size += y.in * n.stride;
    }
  }

  // pyflowkern/ops/conv_network.py states the same sizes.
  void set_groups() {
    ConvArgs& n = args;
    n.plane = round_up(n.height * n.width, 16);
    n.images = std::max<int64_t>(1, kConvGroup / n.plane);
    n.groups = (n.samples + n.images - 1) / n.images;
    const int64_t wanted = n.samples * n.height * n.width / kConvTask;
    n.tasks = std::min(n.groups, std::clamp(wanted, kConvTasks / 4, kConvTasks));
    n.stride = conv_padded(n.images * n.plane + kConvMargin);
    n.rows =
        n.images > 1 || n.plane <= kConvBand ? n.height : std::max<int64_t>(1, kConvBand / n.width);
    n.copy_stride = conv_padded(n.images * (n.rows + 2) * n.width + kConvMargin);
    n.band_stride = conv_padded(n.images * round_up(n.rows * n.width, 16));
  }
  void* at_element(const Tensor& t, int64_t i) const {
    return static_cast<char*>(data_of(t)) + i * (wide ? sizeof(double) : sizeof(float));
  }
  int64_t kept_numel() const { return args.groups * args.kept_size + kConvMargin; }
  void pack() const {
    parallel_tasks(args.layers, packed.numel() / args.layers, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(conv_pack_layers, args, wide, begin, end);
    });
  }
  void run() const {
    const int64_t bytes = PFK_CALL_LEVEL(conv_work_bytes, args, wide);
    parallel_tasks(args.backward ? args.tasks : args.groups, int64_t{1} << 20,
                   [&](int64_t begin, int64_t end) {
                     const Workspace memory(bytes);
                     PFK_CALL_LEVEL(conv_run, args, wide, memory.memory(), begin, end);
                   });
  }
};

std::tuple<Tensor, Tensor> conv_network(const Tensor& x, const std::optional<Tensor>& context,
                                        Tensors weights, Tensors biases, bool residual,
                                        bool activate_last, bool channels_last, bool keep) {
  ConvNetwork c(x, weights, residual, activate_last, false);
  ConvArgs& n = c.args;
  Tensors own;
  for (size_t l = 0; l < c.layers.size(); ++l) {
    STD_TORCH_CHECK(
        biases[l].scalar_type() == x.scalar_type() && biases[l].numel() == c.layers[l].out,
        "pyflowkern::conv_network: a bias of another size or dtype");
    own.push_back(dense(biases[l]));
    c.layers[l].bias = own.back().const_data_ptr();
  }
  if (context) {
    STD_TORCH_CHECK(context->scalar_type() == x.scalar_type() &&
                        context->numel() == n.samples * c.layers[0].out,
                    "pyflowkern::conv_network: a context of another size or dtype");
    own.push_back(dense(*context));
    n.context = address_of(own.back());
  }
  const Images out = new_images(x, n.samples, c.layers.back().out, channels_last);
  Tensor kept = empty(x, {keep ? c.kept_numel() : 0});
  n.out = out.planes;
  if (keep) {
    n.kept = data_of(kept);
    const size_t margin = kConvMargin * kept.element_size();
    memset(c.at_element(kept, kept.numel() - kConvMargin), 0, margin);
  }
  c.pack();
  c.run();
  return {out.tensor, kept};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> conv_network_backward(
    const Tensor& grad, const Tensor& x, Tensors weights, const Tensor& kept, bool residual,
    bool activate_last, bool channels_last, bool with_x, bool with_context) {
  ConvNetwork c(x, weights, residual, activate_last, true);
  ConvArgs& n = c.args;
  const int64_t channels = c.layers[0].in, hidden = c.layers[0].out;
  STD_TORCH_CHECK(kept.scalar_type() == x.scalar_type() && kept.is_contiguous() &&
                      kept.numel() == c.kept_numel(),
                  "pyflowkern::conv_network_backward: needs what a forward pass with keep kept");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.scalar_type() == x.scalar_type() &&
                      grad.numel() == n.samples * c.layers.back().out * n.height * n.width,
                  "pyflowkern::conv_network_backward: a gradient of another size or dtype");
  const Images grad_out(grad);
  const Images grad_x = new_images(x, with_x ? n.samples : 0, channels, channels_last);
  Tensor grad_context = empty(x, {with_context ? n.samples : 0, hidden});
  n.out = grad_out.planes;
  n.kept = data_of(kept);
  if (with_x) n.grad_x = grad_x.planes;
  n.grad_context = with_context ? data_of(grad_context) : nullptr;
  Tensors grad_weights, grad_biases;
  for (ConvLayer& y : c.layers) {
    grad_weights.push_back(empty(x, {y.out, y.in, y.side, y.side}));
    grad_biases.push_back(empty(x, {y.out}));
    y.grad_weight = data_of(grad_weights.back());
    y.grad_bias = data_of(grad_biases.back());
  }
  n.tasks = std::max<int64_t>(n.tasks, 1);  // an empty batch has zeros for gradients, too
  const Workspace sums(n.tasks * n.size * static_cast<int64_t>(sizeof(double)));
  n.sums = static_cast<double*>(sums.memory());
  c.pack();
  c.run();
  parallel_tasks(n.size / 8192 + 1, 8192 * n.tasks, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(conv_sum, n, begin * 8192, std::min(end * 8192, n.size));
  });
  parallel_tasks(n.layers, n.size / n.layers, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(conv_unpack_layers, n, c.wide, begin, end);
  });
  return {grad_x.tensor, grad_context, grad_weights, grad_biases};
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  using namespace pfk;
  m.impl("conv_network", TORCH_BOX(&conv_network));
  m.impl("conv_network_backward", TORCH_BOX(&conv_network_backward));
}
#endif
