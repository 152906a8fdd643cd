// SPDX-License-Identifier: Apache-2.0
// The squared error of a field with its gradients, on the CPU.
//
// Lower bound of the time: 3 multiply-adds for each element of a weight and sample (2 of them for
// the gradients), but for the first layer 2.
#include "core/simd.h"
#include "field_loss/field_loss.h"

PFK_DECLARE_LEVELS(void field_loss_pack(const LossArgs&, bool, int64_t, int64_t);
                   void field_loss_run(const LossArgs&, bool, int64_t, int64_t);
                   void field_loss_gradients(const LossArgs&, bool, int64_t, int64_t, int64_t))

PFK_BEGIN

void field_loss_pack(const LossArgs& a, bool wide, int64_t begin, int64_t end) {
  wide ? loss_pack<double>(a, begin, end) : loss_pack<float>(a, begin, end);
}
void field_loss_run(const LossArgs& a, bool wide, int64_t begin, int64_t end) {
  wide ? loss_tasks<double>(a, begin, end) : loss_tasks<float>(a, begin, end);
}
void field_loss_gradients(const LossArgs& a, bool wide, int64_t tasks, int64_t begin, int64_t end) {
  wide ? loss_gradients<double>(a, tasks, begin, end) : loss_gradients<float>(a, tasks, begin, end);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include <vector>

#include "core/host.h"

namespace pfk {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMostColumns = int64_t{1} << 20;  // tensors without numbers may say any size
constexpr int64_t kLeastTask = 64, kMostTasks = 16, kMostTile = 96;  // samples, tasks, samples

// An even number of tasks of about equal size: as many threads as there are take equal shares.
int64_t tasks_of(LossArgs& a) {
  int64_t pairs = a.samples / (2 * kLeastTask);
  pairs = pairs < 1 ? 1 : pairs > kMostTasks / 2 ? kMostTasks / 2 : pairs;
  a.task = (a.samples + 2 * pairs - 1) / (2 * pairs);
  a.task = a.task > 0 ? a.task : 1;
  const int64_t tiles = (a.task + kMostTile - 1) / kMostTile;
  a.tile = (a.task + tiles - 1) / tiles;
  return (a.samples + a.task - 1) / a.task;
}

struct Loss {
  Tensor x, target;
  Tensors own;  // what was made contiguous
  std::vector<LossLayer> layers;
  LossArgs args{};
  bool wide;
  int64_t packed_size = 0;

  Loss(const Tensor& x_, const Tensor& target_, const std::optional<Tensor>& joined,
       const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
       const Tensors& weights, const Tensors& biases, const Tensors& rows)
      : x(dense(x_)), target(dense(target_)), wide(is_wide(x_)) {
    STD_TORCH_CHECK(x.dim() == 2 && (!joined || (joined->dim() == 2 && joined->sizes()[1] > 0)),
                    "pyflowkern::field_loss: x and what is joined must be [N, columns]");
    args.samples = x.sizes()[0];
    args.features = x.sizes()[1];
    args.layers = static_cast<int>(weights.size());
    args.joined = joined ? joined->sizes()[1] : 0;
    STD_TORCH_CHECK(args.features <= kMostColumns && args.joined <= kMostColumns,
                    "pyflowkern::field_loss: too many columns");
    args.x = x.const_data_ptr();
    args.target = target.const_data_ptr();
    args.c = joined ? of(*joined, args.samples * args.joined, "joined") : x.const_data_ptr();
    args.scale = scale ? of(*scale, args.samples, "scale") : nullptr;
    args.weight = weight ? of(*weight, args.samples, "weight") : nullptr;
    STD_TORCH_CHECK(args.layers > 0 && biases.size() == weights.size() &&
                        rows.size() == (joined ? weights.size() : 0),
                    "pyflowkern::field_loss: a bias, and rows for what is joined, for each layer");
    int64_t in = args.features;
    for (size_t l = 0; l < weights.size(); ++l) {
      STD_TORCH_CHECK(weights[l].dim() == 2 && weights[l].sizes()[1] == in,
                      "pyflowkern::field_loss: a weight does not take ", in, " inputs");
      LossLayer y{};
      y.in = in;
      in = y.out = weights[l].sizes()[0];
      STD_TORCH_CHECK(in <= kMostColumns, "pyflowkern::field_loss: too many columns");
      y.weight = of(weights[l], y.out * y.in, "a weight");
      y.bias = of(biases[l], y.out, "a bias");
      if (joined) y.rows = of(rows[l], y.out * args.joined, "rows");
      add(y);
    }
    args.outputs = in;
    STD_TORCH_CHECK(target.dim() == 2 && target.sizes()[0] == args.samples &&
                        target.sizes()[1] == in && target.scalar_type() == x.scalar_type(),
                    "pyflowkern::field_loss: a target of another size or dtype");
    args.layer = layers.data();
  }

  const void* of(const Tensor& t, int64_t count, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.numel() == count,
                    "pyflowkern::field_loss: ", name, " of another size or dtype");
    own.push_back(dense(t));
    return address_of(own.back());
  }

  void add(LossLayer& y) {
    constexpr int64_t kLanes = 16;
    const int64_t inputs = loss_inputs(args, y);
    y.in_stride = padded(inputs);
    y.out_stride = padded(y.out + args.joined + 1);  // the inputs of the next layer
    y.transposed =
        inputs * ((y.out + kLanes - 1) / kLanes) <= y.out * ((inputs + kLanes - 1) / kLanes);
    y.forward = packed_size;
    y.back = y.forward + inputs * y.out_stride;
    packed_size = y.back + y.out * y.in_stride;
    y.sums = args.sums_size;
    args.sums_size += loss_sums(args, y);
    for (int64_t stride : {y.in_stride, y.out_stride}) {
      args.widest = args.widest > stride ? args.widest : stride;
    }
    layers.push_back(y);
  }

  int64_t size() const { return wide ? sizeof(double) : sizeof(float); }

  // New tensors for the gradients: of weights, biases and rows, then of x, the target and what
  // is joined.
  Tensors keep(bool inputs) {
    args.keep = true;
    args.inputs = inputs;
    Tensors found;
    auto next = [&](Sizes sizes) {
      found.push_back(empty(x, sizes));
      return data_of(found.back());
    };
    for (LossLayer& y : layers) y.grad_weight = next({y.out, y.in});
    for (LossLayer& y : layers) y.grad_bias = next({y.out});
    if (args.joined > 0) {
      for (LossLayer& y : layers) y.grad_rows = next({args.joined, y.out});
    }
    if (!inputs) return found;
    args.grad_x = next(x.sizes());
    args.grad_target = next(target.sizes());
    if (args.joined > 0) args.grad_c = next({args.samples, args.joined});
    return found;
  }

  // The memory of a tile: three buffers as wide as any row, then the inputs and slopes of layers.
  void place_tile() {
    args.tile_size = 3 * args.tile * args.widest;
    for (LossLayer& y : layers) {
      y.input = args.tile_size;
      y.slope = y.input + args.tile * y.in_stride;
      args.tile_size = y.slope + args.tile * y.out_stride;
    }
  }

  double run() {
    const int64_t tasks = tasks_of(args);
    place_tile();
    const Workspace packed(packed_size * size());
    const int64_t of_sums = tasks > 0 ? tasks : 1;  // an empty batch has zeros for gradients, too
    const Workspace sums((args.keep ? of_sums * args.sums_size : 0) * size());
    std::vector<double> losses(tasks);
    args.packed = packed.memory();
    args.sums = sums.memory();
    args.loss = losses.data();
    const int64_t count = args.layers;
    parallel_tasks(count, packed_size / count / 4, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_loss_pack, args, wide, begin, end);
    });
    parallel_tasks(tasks, args.task * packed_size / 4, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_loss_run, args, wide, begin, end);
    });
    double total = 0;
    for (double loss : losses) total += loss;
    if (!args.keep) return total;
    parallel_tasks(count, args.sums_size / count * tasks / 8, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(field_loss_gradients, args, wide, tasks, begin, end);
    });
    return total;
  }
};

std::tuple<Tensor, Tensors> field_loss(const Tensor& x, const Tensor& target,
                                       const std::optional<Tensor>& joined,
                                       const std::optional<Tensor>& scale,
                                       const std::optional<Tensor>& weight, Tensors weights,
                                       Tensors biases, Tensors rows, int64_t activation, bool keep,
                                       bool inputs) {
  Loss f(x, target, joined, scale, weight, weights, biases, rows);
  f.args.activation =
      static_cast<Activation>(checked_kind("activation", activation, kMaskedActivations));
  Tensors gradients = keep ? f.keep(inputs) : Tensors();
  const double mean = f.run() / static_cast<double>(f.target.numel());
  Tensor loss = empty(f.x, {});
  if (f.wide) {
    *static_cast<double*>(data_of(loss)) = mean;
  } else {
    *static_cast<float*>(data_of(loss)) = static_cast<float>(mean);
  }
  return {loss, gradients};
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) { m.impl("field_loss", TORCH_BOX(&pfk::field_loss)); }
#endif
