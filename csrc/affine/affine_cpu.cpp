// SPDX-License-Identifier: Apache-2.0
// Affine transforms on the CPU.
//
// Lower bound of the time: forward, x and the parameters are read and y is written, 12 bytes for an
// element of x of a coupling in float32 that transforms half the channels; backward 16.  A task is
// a fixed chunk of one sample, so that results do not depend on the number of threads.  Long
// contiguous rows are computed in place.  Short, strided or 16-bit rows are first copied to buffers
// in L1, so that one vector loop serves all.
#include "affine/affine.h"
#include "core/half.h"
#include "core/simd.h"

PFK_DECLARE_LEVELS(void affine_forward(const AffineArgs&, DType, int64_t, int64_t);
                   void affine_backward(const AffineArgs&, DType, int64_t, int64_t))

PFK_BEGIN

namespace {  // all families are linked into one library

constexpr int kBlock = 512;     // elements of a block: seven buffers of floats take 14 KiB of L1
constexpr int kDirectRow = 64;  // shorter rows are copied to buffers

// The contiguous elements of one block; gradients are null in the forward pass.
template <class T>
struct Block {
  const T *in, *raw, *shift, *grad_out;
  const uint8_t* mask;
  T *out, *grad_raw, *grad_shift;
};

template <class T>
struct Context {
  AffineMap<T> map;
  Vec<T> grad_log_det;
  bool reads_shift;
};

template <int kKind, bool kMasked, class T>
PFK_HD void forward_step(const Block<T>& b, int i, Vec<T> first, const Context<T>& c,
                         Vec<T>& log_det, Mask<T> valid) {
  using V = Vec<T>;
  const V in = V::load(b.in + i), t = V::load(b.shift + i);
  const Scale<V> s = scale_from<kKind>(kKind == kAdditive ? t : V::load(b.raw + i), first, c.map);
  V out = affine_apply(in, s.factor, t, c.map);
  if constexpr (kMasked) {
    const Mask<T> m = Mask<T>::load(b.mask + i);
    out = select(m, out, in);
    valid = mask_and(valid, m);
  }
  log_det += select(valid, s.log_factor, V(T(0)));
  out.store(b.out + i);
}

template <int kKind, bool kMasked, class T>
PFK_HD void backward_step(const Block<T>& b, int i, Vec<T> first, const Context<T>& c) {
  using V = Vec<T>;
  const V kept = V::load(b.in + i), grad_out = V::load(b.grad_out + i), zero = T(0);
  const V t = c.reads_shift ? V::load(b.shift + i) : zero;
  const Scale<V> s =
      scale_from<kKind>(kKind == kAdditive ? zero : V::load(b.raw + i), first, c.map);
  AffineGrad<V> g = affine_vjp(kept, t, grad_out, c.grad_log_det, s, c.map);
  if constexpr (kMasked) {
    const Mask<T> m = Mask<T>::load(b.mask + i);
    g = {select(m, g.in, grad_out), select(m, g.raw, zero), select(m, g.shift, zero)};
  }
  g.in.store(b.out + i);
  g.shift.store(b.grad_shift + i);
  if (kKind != kAdditive) g.raw.store(b.grad_raw + i);
}

// The whole vectors of [0, n) of a block.  Only lanes of `valid` are part of the log-det.  Block
// and Context are copies: the compiler reloads what a reference leads to after every store.
template <int kKind, bool kBackward, bool kMasked, class T>
void run_vectors(const Block<T> b, int n, const Context<T> c, Vec<T>& log_det, Mask<T> valid) {
  using V = Vec<T>;
  alignas(64) T first[kTwoParts<kKind> ? kBlock : V::kLanes];
  if constexpr (kTwoParts<kKind>) {
    for (int i = 0; i < n; i += V::kLanes) {
      first_part<kKind>(V::load(b.raw + i), c.map).store(first + i);
    }
  }
  V sum = log_det;
  for (int i = 0; i < n; i += V::kLanes) {
    V half = T(0);
    if constexpr (kTwoParts<kKind>) half = V::load(first + i);
    if constexpr (kBackward) {
      backward_step<kKind, kMasked>(b, i, half, c);
    } else {
      forward_step<kKind, kMasked>(b, i, half, c, sum, valid);
    }
  }
  log_det = sum;
}

// One block of n elements; returns its log-det.  The last vector, if it is not whole, is computed
// on padded copies.
template <int kKind, bool kBackward, class T>
double run_block(const Block<T>& b, int n, const Context<T>& c) {
  constexpr int w = Vec<T>::kLanes;
  Vec<T> log_det = T(0);
  auto run = [&](const Block<T>& block, int count, Mask<T> valid) {
    if (block.mask != nullptr) {
      run_vectors<kKind, kBackward, true>(block, count, c, log_det, valid);
    } else {
      run_vectors<kKind, kBackward, false>(block, count, c, log_det, valid);
    }
  };
  const int i = n / w * w;
  run(b, i, Vec<T>(T(0)) == T(0));
  if (i < n) {
    T in[w] = {}, raw[w] = {}, shift[w] = {}, grad_out[w] = {}, out[w], grad_raw[w], grad_shift[w];
    uint8_t mask[w] = {};
    const size_t m = n - i, bytes = m * sizeof(T);
    memcpy(in, b.in + i, bytes);
    memcpy(shift, b.shift + i, bytes);
    if (kKind != kAdditive) memcpy(raw, b.raw + i, bytes);
    if (kBackward) memcpy(grad_out, b.grad_out + i, bytes);
    if (b.mask != nullptr) memcpy(mask, b.mask + i, m);
    run({in, raw, shift, grad_out, b.mask ? mask : nullptr, out, grad_raw, grad_shift}, w,
        first_lanes<T>(n - i));
    memcpy(b.out + i, out, bytes);
    if (kBackward) memcpy(b.grad_shift + i, grad_shift, bytes);
    if (kBackward && kKind != kAdditive) memcpy(b.grad_raw + i, grad_raw, bytes);
  }
  return sum_lanes(log_det);
}

template <class T>
using BlockFunction = double (*)(const Block<T>&, int, const Context<T>&);

template <bool kBackward, class T>
BlockFunction<T> block_function(int kind) {
  static constexpr BlockFunction<T> table[kScaleKinds] = {
      run_block<kExp, kBackward, T>,         run_block<kTanh, kBackward, T>,
      run_block<kAtan, kBackward, T>,        run_block<kSigmoid, kBackward, T>,
      run_block<kSoftplus, kBackward, T>,    run_block<kSoftclipScale, kBackward, T>,
      run_block<kAdditive, kBackward, T>,    run_block<kSoftplusAsinh, kBackward, T>,
      run_block<kSoftplusTanh, kBackward, T>};
  return table[kind];
}

// Typed pointers of one sample.
template <class S>
struct Sample {
  const S *in, *raw, *shift, *grad_out;
  S *out, *grad_raw, *grad_shift;
};

template <class S>
Sample<S> sample_pointers(const AffineArgs& a, int64_t n) {
  const AffineGeometry& g = a.g;
  auto at = [](auto* p, int64_t offset) { return p == nullptr ? nullptr : p + offset; };
  const int64_t x = n * g.x_sample + g.x_start, p = n * g.p_sample;
  return {at(static_cast<const S*>(a.in), x),
          at(static_cast<const S*>(a.raw), p + g.raw_start),
          at(static_cast<const S*>(a.shift), p + g.shift_start),
          at(static_cast<const S*>(a.grad_out), x),
          at(static_cast<S*>(a.out), x),
          at(static_cast<S*>(a.grad_raw), p + g.raw_start),
          at(static_cast<S*>(a.grad_shift), p + g.shift_start)};
}

// The buffers of a block that is copied, and the pieces of rows that it is made of.
template <class S, class T>
struct Packed {
  alignas(64) T in[kBlock], raw[kBlock], shift[kBlock], grad_out[kBlock];
  alignas(64) T out[kBlock], grad_raw[kBlock], grad_shift[kBlock];
  alignas(64) uint8_t mask[kBlock];

