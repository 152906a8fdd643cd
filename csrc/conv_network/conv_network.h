// SPDX-License-Identifier: Apache-2.0
// Networks of 3x3 and 1x1 convolutions and ReLUs (conditioners of couplings) on the CPU: the layers
// of relu_network.h with a convolution, zeros around the image, for every product.
//
// A group of images goes through all layers before the next group is loaded.  Its activations lie
// as [channel][image][pixel], so that pixels fill the vectors however few channels there are.  The
// input of a 3x3 layer is copied three times, shifted by -1, 0 and 1 pixel along the rows, with
// zeros above and below each image: what a filter reads is then a shift by whole rows, and all
// layers are products of core/gemm.h's kind: rows are output channels, columns are pixels, the
// depth goes over rows of the filter, shifts and input channels.
//
// The inputs of all layers but the first are kept for the backward pass.
#pragma once

#include "conv_network/conv_images.h"
#include "conv_network/conv_product.h"
#include "core/activations.h"
#include "core/rows.h"

PFK_BEGIN

namespace {

// ---- products ----------------------------------------------------------------------------------
// band[channel][image][pixel] = packed times source, without a bias.  Meanwhile the rows `ahead`,
// of so many channels, which come next, are fetched into cache.
template <class T>
void conv_band(const ConvArgs& n, const ConvWork<T>& w, int side, const T* packed,
               const ConvSource<T>& from, int64_t channels, const ConvBand& g, const T* ahead,
               int64_t ahead_channels) {
  constexpr int64_t lanes = Vec<T>::kLanes;
  const int64_t each = (g.rows * n.width + lanes - 1) / lanes;  // vectors of an image
  const int64_t vectors = g.images * each;
  auto at = [&](int64_t v) { return from.p + v / each * from.pitch + v % each * lanes; };
  for (int64_t v = 0; v < vectors; v += 2) {
    const bool pair = v + 1 < vectors;
    const T* first = at(v);
    const T* next = ahead + g.y * n.width + v * lanes;
    for (int64_t c = 0; c < ahead_channels; ++c) {
      __builtin_prefetch(next + c * n.stride, 1, 2);
      __builtin_prefetch(next + c * n.stride + lanes, 1, 2);
    }
    ConvProduct<T> p{{packed, 1, 0}, 0,       first, pair ? at(v + 1) - first : 0,
                     from.stride,    n.width, side,  from.count};
    for (int64_t r = 0; r < channels;) {
      const int rows = conv_block<T>(channels - r);
      p.left.p = packed + r * side * from.count;
      p.left.step = rows;
      p.left_outer = rows * from.count;
      T* out = w.band + r * n.band_stride + v * lanes;
      pair ? conv_rows<T, 2, true>(rows, p, {out, n.band_stride}, false)
           : conv_rows<T, 1, true>(rows, p, {out, n.band_stride}, false);
      r += rows;
    }
  }
}

// Calls f(channel, image, in band, in dense rows) for each run of pixels of a band.
template <class T, class F>
void each_run(const ConvArgs& n, const ConvBand& g, int64_t channels, F f) {
  constexpr int64_t lanes = Vec<T>::kLanes;
  const int64_t each = (g.rows * n.width + lanes - 1) / lanes * lanes;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < g.images; ++i) {
      f(c, i, c * n.band_stride + i * each, c * n.stride + i * n.plane + g.y * n.width);
    }
  }
}

// Calls f(band) for each band of a group of images.
template <class F>
void each_band(const ConvArgs& n, ConvBand g, F f) {
  for (g.y = 0; g.y < n.height; g.y += n.rows) {
    g.rows = n.rows < n.height - g.y ? n.rows : n.height - g.y;
    f(g);
  }
}

// What is kept of a group: a margin of its own, as another group's thread writes what lies before
// it, and the inputs of the layers.
template <class T>
T* kept_group(const ConvArgs& n, const ConvBand& g) {
  return typed<T>(n.kept) + g.first / n.images * n.kept_size;
}
template <class T>
T* kept_input(const ConvArgs& n, int l, const ConvBand& g) {
  return kept_group<T>(n, g) + n.layer[l].kept;
}

// ---- forward -----------------------------------------------------------------------------------
// Where the output of a layer goes: h (+)= it, and its ReLU, or itself, to the input of the next.
template <class T>
struct ConvTarget {
  T* h;  // or null
  bool add, activate;
  T* next;
};

