// SPDX-License-Identifier: Apache-2.0
// Channel mixing on the CPU.
//
// Lower bound of the time: the larger of the bytes (8 an element forward, 12 backward) over the
// copy bandwidth, and of the operations (2 C an element forward, 4 C backward) over the
// multiply-add rate. On two AVX2 cores both are about equal at C = 48.
//
// Pixels are computed in tiles that fit into L1 twice.  A tile is packed (converted, with `pre`
// added), multiplied, and unpacked (with `post` added, converted back).  Packing costs a fraction
// of the product and lets one kernel serve all layouts, dtypes and sizes.  Tiles contain pixels of
// several samples, so that small images are fast, too.  The backward pass packs grad_y and x once
// for both products.  For G the tile of v is transposed in L1 unless the channels are innermost.  G
// is summed in the type of the computation over at most kFlush pixels, then in double.
#include "linear/linear.h"

#include <stdlib.h>

#include "core/gemm.h"
#include "core/half.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void channel_mix(const MixArgs&, DType, int64_t, int64_t);
                   void channel_mix_backward(const MixArgs&, DType, int64_t, int64_t))

PFK_BEGIN

namespace {  // all families are linked into one library

constexpr int64_t kTileElements = 4096, kMaxTile = 192, kFlush = 1024;

template <class T>
int64_t round_up(int64_t n) {
  constexpr int64_t w = Vec<T>::kLanes;
  return (n + w - 1) / w * w;
}

// One thread's buffers.
template <class T>
struct Work {
  int64_t tile;          // pixels of a tile
  Rows<T> v, g, out;     // packed x + pre and grad_y, and a product
  Rows<T> v_transposed;  // v transposed
  Rows<T> sum;           // [channels + 1, stride]: G, and g in the last row
  T* memory;

  explicit Work(const MixArgs& a) {
    const int64_t step =
        6 * 2 * Vec<T>::kLanes > 96 ? 96 : 48;  // whole tiles of gemm for both products
    tile = kTileElements / a.channels / step * step;
    tile = tile < step ? step : tile > kMaxTile ? kMaxTile : tile;
    if (tile > a.pixels) tile = (a.pixels + step - 1) / step * step;
    const bool flat = a.inner == 0;
    const int64_t height = flat ? tile : round_up<T>(a.channels);
    const int64_t width = flat ? a.stride : tile, size = height * width;
    const bool backward = a.grad_y != nullptr;
    const int64_t square = backward && a.partial ? (a.channels + 1) * a.stride : 0;
    const int64_t turning = square && !flat ? tile * a.stride : 0;
    const int64_t total = (backward ? 3 : 2) * size + square + turning;
    memory = static_cast<T*>(aligned_alloc(64, (total * sizeof(T) + 63) / 64 * 64));
    memset(memory, 0, total * sizeof(T));
    T* p = memory;
    v = {p, width}, p += size;
    out = {p, width}, p += size;
    g = {backward ? p : nullptr, width}, p += backward ? size : 0;
    sum = {p, a.stride}, p += square;
    v_transposed = {p, a.stride};
  }
  ~Work() { free(memory); }
  Work(const Work&) = delete;
};

// ---- packing -----------------------------------------------------------------------------------

// Calls f(first element, column of the tile, count) for the runs of a tile of n pixels.  A run ends
// where its sample ends.
template <class F>
PFK_HD void each_run(const MixArgs& a, int64_t first, int64_t n, F f) {
  for (int64_t column = 0; column < n;) {
    const int64_t at = (first + column) % a.inner;
    const int64_t count = a.inner - at < n - column ? a.inner - at : n - column;
    f((first + column - at) * a.channels + at, column, count);
    column += count;
  }
}

template <class T>
Vec<T> add_constants(Vec<T> v, const void* constants, int64_t at) {
  return constants ? v + Vec<T>::load(static_cast<const T*>(constants) + at) : v;
}
template <class T>
T constant_of(const void* constants, int64_t channel) {
  return constants ? static_cast<const T*>(constants)[channel] : T(0);
}

// Packs channels as rows; columns beyond n become zero.
template <class S, class T>
void pack_channels(const MixArgs& a, const S* from, const void* pre, int64_t first, int64_t n,
                   Rows<T> to) {
  constexpr int w = Vec<T>::kLanes;
  each_run(a, first, n, [&](int64_t element, int64_t column, int64_t count) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const S* x = from + element + c * a.inner;
      T* row = to.p + c * to.stride + column;
      const Vec<T> add = constant_of<T>(pre, c);
      int64_t i = 0;
      for (; i + w <= count; i += w) {
        __builtin_prefetch(x + i + to.stride);  // the next tile
        (load_vec(x + i) + add).store(row + i);
      }
      if (i < count) {
        const int m = static_cast<int>(count - i);
        store_vec_n(load_vec_n(x + i, m) + add, row + i, m);
      }
    }
  });
  for (int64_t c = 0; n < to.stride && c < a.channels; ++c) {
    memset(to.p + c * to.stride + n, 0, (to.stride - n) * sizeof(T));
  }
}
template <class S, class T>
void unpack_channels(const MixArgs& a, Rows<T> from, const void* post, int64_t first, int64_t n,
                     S* to) {
  constexpr int w = Vec<T>::kLanes;
  each_run(a, first, n, [&](int64_t element, int64_t column, int64_t count) {
    for (int64_t c = 0; c < a.channels; ++c) {
      S* y = to + element + c * a.inner;
      const T* row = from.p + c * from.stride + column;
      const Vec<T> add = constant_of<T>(post, c);
      int64_t i = 0;
      for (; i + w <= count; i += w) {
        __builtin_prefetch(y + i + from.stride, 1);
        store_vec(Vec<T>::load(row + i) + add, y + i);
      }
      if (i < count) {
        const int m = static_cast<int>(count - i);
        store_vec_n(load_vec_n(row + i, m) + add, y + i, m);
      }
    }
  });
}

