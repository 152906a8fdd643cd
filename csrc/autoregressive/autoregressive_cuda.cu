// SPDX-License-Identifier: Apache-2.0
// The inverse of an autoregressive flow on a GPU.
//
// A block has a tile of samples and takes all steps for them.  The values of units lie in shared
// memory, or in global memory where they do not fit.  A step computes few units, so that its time
// is the latency of memory accesses and barriers.  Therefore a warp computes two units for all
// samples of the tile, its lanes (or several warps, where there are few units) divide the depth
// between them, and numbers that are needed later are read early.  Weights are read once a tile, by
// neighbouring lanes: with 16-byte packs the lanes of a warp would use the same banks of shared
// memory.
#include "autoregressive/autoregressive_host.h"
#include "core/cuda.cuh"

PFK_BEGIN
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int kTile = 8;  // samples of a block; two 16-byte packs
constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kUnits = 2;       // of a warp at a time
constexpr int kChunkRows = 64;  // units found between two barriers
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct Half {  // one half of a row of the tile
  static constexpr int kCount = kTile / 2;
  T lanes[kCount];
};

// Sums each of kCount values over the warp; lane i has the sum of value i % kCount, in a fixed
// order.
template <int kCount, class T, int kAll>
__device__ T sum_over_warp(T (&v)[kAll]) {
  if constexpr (kCount > 1) {
    constexpr int h = kCount / 2;
    const bool upper = threadIdx.x % kCount >= h;
#pragma unroll
    for (int i = 0; i < h; ++i) {
      const T sent = upper ? v[i] : v[i + h], kept = upper ? v[i + h] : v[i];
      v[i] = kept + __shfl_xor_sync(kAllLanes, sent, h);
    }
    return sum_over_warp<h>(v);
  } else {
#pragma unroll
    for (int offset = kUnits * kTile; offset < kWarp; offset *= 2) {
      v[0] += __shfl_xor_sync(kAllLanes, v[0], offset);
    }
    return v[0];
  }
}

// The memory of a block: rows of kTile values, and the partial sums of a chunk of units.
template <class T>
struct Tile {
  T* rows;
  T* partial;  // [parts * units, kTile]
  int64_t first;
  int count;
  __device__ T& at(int row, int sample) const { return rows[row * kTile + sample]; }
};

// Sums of products of up to two units with rows of the tile, over this lane's part of the depth.
template <class T>
__device__ void products(const MaskedLayer& layer, const T* rows, int unit, bool both, int depth,
                         int part, int parts, T* out, int second) {
  const int lane = threadIdx.x % kWarp;
  const T* w0 = static_cast<const T*>(layer.weight) + static_cast<int64_t>(unit) * layer.stride;
  const T* w1 = both ? w0 + layer.stride : w0;
  // four lanes read the first halves of rows while the next four read second halves: together they
  // use every bank of shared memory once
  const int turn = lane / 4 % 2;
  const Half<T>* halves = reinterpret_cast<const Half<T>*>(rows);
  T sum[kUnits * kTile] = {};
  constexpr int h = Half<T>::kCount;
#pragma unroll 4
  for (int k = part * kWarp + lane; k < depth; k += parts * kWarp) {
    const T a = w0[k], b = w1[k];
    const Half<T> x = halves[2 * k + turn], y = halves[2 * k + 1 - turn];
#pragma unroll
    for (int i = 0; i < h; ++i) {
      sum[i] += a * x.lanes[i];
      sum[h + i] += a * y.lanes[i];
      sum[kTile + i] += b * x.lanes[i];
      sum[kTile + h + i] += b * y.lanes[i];
    }
  }
#pragma unroll
  for (int i = 0; i < h; ++i) {
#pragma unroll
    for (int u = 0; u < kUnits * kTile; u += kTile) {
      const T x = sum[u + i], y = sum[u + h + i];
      sum[u + i] = turn ? y : x;
      sum[u + h + i] = turn ? x : y;
    }
  }
  const T total = sum_over_warp<kUnits * kTile>(sum);
  if (lane < kTile) out[lane] = total;
  if (both && lane >= kTile && lane < 2 * kTile) out[second + lane - kTile] = total;
}

