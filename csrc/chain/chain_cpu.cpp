// SPDX-License-Identifier: Apache-2.0
// Chains of transforms on the CPU.
//
// Lower bound of the time: 2 operations forward and 8 backward (the forward pass again, and both
// gradients) for each weight and sample, and one spline or affine map of each element three times.
// MAF, D = 6, 5 x (50, 50), batch 200: 3.4 million weights and samples, half of them masked.
#include "chain/chain.h"
#include "core/simd.h"
#include "core/workspace.h"
#include "matrix/matrix.h"

PFK_DECLARE_LEVELS(void chain_prepare(ChainArgs&, PluArgs*, bool, void*);
                   void chain_pack(ChainLayer&, bool, bool, void*);
                   void chain_tiles(const ChainArgs&, bool, bool, int64_t, int64_t);
                   void chain_finish(const ChainArgs&, const ChainGrad&, double, bool);
                   void chain_finish_actnorm(const ChainArgs&, const ChainStep&, double, bool,
                                             void*, void*);
                   void chain_finish_factors(const ChainArgs&, const ChainStep&, PluArgs&, double,
                                             bool, void*);
                   void chain_finish_triangles(const ChainArgs&, const ChainStep&, PluArgs&, double,
                                               bool, void*, void* const*);
                   double chain_sum(const ChainArgs&, bool))

PFK_BEGIN
void plu(const PluArgs&, bool);  // matrix/matrix_cpu.cpp, of the same level
void plu_backward(const PluArgs&, bool);
PFK_END

#include "chain/chain_prepare.h"
#include "chain/chain_tile.h"

PFK_BEGIN

namespace {

template <class T>
void run_forward(const ChainArgs& a, int64_t begin, int64_t end) {
  const Workspace memory(ChainTileWork<T>::bytes(a));
  ChainTileWork<T> work(a, memory.memory());
  for (int64_t t = begin; t < end; ++t) chain_forward_tile(a, work, t * a.tile);
}

// A task is some consecutive tiles.
template <class T>
void run_backward(const ChainArgs& a, int64_t begin, int64_t end) {
  const Workspace memory(ChainTileWork<T>::bytes(a));
  ChainTileWork<T> work(a, memory.memory());
  for (int64_t task = begin; task < end; ++task) {
    T* grads = a.grads == nullptr ? nullptr : typed<T>(a.grads) + task * a.size;
    const int64_t first = task * a.tiles / a.tasks, last = (task + 1) * a.tiles / a.tasks;
    for (int64_t t = first; t < last; ++t) {
      work.rows.first = t == first;
      chain_backward_tile(a, work, t * a.tile, grads);
    }
  }
}

}  // namespace

void chain_prepare(ChainArgs& a, PluArgs* factors, bool wide, void* room) {
  wide ? prepare_chain<double>(a, factors, typed<double>(room))
       : prepare_chain<float>(a, factors, typed<float>(room));
}
void chain_pack(ChainLayer& y, bool wide, bool backward, void* room) {
  wide ? pack_layer<double>(y, backward, typed<double>(room))
       : pack_layer<float>(y, backward, typed<float>(room));
}
void chain_tiles(const ChainArgs& a, bool wide, bool backward, int64_t begin, int64_t end) {
  if (backward) {
    wide ? run_backward<double>(a, begin, end) : run_backward<float>(a, begin, end);
  } else {
    wide ? run_forward<double>(a, begin, end) : run_forward<float>(a, begin, end);
  }
}
double chain_sum(const ChainArgs& a, bool wide) {
  return wide ? sum_tasks<double>(a, 0) : sum_tasks<float>(a, 0);
}
void chain_finish(const ChainArgs& a, const ChainGrad& g, double log_sum, bool wide) {
  wide ? finish_gradient<double>(a, g, log_sum) : finish_gradient<float>(a, g, log_sum);
}
void chain_finish_actnorm(const ChainArgs& a, const ChainStep& s, double sum, bool wide,
                          void* log_scale, void* bias) {
  wide ? finish_actnorm<double>(a, s, sum, log_scale, bias)
       : finish_actnorm<float>(a, s, sum, log_scale, bias);
}
void chain_finish_factors(const ChainArgs& a, const ChainStep& s, PluArgs& f, double log_sum,
                          bool wide, void* room) {
  wide ? finish_factors<double>(a, s, f, log_sum, typed<double>(room))
       : finish_factors<float>(a, s, f, log_sum, typed<float>(room));
}
void chain_finish_triangles(const ChainArgs& a, const ChainStep& s, PluArgs& f, double log_sum,
                            bool wide, void* room, void* const* out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    finish_triangles<T>(a, s, f, log_sum, typed<T>(room), typed<T>(out[0]), typed<T>(out[1]),
                        typed<T>(out[2]));
  };
  wide ? run(0.0) : run(0.0F);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "chain/chain_host.h"