  template <class F>
  static void pieces(const AffineGeometry& g, int64_t begin, int n, F f) {
    int64_t row = begin / g.length, i = begin % g.length;
    for (int done = 0; done < n;) {
      const int64_t room = g.length - i;
      const int count = static_cast<int>(room < n - done ? room : n - done);
      f(row * g.x_row + i, row * g.p_row + i * g.p_step, row * g.mask_row + i * g.mask_step, count,
        done);
      done += count;
      i = 0;
      ++row;
    }
  }

  void load(const AffineArgs& a, const Sample<S>& s, int64_t begin, int n) {
    pieces(a.g, begin, n, [&](int64_t x, int64_t p, int64_t m, int count, int to) {
      gather(s.in + x, 1, count, in + to);
      gather(s.shift + p, a.g.p_step, count, shift + to);
      if (a.kind != kAdditive) gather(s.raw + p, a.g.p_step, count, raw + to);
      if (s.grad_out != nullptr) gather(s.grad_out + x, 1, count, grad_out + to);
      for (int j = 0; a.mask != nullptr && j < count; ++j)
        mask[to + j] = a.mask[m + j * a.g.mask_step];
    });
  }

  void store(const AffineArgs& a, const Sample<S>& s, int64_t begin, int n) {
    pieces(a.g, begin, n, [&](int64_t x, int64_t p, int64_t, int count, int from) {
      scatter(out + from, 1, count, s.out + x);
      if (s.grad_shift != nullptr) scatter(grad_shift + from, a.g.p_step, count, s.grad_shift + p);
      if (s.grad_raw != nullptr && a.kind != kAdditive)
        scatter(grad_raw + from, a.g.p_step, count, s.grad_raw + p);
    });
  }
};

// Copies the elements of this task that are not transformed, or backward their gradients.
template <class S>
void copy_passing(const AffineArgs& a, int64_t n, int64_t chunk) {
  const AffineGeometry& g = a.g;
  if (g.copy_length == 0) return;
  const S* from = static_cast<const S*>(a.grad_out != nullptr ? a.grad_out : a.in);
  from += n * g.x_sample + g.copy_start;
  S* to = static_cast<S*>(a.out) + n * g.x_sample + g.copy_start;
  if (g.copy_rows == 1) {
    const int64_t begin = chunk * g.copy_length / a.chunks;
    const int64_t end = (chunk + 1) * g.copy_length / a.chunks;
    memcpy(to + begin, from + begin, (end - begin) * sizeof(S));
    return;
  }
  for (int64_t row = chunk * g.copy_rows / a.chunks; row < (chunk + 1) * g.copy_rows / a.chunks;
       ++row) {
    memcpy(to + row * g.copy_row, from + row * g.copy_row, g.copy_length * sizeof(S));
  }
}

template <bool kBackward, class S>
void run_tasks(const AffineArgs& a, int64_t task_begin, int64_t task_end) {
  using T = Compute<S>;
  const AffineGeometry& g = a.g;
  const BlockFunction<T> run = block_function<kBackward, T>(a.kind);
  Context<T> c{affine_map<T>(a.numbers, a.flags), Vec<T>(T(0)), true};
  c.reads_shift = vjp_reads_shift(c.map);
  const bool direct = sizeof(S) == sizeof(T) && (g.rows == 1 || g.length >= kDirectRow) &&
                      g.p_step == 1 && (a.mask == nullptr || g.mask_step == 1);
  Packed<S, T> packed;
  const Block<T> buffers{packed.in,
                         packed.raw,
                         packed.shift,
                         packed.grad_out,
                         a.mask ? packed.mask : nullptr,
                         packed.out,
                         packed.grad_raw,
                         packed.grad_shift};
  const int64_t features = g.rows * g.length;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t n = task / a.chunks, chunk = task % a.chunks;
    const int64_t end = (chunk + 1) * a.chunk < features ? (chunk + 1) * a.chunk : features;
    const Sample<S> s = sample_pointers<S>(a, n);
    if (kBackward) c.grad_log_det = static_cast<const T*>(a.grad_log_det)[n];
    double log_det = 0;
    for (int64_t begin = chunk * a.chunk; begin < end;) {
      int64_t count = end - begin < kBlock ? end - begin : kBlock;
      if constexpr (sizeof(S) == sizeof(T)) {
        if (direct) {
          const int64_t row = begin / g.length, i = begin % g.length;
          if (g.length - i < count) count = g.length - i;
          const int64_t x = row * g.x_row + i, p = row * g.p_row + i;
          const Block<T> b{s.in + x,
                           s.raw + p,
                           s.shift + p,
                           s.grad_out + x,
                           a.mask ? a.mask + row * g.mask_row + i : nullptr,
                           s.out + x,
                           s.grad_raw + p,
                           s.grad_shift + p};
          log_det += run(b, static_cast<int>(count), c);
          begin += count;
          continue;
        }
      }
      packed.load(a, s, begin, static_cast<int>(count));
      log_det += run(buffers, static_cast<int>(count), c);
      packed.store(a, s, begin, static_cast<int>(count));
      begin += count;
    }
    if (!kBackward) a.partial[task] = log_det;
    copy_passing<S>(a, n, chunk);
  }
}

}  // namespace