// Computes units [begin, end) of a layer, or parameters, and calls put(unit, sample, value) with
// each. Ends with a barrier.
template <class T, class Put>
__device__ void find_units(const MaskedLayer& layer, const Tile<T>& t, int begin, int end,
                           int depth, Put put) {
  const int warp = threadIdx.x / kWarp;
  for (; begin < end; begin += kChunkRows) {
    const int units = min(end - begin, kChunkRows);
    const int pairs = (units + kUnits - 1) / kUnits;
    const int parts = pairs >= kWarps ? 1 : kWarps / pairs;
    // the bias that this thread adds at the end, read before the products
    const int r = threadIdx.x / kTile, s = threadIdx.x % kTile;
    constexpr int kRowsAtOnce = kThreads / kTile;
    T start = T(0);
    const int64_t sample = t.first + min(s, t.count - 1);
    const auto bias = [&](int unit) {
      return static_cast<const T*>(layer.bias)[sample * layer.bias_row + unit];
    };
    if (r < units) start = bias(begin + r);
    for (int task = warp; task < pairs * parts; task += kWarps) {
      const int pair = task % pairs, part = task / pairs;
      products<T>(layer, &t.at(layer.source, 0), begin + pair * kUnits, pair * kUnits + 1 < units,
                  depth, part, parts, t.partial + (part * units + pair * kUnits) * kTile, kTile);
    }
    __syncthreads();
    for (int row = r; row < units; row += kRowsAtOnce) {
      const int unit = begin + row;
      T value = row == r ? start : bias(unit);
      for (int part = 0; part < parts; ++part) {
        value += t.partial[(part * units + row) * kTile + s];
      }
      if (layer.gate != nullptr) {
        value *= static_cast<const T*>(layer.gate)[sample * layer.gate_row + unit];
      }
      if (layer.residual >= 0) value += t.at(layer.residual + layer.residual_at[unit], s);
      put(unit, s, value);
    }
    __syncthreads();
  }
}

template <class T>
__device__ void find_layer(const MaskedLayer& layer, const Tile<T>& t, int step) {
  const int begin = step == 0 ? 0 : layer.counts[step - 1], end = layer.counts[step];
  find_units(layer, t, begin, end, layer.source_counts[step], [&](int unit, int s, T value) {
    if (layer.raw >= 0) t.at(layer.raw + unit, s) = value;
    if (layer.activated < 0) return;
    with_activation(layer.activation, [&](auto activation) {
      t.at(layer.activated + unit, s) = activation_curve<decltype(activation)::value>(value).value;
    });
  });
}

// A kernel is compiled for scale maps, for rational-quadratic splines, or for other splines.
enum Family : int { kScaleFamily, kRationalFamily, kSplineFamily };

template <class T>
struct ElementMaps {
  AffineMap<T> affine;
  SplineMap<T> spline;
};

// The parameters of one sample of the tile.
template <class T>
struct ParamColumn {
  T* p;
  __device__ T get(int c) const { return p[c * kTile]; }
  __device__ void put(int c, T v) { p[c * kTile] = v; }
};

// Computes feature `rank`, whose parameters begin at `row`; its log-det replaces the first of them.
template <int kFamily, class T>
__device__ void find_feature(const AutoregressiveArgs& a, const ElementMaps<T>& maps,
                             const Tile<T>& t, int rank, int row, int s, T z) {
  ParamColumn<T> column{&t.at(row, s)};
  InvertedFeature<T> f;
  if constexpr (kFamily == kScaleFamily) {
    with_scale_kind(a.kind, [&](auto kind) {
      f = invert_affine<decltype(kind)::value>(z, column, maps.affine);
    });
  } else if constexpr (kFamily == kRationalFamily) {
    f = invert_spline<kRational, AnySpline>(z, column, maps.spline);
  } else {
    with_spline_kind(maps.spline.kind, [&](auto kind) {
      if constexpr (decltype(kind)::value != kRational) {
        f = invert_spline<decltype(kind)::value, AnySpline>(z, column, maps.spline);
      }
    });
  }
  t.at(rank, s) = f.x;
  t.at(row, s) = f.log_det;
  if (s < t.count) static_cast<T*>(a.x)[(t.first + s) * a.features + a.order[rank]] = f.x;
}

