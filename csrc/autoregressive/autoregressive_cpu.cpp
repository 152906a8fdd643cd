// SPDX-License-Identifier: Apache-2.0
// The inverse of an autoregressive flow on the CPU.
//
// A task is a block of samples.  Each unit has a row with its values of all samples of the block.
// So the sums of several units are a matrix product, whose right factor is read in whole vectors.
// Lower bound of the time: the multiplications of the unmasked weights, about half of those of a
// forward pass.
#include "autoregressive/autoregressive.h"
#include "core/gemm.h"
#include "core/simd.h"

#include <vector>

PFK_DECLARE_LEVELS(void autoregressive_inverse(const AutoregressiveArgs&, int, int, int64_t,
                                               int64_t))

PFK_BEGIN

namespace {

// The work space of one block: rows of `width` samples, of which `count` are real.
template <class T>
struct Work {
  T* rows;
  double* log_det;
  int64_t width, first, count;
  int64_t columns;  // columns that are computed: whole vectors
  T* row(int64_t r) const { return rows + r * width; }
};

// Adds the residual of unit u.
template <class T>
void add_residual(const MaskedLayer& layer, const Work<T>& w, int u, T* out) {
  const T* add = w.row(layer.residual + layer.residual_at[u]);
  for (int64_t i = 0; i < w.columns; i += Vec<T>::kLanes) {
    (Vec<T>::load(out + i) + Vec<T>::load(add + i)).store(out + i);
  }
}

// The first terms of the sums of units [begin, end): biases, and residuals unless there is a gate,
// which would multiply them.
template <class T>
void start_units(const MaskedLayer& layer, const Work<T>& w, int begin, int end, T* out) {
  const T* bias = static_cast<const T*>(layer.bias);
  for (int u = begin; u < end; ++u, out += w.width) {
    if (layer.bias_row == 0) {
      const Vec<T> b = bias[u];
      for (int64_t i = 0; i < w.columns; i += Vec<T>::kLanes) b.store(out + i);
    } else {
      for (int64_t i = 0; i < w.count; ++i) out[i] = bias[(w.first + i) * layer.bias_row + u];
      for (int64_t i = w.count; i < w.columns; ++i) out[i] = T(0);
    }
    if (layer.residual >= 0 && layer.gate == nullptr) add_residual(layer, w, u, out);
  }
}

// Multiplies units [begin, end) by their gates, and then adds residuals.
template <class T>
void gate_units(const MaskedLayer& layer, const Work<T>& w, int begin, int end, T* out) {
  const T* gate = static_cast<const T*>(layer.gate);
  for (int u = begin; u < end; ++u, out += w.width) {
    for (int64_t i = 0; i < w.count; ++i) out[i] *= gate[(w.first + i) * layer.gate_row + u];
    if (layer.residual >= 0) add_residual(layer, w, u, out);
  }
}

// Adds the products of units [begin, end) with the first `depth` rows that they read.  Tiles get
// equal numbers of rows: a last tile of one row would take as long as one of three.
template <class T>
void multiply(const MaskedLayer& layer, const Work<T>& w, int begin, int end, int depth, T* out) {
  const T* weight = static_cast<const T*>(layer.weight);
  const int tiles = (end - begin + kGemmRows - 1) / kGemmRows;
  for (int tile = 0; tile < tiles; ++tile) {
    const int from = begin + (end - begin) * tile / tiles;
    const int to = begin + (end - begin) * (tile + 1) / tiles;
    gemm<T>({weight + static_cast<int64_t>(from) * layer.stride, layer.stride, 1},
            {w.row(layer.source), w.width}, to - from, w.columns, depth,
            {out + (from - begin) * w.width, w.width}, true);
  }
}

// Values of units [begin, end).
template <class T>
void sum_units(const MaskedLayer& layer, const Work<T>& w, int begin, int end, int depth, T* out) {
  start_units(layer, w, begin, end, out);
  multiply(layer, w, begin, end, depth, out);
  if (layer.gate != nullptr) gate_units(layer, w, begin, end, out);
}

template <class T>
void find_units(const MaskedLayer& layer, const Work<T>& w, int step) {
  const int begin = step == 0 ? 0 : layer.counts[step - 1], end = layer.counts[step];
  if (begin == end) return;
  T* out = w.row((layer.raw >= 0 ? layer.raw : layer.activated) + begin);
  sum_units(layer, w, begin, end, layer.source_counts[step], out);
  if (layer.activated < 0) return;
  T* activated = w.row(layer.activated + begin);
  with_activation(layer.activation, [&](auto activation) {
    for (int u = begin; u < end; ++u, out += w.width, activated += w.width) {
      for (int64_t i = 0; i < w.columns; i += Vec<T>::kLanes) {
        activation_curve<decltype(activation)::value>(Vec<T>::load(out + i))
            .value.store(activated + i);
      }
    }
  });
}

// The parameters of a vector of samples: one in each row.
template <class T>
struct ParamRows {
  T* p;
  int64_t width;
  PFK_HD Vec<T> get(int c) const { return Vec<T>::load(p + c * width); }
  PFK_HD void put(int c, Vec<T> v) { v.store(p + c * width); }
};

// Computes row `rank` of x; invert(z, tile) computes a vector of it.
template <class T, class Invert>
void find_vectors(const Work<T>& w, int rank, T* params, Invert invert) {
  T* x = w.row(rank);
  for (int64_t i = 0; i < w.columns; i += Vec<T>::kLanes) {
    ParamRows<T> tile{params + i, w.width};
    const InvertedFeature<Vec<T>> f = invert(Vec<T>::load(x + i), tile);
    f.x.store(x + i);
    T terms[Vec<T>::kLanes];
    f.log_det.store(terms);
    for (int lane = 0; lane < Vec<T>::kLanes; ++lane) w.log_det[i + lane] += terms[lane];
  }
}

template <class T>
struct ElementMaps {
  AffineMap<T> affine;
  SplineMap<T> spline;
};

template <class T>
void find_feature(const AutoregressiveArgs& a, const Work<T>& w, int rank, T* params,
                  const ElementMaps<T>& maps) {
  const T* z = static_cast<const T*>(a.z) + w.first * a.features + a.order[rank];
  T* known = w.row(rank);
  for (int64_t i = 0; i < w.count; ++i) known[i] = z[i * a.features];
  for (int64_t i = w.count; i < w.columns; ++i) known[i] = T(0);
  if (a.kind >= 0) {
    with_scale_kind(a.kind, [&](auto kind) {
      find_vectors(w, rank, params, [&](Vec<T> v, const ParamRows<T>& tile) {
        return invert_affine<decltype(kind)::value>(v, tile, maps.affine);
      });
    });
  } else {
    const SplineMap<T> m = maps.spline;  // a copy: the compiler reloads what a reference leads to
    using Common = SplineConfig<8, kSoftmax, kIdentityTails>;
    with_spline_kind(m.kind, [&](auto kind) {
      constexpr int kKind = decltype(kind)::value;
      if (kKind == kRational && m.bins == 8 && m.parameters == kSoftmax &&
          m.tails == kIdentityTails) {
        find_vectors(w, rank, params, [&](Vec<T> v, ParamRows<T>& tile) {
          return invert_spline<kKind, Common>(v, tile, m);
        });
      } else {
        find_vectors(w, rank, params, [&](Vec<T> v, ParamRows<T>& tile) {
          return invert_spline<kKind, AnySpline>(v, tile, m);
        });
      }
    });
  }
  T* x = static_cast<T*>(a.x) + w.first * a.features + a.order[rank];
  for (int64_t i = 0; i < w.count; ++i) x[i * a.features] = known[i];
}

template <class T>
void run_block(const AutoregressiveArgs& a, const Work<T>& w, const ElementMaps<T>& maps) {
  const MaskedLayer& last = a.layers[a.layer_count - 1];
  for (int64_t i = 0; i < w.columns; ++i) w.log_det[i] = 0;
  for (int step = 0; step < a.levels; ++step) {
    for (int j = 0; j + 1 < a.layer_count; ++j) find_units(a.layers[j], w, step);
    T* params = w.row(a.params);
    for (int rank = a.feature_counts[step]; rank < a.feature_counts[step + 1]; ++rank) {
      const int begin = rank * a.outputs, end = begin + a.outputs;
      sum_units(last, w, begin, end, last.source_counts[step], params);
      find_feature(a, w, rank, params, maps);
    }
  }
  T* log_det = static_cast<T*>(a.log_det) + w.first;
  for (int64_t i = 0; i < w.count; ++i) log_det[i] = static_cast<T>(w.log_det[i]);
}

template <class T>
void run_blocks(const AutoregressiveArgs& a, int width, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64;
  std::vector<T> memory(static_cast<size_t>(a.rows) * width + kLine / sizeof(T));
  std::vector<double> log_det(width);
  ElementMaps<T> maps{};
  if (a.kind >= 0) {
    maps.affine = affine_map<T>(a.numbers, a.flags);
  } else {
    maps.spline = spline_map<T>(a.spline, a.form, true);
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  T* rows = memory.data() + (kLine - address % kLine) % kLine / sizeof(T);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * width;
    const int64_t count = a.samples - first < width ? a.samples - first : width;
    constexpr int64_t w = Vec<T>::kLanes;
    run_block<T>(a, {rows, log_det.data(), width, first, count, (count + w - 1) / w * w}, maps);
  }
}

}  // namespace

// Blocks [begin, end) of `width` samples.
void autoregressive_inverse(const AutoregressiveArgs& a, int width, int is_double, int64_t begin,
                            int64_t end) {
  if (is_double) return run_blocks<double>(a, width, begin, end);
  run_blocks<float>(a, width, begin, end);
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "autoregressive/autoregressive_host.h"

namespace pfk {

// Samples of a block: few enough for their values to stay in L2 and for every thread to get a
// block.
static int block_width(int64_t samples) { return samples >= 256 ? 64 : samples > 16 ? 32 : 16; }

static void run_autoregressive_cpu(AutoregressiveArgs& a, const Tensor& x) {
  const int width = block_width(a.samples);
  const int is_double = is_wide(x);
  const int64_t blocks = (a.samples + width - 1) / width;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(autoregressive_inverse, a, width, is_double, begin, end);
  });
}

}  // namespace pfk

PFK_REGISTER_AUTOREGRESSIVE(CPU, pfk::run_autoregressive_cpu)
#endif