template <class T>
void forward_layer(const ConvArgs& n, const ConvWork<T>& w, int l, const T* input,
                   const ConvTarget<T>& to, const ConvBand& group) {
  const ConvLayer& y = n.layer[l];
  const T* context = l == 0 ? typed<T>(n.context) : nullptr;
  each_band(n, group, [&](const ConvBand& g) {
    const ConvSource<T> from = conv_source(n, w, y.side, input, y.in, g);
    conv_band(n, w, y.side, typed<T>(y.packed), from, y.out, g, to.next, y.out);
    each_run<T>(n, g, y.out, [&](int64_t c, int64_t i, int64_t in_band, int64_t at) {
      T more = typed<T>(y.bias)[c];
      if (context) more += context[(g.first + i) * y.out + c];
      each_vector<T>(g.rows * n.width, [&](int64_t j, auto part) {
        Vec<T> v = load(w.band + in_band + j, part) + more;
        if (to.add) v += load(to.h + at + j, part);
        if (to.h) store(v, to.h + at + j, part);
        store(to.activate ? relu_(v) : v, to.next + at + j, part);
      });
    });
  });
}

template <class T>
void forward_group(const ConvArgs& n, const ConvWork<T>& w, const ConvBand& g) {
  const int last = n.layers - 1;
  load_images(n, n.x, n.layer[0].in, g, w.edge);
  const T* input = w.edge;
  if (n.kept) zero_row(kept_group<T>(n, g), kConvMargin);
  for (int l = 0; l < last; ++l) {
    const bool block_ends = n.residual && l % 2 == 0;
    const bool activate = l + 1 < last || n.activate_last;
    T* next = n.kept ? kept_input<T>(n, l + 1, g) : input == w.a ? w.b : w.a;
    if (n.kept) clear_margins(n, g, n.layer[l].out, next);
    forward_layer<T>(n, w, l, input,
                     {block_ends ? w.h : nullptr, block_ends && l > 0, activate, next}, g);
    input = next;
  }
  T* out = input == w.a ? w.b : w.a;
  forward_layer<T>(n, w, last, input, {nullptr, false, false, out}, g);
  store_images(n, out, n.layer[last].out, g, n.out);
}

// ---- backward ----------------------------------------------------------------------------------
// The gradients of a weight over a band, added to the sums of a run unless they are its first.  One
// of the cotangents and the input is read number by number and shifted, the other in vectors of its
// channels: the one that has more of them.
template <class T>
void add_weight(const ConvArgs& n, const ConvWork<T>& w, int l, const ConvSource<T>& left,
                const T* right, const ConvBand& g) {
  constexpr int64_t lanes = Vec<T>::kLanes, panel = ConvWork<T>::kPanel;
  const ConvLayer& y = n.layer[l];
  const int64_t channels = conv_shifts_input(y) ? y.out : y.in, stride = conv_padded(channels);
  const int64_t columns = (g.images - 1) * n.plane + g.rows * n.width;
  const bool add = !(g.opens_run && g.y == 0);
  for (int64_t c = 0; c < channels; c += panel) {
    const bool pair = c + lanes < channels;
    const int64_t count = channels - c < panel ? channels - c : panel;
    transpose_padded<T>({right + c * n.stride + g.y * n.width, n.stride}, count, columns,
                        {w.flipped, panel});
    for (int64_t row = 0; row < y.side * left.count;) {
      const int64_t dy = row / left.count, r = row % left.count;
      const int rows = conv_block<T>(left.count - r);
      const ConvProduct<T> p{{left.p + dy * n.width + r * left.stride, left.stride, 1},
                             left.pitch,
                             w.flipped,
                             lanes,
                             panel,
                             n.plane * panel,
                             g.images,
                             g.rows * n.width};
      T* out = w.part + y.sums + row * stride + c;
      pair ? conv_rows<T, 2, false>(rows, p, {out, stride}, add)
           : conv_rows<T, 1, false>(rows, p, {out, stride}, add);
      row += rows;
    }
  }
}

// Sums of the cotangents: the gradient of the bias, and of the context in each sample.
template <class T>
void add_bias(const ConvArgs& n, int l, const T* grad, const ConvBand& g, double* sums) {
  const ConvLayer& y = n.layer[l];
  T* context = l == 0 ? typed<T>(n.grad_context) : nullptr;
  for (int64_t c = 0; c < y.out; ++c) {
    for (int64_t i = 0; i < g.images; ++i) {
      const double sum = sum_terms(grad + c * n.stride + i * n.plane, n.height * n.width);
      sums[y.bias_sums + c] += sum;
      if (context) context[(g.first + i) * y.out + c] = static_cast<T>(sum);
    }
  }
}