template <class T, int kFamily, bool kShared>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    autoregressive_kernel(const AutoregressiveArgs a, const ElementMaps<T> maps, T* scratch) {
  PFK_SHARED_MEMORY(memory);
  T* partial = reinterpret_cast<T*>(memory);
  Tile<T> t{kShared ? partial + kChunkRows * kTile
                    : scratch + blockIdx.x * static_cast<int64_t>(a.rows) * kTile,
            partial, blockIdx.x * static_cast<int64_t>(kTile), 0};
  t.count = static_cast<int>(min(static_cast<int64_t>(kTile), a.samples - t.first));
  const MaskedLayer& last = a.layers[a.layer_count - 1];
  const int r = threadIdx.x / kTile, s = threadIdx.x % kTile;
  const auto read_z = [&](int rank) {
    const int64_t sample =
        t.first + min(s, t.count - 1);  // samples beyond the last are copies of it
    return static_cast<const T*>(a.z)[sample * a.features + a.order[rank]];
  };
  double log_det = 0;
  for (int step = 0; step < a.levels; ++step) {
    const int begin = a.feature_counts[step], end = a.feature_counts[step + 1];
    const T z = begin + r < end ? read_z(begin + r) : T(0);  // read early, because that takes long
    for (int j = 0; j + 1 < a.layer_count; ++j) find_layer(a.layers[j], t, step);
    const int from = begin * a.outputs;
    find_units(last, t, from, end * a.outputs, last.source_counts[step],
               [&](int unit, int i, T value) {
                 int row = unit - from;
                 if (a.param_rows != a.outputs) {
                   row = row / a.outputs * a.param_rows + row % a.outputs;
                 }
                 t.at(a.params + row, i) = value;
               });
    for (int rank = begin + r; rank < end; rank += kThreads / kTile) {
      find_feature<kFamily>(a, maps, t, rank, a.params + (rank - begin) * a.param_rows, s,
                            rank == begin + r ? z : read_z(rank));
    }
    __syncthreads();
    if (threadIdx.x < kTile) {
      for (int i = 0; i < end - begin; ++i) {
        log_det += static_cast<double>(t.at(a.params + i * a.param_rows, s));
      }
    }
  }
  if (static_cast<int>(threadIdx.x) < t.count) {
    static_cast<T*>(a.log_det)[t.first + s] = static_cast<T>(log_det);
  }
}

template <int kFamily, class T>
void launch(const AutoregressiveArgs& a, const ElementMaps<T>& maps, const Tensor& x) {
  int most = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index()));
  const int64_t blocks = (a.samples + kTile - 1) / kTile;
  const int64_t each = static_cast<int64_t>(a.rows) * kTile;
  const size_t partial = kChunkRows * kTile * sizeof(T), all = partial + each * sizeof(T);
  const bool fits = all <= static_cast<size_t>(most);
  Tensor scratch = empty(x, {fits ? 0 : blocks * each});
  auto kernel =
      fits ? autoregressive_kernel<T, kFamily, true> : autoregressive_kernel<T, kFamily, false>;
  PFK_LAUNCH_SHARED(kernel, blocks, kThreads, fits ? all : partial, current_stream(x), a, maps,
                    static_cast<T*>(scratch.mutable_data_ptr()));
}

template <class T>
void launch_family(const AutoregressiveArgs& a, const Tensor& x) {
  ElementMaps<T> maps{};
  if (a.kind >= 0) {
    maps.affine = affine_map<T>(a.numbers, a.flags);
    return launch<kScaleFamily>(a, maps, x);
  }
  maps.spline = spline_map<T>(a.spline, a.form, true);
  if (maps.spline.kind == kRational) return launch<kRationalFamily>(a, maps, x);
  launch<kSplineFamily>(a, maps, x);
}

void run_autoregressive_cuda(AutoregressiveArgs& a, const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  with_compute_type(full_dtype(x), [&](auto type) { launch_family<decltype(type)>(a, x); });
}

}  // namespace
PFK_END

PFK_REGISTER_AUTOREGRESSIVE(CUDA, pfk::run_autoregressive_cuda)