// Packs pixels as rows.  A vector may reach beyond its row into the next one: when packing, into
// columns that are not read; when unpacking, into elements that the next row overwrites.  At the
// end of the tile only the elements that exist are read or written.
template <class S, class T>
void pack_pixels(const MixArgs& a, const S* from, const void* pre, int64_t first, int64_t n,
                 Rows<T> to) {
  constexpr int w = Vec<T>::kLanes;
  const S* x = from + first * a.channels;
  for (int64_t p = 0; p < n; ++p) {
    for (int64_t c = 0; c < a.channels; c += w) {
      const int64_t left = (n - p) * a.channels - c;
      const Vec<T> v = left >= w ? load_vec(x + p * a.channels + c)
                                 : load_vec_n(x + p * a.channels + c, static_cast<int>(left));
      add_constants(v, pre, c).store(to.p + p * to.stride + c);
    }
  }
}
template <class S, class T>
void unpack_pixels(const MixArgs& a, Rows<T> from, const void* post, int64_t first, int64_t n,
                   S* to) {
  constexpr int w = Vec<T>::kLanes;
  S* y = to + first * a.channels;
  for (int64_t p = 0; p < n; ++p) {
    for (int64_t c = 0; c < a.channels; c += w) {
      const int64_t left = (n - p) * a.channels - c;
      const Vec<T> v = add_constants(Vec<T>::load(from.p + p * from.stride + c), post, c);
      if (left >= w) {
        store_vec(v, y + p * a.channels + c);
      } else {
        store_vec_n(v, y + p * a.channels + c, static_cast<int>(left));
      }
    }
  }
}

template <class S, class T>
void pack(const MixArgs& a, const void* from, const void* pre, int64_t first, int64_t n,
          Rows<T> to) {
  const S* x = static_cast<const S*>(from);
  a.inner ? pack_channels(a, x, pre, first, n, to) : pack_pixels(a, x, pre, first, n, to);
}
template <class S, class T>
void unpack(const MixArgs& a, Rows<T> from, const void* post, int64_t first, int64_t n, void* to) {
  S* y = static_cast<S*>(to);
  a.inner ? unpack_channels(a, from, post, first, n, y) : unpack_pixels(a, from, post, first, n, y);
}