// From the cotangents of a layer's output to those of its input, behind its ReLU: to (+)= them.
template <class T>
void backward_layer(const ConvArgs& n, const ConvWork<T>& w, int l, const T* grad, const T* input,
                    bool masked, bool add, T* to, const ConvBand& group) {
  const ConvLayer& y = n.layer[l];
  const bool shifts_input = conv_shifts_input(y);
  each_band(n, group, [&](const ConvBand& g) {
    if (shifts_input || to == nullptr) {
      const T* left = shifts_input ? input : grad;
      const int64_t channels = shifts_input ? y.in : y.out;
      add_weight(n, w, l, conv_source(n, w, y.side, left, channels, g), shifts_input ? grad : input,
                 g);
      if (to == nullptr) return;
    }
    const ConvSource<T> from = conv_source(n, w, y.side, grad, y.out, g);
    conv_band(n, w, y.side, typed<T>(y.packed), from, y.in, g, input, y.in);
    if (!shifts_input) add_weight(n, w, l, from, input, g);
    each_run<T>(n, g, y.in, [&](int64_t, int64_t, int64_t in_band, int64_t at) {
      each_vector<T>(g.rows * n.width, [&](int64_t j, auto part) {
        const Vec<T> zero = T(0);
        Vec<T> v = load(w.band + in_band + j, part);
        if (masked) v = select(load(input + at + j, part) <= zero, zero, v);
        if (add) v += load(to + at + j, part);
        store(v, to + at + j, part);
      });
    });
  });
}

template <class T>
void backward_group(const ConvArgs& n, const ConvWork<T>& w, const ConvBand& g, double* sums) {
  const int last = n.layers - 1;
  load_images(n, n.out, n.layer[last].out, g, w.b);
  const T* grad = w.b;
  for (int l = last; l > 0; --l) {
    const bool add = n.residual && l % 2 == 1 && l < last;  // the first layer of a block
    T* to = grad == w.a ? w.b : w.a;
    add_bias(n, l, grad, g, sums);
    backward_layer<T>(n, w, l, grad, kept_input<T>(n, l, g), l < last || n.activate_last, add, to,
                      g);
    grad = to;
  }
  load_images(n, n.x, n.layer[0].in, g, w.edge);
  T* to = n.grad_x.p ? (grad == w.a ? w.b : w.a) : nullptr;
  add_bias(n, 0, grad, g, sums);
  backward_layer<T>(n, w, 0, grad, w.edge, false, false, to, g);
  if (to) store_images(n, to, n.layer[0].in, g, n.grad_x);
}

// ---- tasks -------------------------------------------------------------------------------------
template <class T>
void forward_tasks(const ConvArgs& n, void* memory, int64_t begin, int64_t end) {
  const ConvWork<T> w(n, memory);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * n.images, left = n.samples - first;
    forward_group<T>(n, w, {first, left < n.images ? left : n.images, false, 0, 0});
  }
}

// The sums of a task over its groups: runs of kConvRun pixels are summed in T, runs in double.
template <class T>
void backward_tasks(const ConvArgs& n, void* memory, int64_t begin, int64_t end) {
  const ConvWork<T> w(n, memory);
  const int64_t group_pixels = n.images * n.height * n.width;
  const int64_t run = group_pixels < kConvRun ? kConvRun / group_pixels : 1;  // groups of a run
  for (int64_t task = begin; task < end; ++task) {
    double* sums = n.sums + task * n.size;
    const int64_t from = task * n.groups / n.tasks, to = (task + 1) * n.groups / n.tasks;
    for (int l = 0; l < n.layers; ++l) {  // the rest is written by the first run, if there is one
      const int64_t begin_of = from < to ? n.layer[l].bias_sums : n.layer[l].sums;
      const int64_t end_of = n.layer[l].bias_sums + n.layer[l].out;
      memset(static_cast<void*>(sums + begin_of), 0, (end_of - begin_of) * sizeof(double));
    }
    for (int64_t start = from; start < to; start += run) {
      for (int64_t group = start; group < to && group < start + run; ++group) {
        const int64_t first = group * n.images, left = n.samples - first;
        backward_group<T>(n, w, {first, left < n.images ? left : n.images, group == start, 0, 0},
                          sums);
      }
      for (int l = 0; l < n.layers; ++l) {
        const int64_t end_of = n.layer[l].bias_sums;
        for (int64_t i = n.layer[l].sums; i < end_of; ++i) {
          sums[i] = (start > from ? sums[i] : 0) + static_cast<double>(w.part[i]);
        }
      }
    }
  }
}

}  // namespace

PFK_END