void affine_forward(const AffineArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { run_tasks<false, decltype(element)>(a, begin, end); });
}
void affine_backward(const AffineArgs& a, DType dtype, int64_t begin, int64_t end) {
  each_dtype(dtype, [&](auto element) { run_tasks<true, decltype(element)>(a, begin, end); });
}

PFK_END

#if PFK_SIMD_LEVEL == 0
#include "affine/affine_host.h"

namespace pfk {
namespace {

constexpr int64_t kChunk =
    16384;  // elements of a task: enough for a thread, and few enough to keep all threads busy

template <class R>
void reduce_chunks(const AffineArgs& a, R* log_det) {
  for (int64_t n = 0; n < a.g.samples; ++n) {
    double sum = 0;
    for (int64_t c = 0; c < a.chunks; ++c) sum += a.partial[n * a.chunks + c];
    log_det[n] = static_cast<R>(sum);
  }
}

}  // namespace

// Forward if there is a log_det to fill, else backward.
static void run_affine_cpu(AffineArgs& a, const Tensor& out, Tensor* log_det) {
  const int64_t features = a.g.rows * a.g.length;
  a.chunk = kChunk;
  a.chunks = features > kChunk ? (features + kChunk - 1) / kChunk : 1;
  const int64_t tasks = a.g.samples * a.chunks;
  std::vector<double> partial(log_det != nullptr ? tasks : 0);
  a.partial = partial.data();
  const DType dtype = dtype_of(out);
  parallel_tasks(tasks, a.g.x_sample / a.chunks, [&](int64_t begin, int64_t end) {
    if (log_det != nullptr) {
      PFK_CALL_LEVEL(affine_forward, a, dtype, begin, end);
    } else {
      PFK_CALL_LEVEL(affine_backward, a, dtype, begin, end);
    }
  });
  if (log_det == nullptr) return;
  with_compute_type(dtype, [&](auto type) {
    reduce_chunks(a, static_cast<decltype(type)*>(log_det->mutable_data_ptr()));
  });
}

}  // namespace pfk

PFK_REGISTER_AFFINE(CPU, pfk::run_affine_cpu)
#endif