// ---- products of a tile ------------------------------------------------------------------------
template <class T>
Rows<const T> fixed(Rows<T> m) {
  return {m.p, m.stride};
}

// out = M in over the channels; `transposed` takes the transpose of the matrix that is stored.
template <class T>
void mix(const MixArgs& a, Rows<T> in, int64_t n, bool transposed, Rows<T> out) {
  const T* m = static_cast<const T*>(a.matrix);
  const int64_t c = a.channels, stride = a.stride;
  if (a.inner) {
    const Left<T> left = transposed ? Left<T>{m, 1, stride} : Left<T>{m, stride, 1};
    gemm<T>(left, fixed(in), c, n, c, out, false);
  } else {  // out^T = in^T M^T; the matrix that is stored is the right factor
    gemm<T>({in.p, in.stride, 1}, {m, stride}, n, c, c, out, false);
  }
}

// Adds grad_y v^T and the sums of grad_y to w.sum.
template <class T>
void accumulate(const MixArgs& a, Work<T>& w, int64_t n) {
  constexpr int lanes = Vec<T>::kLanes;
  T* sums = w.sum.p + a.channels * a.stride;
  if (a.inner == 0) {
    gemm<T>({w.g.p, 1, w.g.stride}, fixed(w.v), a.channels, a.channels, n, w.sum, true);
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t c = 0; c < a.channels; c += lanes) {
        (Vec<T>::load(sums + c) + Vec<T>::load(w.g.p + p * w.g.stride + c)).store(sums + c);
      }
    }
    return;
  }
  transpose<T>(fixed(w.v), round_up<T>(a.channels), round_up<T>(n), w.v_transposed);
  gemm<T>({w.g.p, w.g.stride, 1}, fixed(w.v_transposed), a.channels, a.channels, n, w.sum, true);
  for (int64_t c = 0; c < a.channels; ++c) {
    Vec<T> s = T(0);
    for (int64_t p = 0; p < n; p += lanes) s += Vec<T>::load(w.g.p + c * w.g.stride + p);
    sums[c] += static_cast<T>(sum_lanes(s));
  }
}

template <class T>
void flush(const MixArgs& a, Work<T>& w, double* partial) {
  for (int64_t i = 0; i < a.channels; ++i) {
    double* row = partial + i * (a.channels + 1);
    for (int64_t j = 0; j < a.channels; ++j) row[j] += w.sum.p[i * a.stride + j];
    row[a.channels] += w.sum.p[a.channels * a.stride + i];
  }
  memset(w.sum.p, 0, (a.channels + 1) * a.stride * sizeof(T));
}

// ---- tasks -------------------------------------------------------------------------------------
template <class S>
void forward_tasks(const MixArgs& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  Work<T> w(a);
  const int64_t last = end * a.task < a.pixels ? end * a.task : a.pixels;
  for (int64_t first = begin * a.task; first < last; first += w.tile) {
    const int64_t n = last - first < w.tile ? last - first : w.tile;
    pack<S, T>(a, a.x, a.pre, first, n, w.v);
    mix<T>(a, w.v, n, false, w.out);
    unpack<S, T>(a, w.out, a.post, first, n, a.y);
  }
}

template <class S>
void backward_task(const MixArgs& a, Work<Compute<S>>& w, int64_t task) {
  using T = Compute<S>;
  const int64_t last = (task + 1) * a.task < a.pixels ? (task + 1) * a.task : a.pixels;
  double* partial = a.partial ? a.partial + task * a.channels * (a.channels + 1) : nullptr;
  int64_t unflushed = 0;
  for (int64_t first = task * a.task; first < last; first += w.tile) {
    const int64_t n = last - first < w.tile ? last - first : w.tile;
    pack<S, T>(a, a.grad_y, nullptr, first, n, w.g);
    if (a.grad_x) {
      mix<T>(a, w.g, n, true, w.out);
      unpack<S, T>(a, w.out, nullptr, first, n, a.grad_x);
    }
    if (!partial) continue;
    pack<S, T>(a, a.x, a.pre, first, n, w.v);
    accumulate(a, w, n);
    unflushed += n;
    if (unflushed >= kFlush || first + n == last) {
      flush(a, w, partial);
      unflushed = 0;
    }
  }
}