namespace pfk {
namespace {

using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// Samples from which on it pays to pack the weights first.
constexpr int64_t kPackSamples = 256;

// Numbers of all weights, times samples: a measure of the time.
int64_t work_of(const ChainArgs& a, int64_t samples) {
  return (a.size + a.features * 64) * samples;
}

struct Chain {
  ChainTensors t;
  ChainArgs& a;
  std::optional<Workspace> prepared;
  bool wide;

  Chain(const Tensor& like, int64_t samples, const Maybe& context, const Tensor& program,
        const Tensor& numbers, const Tensors& tensors, bool inverse, bool backward)
      : a(t.args), wide(is_wide(like)) {
    ChainBuilder(t, like, program, numbers, tensors, inverse);
    a.samples = samples;
    STD_TORCH_CHECK(context.has_value() == (a.context > 0) &&
                        (!context || (context->numel() == samples * a.context &&
                                      context->scalar_type() == like.scalar_type())),
                    "pyflowkern::chain: a context of another size or dtype");
    if (context) {
      t.c = dense(*context);
      a.c = address_of(*t.c);
    }
    place_tiles(a);
    int64_t room = t.prepared;  // and what is packed behind it
    const bool packs = samples >= kPackSamples;
    for (const ChainLayer& y : t.layers) room += packs ? y.out * y.in * (backward ? 2 : 1) : 0;
    prepared.emplace(room * like.element_size());
    PFK_CALL_LEVEL(chain_prepare, a, t.factors.data(), wide, prepared->memory());
    if (packs) pack(backward);
  }