template <class S>
void backward_tasks(const MixArgs& a, int64_t begin, int64_t end) {
  Work<Compute<S>> w(a);
  for (int64_t task = begin; task < end; ++task) backward_task<S>(a, w, task);
}

}  // namespace

void channel_mix(const MixArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { forward_tasks<decltype(element)>(a, begin, end); });
}
void channel_mix_backward(const MixArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { backward_tasks<decltype(element)>(a, begin, end); });
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "linear/linear_host.h"

namespace pfk {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& log_abs_det,
                                   std::optional<Tensor> log_scale, std::optional<Tensor> bias,
                                   bool inverse) {
  Plan p(x, weight, log_scale, bias, inverse);
  Tensor y = empty_like_canonical(p.x), log_det = empty_per_sample(x, p.shape.samples);
  double per_pixel = Values(log_abs_det)[0];
  for (int64_t i = 0; p.log_scale.given && i < p.shape.channels; ++i) per_pixel += p.log_scale[i];
  const double value = p.map.sign() * static_cast<double>(p.shape.space) * per_pixel;
  Values(log_det).fill(value);
  if (p.shape.numel() == 0) return {y, log_det};
  p.fold(p.args.inner == 0);
  p.args.y = y.mutable_data_ptr();
  p.cut(768, INT64_MAX / 2);  // whole tiles of any size
  const DType dtype = dtype_of(x);
  parallel_tasks(p.tasks, p.args.task * p.shape.channels, [&](int64_t begin, int64_t end) {
    PFK_CALL_LEVEL(channel_mix, p.args, dtype, begin, end);
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_log_det, const Tensor& x, const Tensor& weight,
    std::optional<Tensor> log_scale, std::optional<Tensor> bias, bool inverse, bool need_x,
    bool need_parameters) {
  Plan p(x, weight, log_scale, bias, inverse);
  const int64_t c = p.shape.channels, size = need_parameters ? c : 0;
  const Tensor gy = with_format(grad_y, p.x.channels_last);
  Tensor grad_x = need_x ? empty_like_canonical(p.x) : empty(x, {0});
  Tensor grad_w = empty(weight, {size, size});
  Tensor grad_d = empty(weight, {});
  Tensor grad_s = empty(weight, {size});
  Tensor grad_b = empty(weight, {size});
  std::vector<double> partial;
  if (p.shape.numel() > 0) {
    p.fold(false);
    p.cut(kTaskPixels, kTasks);
    p.args.grad_y = gy.const_data_ptr();
    if (need_x) p.args.grad_x = grad_x.mutable_data_ptr();
    if (need_parameters) {
      partial.resize(p.tasks * c * (c + 1));
      p.args.partial = partial.data();
    }
    const DType dtype = dtype_of(x);
    parallel_tasks(p.tasks, p.args.task * c, [&](int64_t begin, int64_t end) {
      PFK_CALL_LEVEL(channel_mix_backward, p.args, dtype, begin, end);
    });
  }
  const double from_log_det = Values(grad_log_det).sum() * static_cast<double>(p.shape.space);
  Values(grad_d).put(0, p.map.sign() * from_log_det);
  if (need_parameters) {
    const std::vector<double> sum = sum_tasks(partial, partial.empty() ? 0 : p.tasks, c * (c + 1));
    finish(p, sum, from_log_det, Values(grad_w), Values(grad_s), Values(grad_b));
  }
  return {grad_x, grad_w, grad_d, grad_s, grad_b};
}

}  // namespace
}  // namespace pfk

STABLE_TORCH_LIBRARY_IMPL(pyflowkern, CPU, m) {
  m.impl("linear_mix", TORCH_BOX(&pfk::forward));
  m.impl("linear_mix_backward", TORCH_BOX(&pfk::backward));
}
#endif