  void pack(bool backward) {
    const int64_t size = wide ? 8 : 4, count = static_cast<int64_t>(t.layers.size());
    std::vector<char*> at{static_cast<char*>(prepared->memory()) + t.prepared * size};
    for (const ChainLayer& y : t.layers) {
      at.push_back(at.back() + y.out * y.in * (backward ? 2 : 1) * size);
    }
    const int64_t numbers = (at.back() - at.front()) / size;
    parallel_tasks(count, numbers / (count > 0 ? count : 1), [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        PFK_CALL_LEVEL(chain_pack, t.layers[l], wide, backward, at[l]);
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> chain(const Tensor& x, const Maybe& context,
                                         const Tensor& program, const Tensor& numbers,
                                         Tensors tensors, int64_t blocks, bool inverse) {
  check_features(program, x);
  const Tensor in = dense(x);
  const int64_t samples = in.sizes()[0];
  Chain chain(in, samples, context, program, numbers, tensors, inverse, false);
  ChainArgs& a = chain.a;
  STD_TORCH_CHECK(blocks == 0 || blocks == a.blocks, "pyflowkern::chain: ", blocks, " blocks for ",
                  a.blocks);
  Tensor z = empty(in, {samples, a.features}), log_det = empty(in, {samples});
  Tensor kept = empty(in, {blocks * a.features * chain_columns(samples)});
  a.x = in.const_data_ptr(), a.z = data_of(z), a.log_det = data_of(log_det);
  a.kept = blocks > 0 ? data_of(kept) : nullptr;
  parallel_tasks(a.tiles, work_of(a, a.tile) / 8, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(chain_tiles, a, chain.wide, false, begin, end);
  });
  return {z, log_det, kept};
}

const void* gradient(const Maybe& grad, int64_t count, const Tensor& like, Tensor& own) {
  if (!grad) return nullptr;
  check_gradient(*grad, count, like);
  own = dense(*grad);
  return address_of(own);
}

// Allocates the gradients of the tensors.
Tensors place_gradients(Chain& chain, const Tensors& tensors) {
  Tensors grads;
  grads.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    ChainGrad& g = chain.t.grads[i];
    grads.push_back(empty(chain.t.like, tensors[i].sizes()));
    g.out = data_of(grads.back());
    const int64_t bytes = tensors[i].numel() * chain.t.like.element_size();
    if (g.rows == 0 && bytes > 0) memset(g.out, 0, bytes);  // without bytes there may be no address
  }
  return grads;
}

// The gradients of the tensors of a step that are made together.
void finish_steps(Chain& chain, double sum) {
  ChainArgs& a = chain.a;
  PluArgs* factors = chain.t.factors.data();
  const int64_t matrix =
      a.features * a.features;  // and three more, of which the last is a diagonal
  const Tensor room = empty(chain.t.like, {chain.t.factors.empty() ? 0 : 3 * matrix + a.features});
  for (int64_t i = 0; i < a.steps; ++i) {
    const ChainStep& s = a.step[i];
    const ChainGrad* to = chain.t.grads.data() + s.first_tensor;
    if (s.kind == kActNormStep) {
      PFK_CALL_LEVEL(chain_finish_actnorm, a, s, sum, chain.wide, to[0].out, to[1].out);
      continue;
    }
    const double log_sum = a.inverse ? -sum : sum;
    if (s.kind == kPluStep) {  // the permutation comes first
      factors->grad_lower = to[1].out, factors->grad_upper = to[2].out;
      factors->grad_log_diag = to[3].out;
      PFK_CALL_LEVEL(chain_finish_factors, a, s, *factors++, log_sum, chain.wide, data_of(room));
    } else if (s.kind == kLuStep) {
      void* const out[] = {to[0].out, to[1].out, to[2].out};
      PFK_CALL_LEVEL(chain_finish_triangles, a, s, *factors++, log_sum, chain.wide, data_of(room),
                     out);
    }
  }
}

std::tuple<Tensor, Tensor, Tensors> chain_backward(const Maybe& grad_z, const Maybe& grad_log_det,
                                                   const Tensor& x, const Tensor& kept,
                                                   const Maybe& context, const Tensor& program,
                                                   const Tensor& numbers, Tensors tensors,
                                                   bool inverse, bool with_x, bool with_context,
                                                   bool with_tensors) {
  check_features(program, x);
  const int64_t samples = x.sizes()[0];
  Chain chain(kept, samples, context, program, numbers, tensors, inverse, true);
  ChainArgs& a = chain.a;
  STD_TORCH_CHECK(
      kept.is_contiguous() && kept.numel() == a.blocks * a.features * chain_columns(samples),
      "pyflowkern::chain_backward: needs what a forward pass kept");
  Tensor of_z, of_log_det;
  a.grad_z = gradient(grad_z, samples * a.features, kept, of_z);
  a.grad_log_det = gradient(grad_log_det, samples, kept, of_log_det);
  a.kept = data_of(kept);
  Tensor grad_x = empty(kept, {with_x ? samples : 0, a.features});
  with_context = with_context && context;
  Tensor grad_c = empty(kept, {with_context ? samples : 0, a.context});
  a.grad_x = with_x ? data_of(grad_x) : nullptr;
  a.grad_c = with_context ? data_of(grad_c) : nullptr;
  place_tasks(a, kept.element_size());
  const Workspace task_grads(with_tensors ? a.tasks * a.size * kept.element_size() : 0);
  a.grads = with_tensors ? task_grads.memory() : nullptr;
  parallel_tasks(a.tasks, work_of(a, samples) / (a.tasks > 0 ? a.tasks : 1) / 2,
                 [&](int64_t begin, int64_t end) {
                   PFK_CALL_LEVEL(chain_tiles, a, chain.wide, true, begin, end);
                 });
  if (!with_tensors) return {grad_x, grad_c, Tensors(tensors.size(), empty(kept, {0}))};
  const double sum = PFK_CALL_LEVEL(chain_sum, a, chain.wide), log_sum = a.inverse ? -sum : sum;
  Tensors grads = place_gradients(chain, tensors);
  const int64_t count = static_cast<int64_t>(grads.size());
  parallel_tasks(count, a.size * a.tasks / (count > 0 ? count : 1) / 8,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const ChainGrad& g = chain.t.grads[i];
                     if (g.rows > 0) PFK_CALL_LEVEL(chain_finish, a, g, log_sum, chain.wide);
                   }
                 });
  finish_steps(chain, sum);
  return {grad_x, grad_c, grads};
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  using namespace pfk;
  m.impl("chain", TORCH_BOX(&chain));
  m.impl("chain_backward", TORCH_BOX(&chain_backward));
}
#endif
