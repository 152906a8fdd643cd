// SPDX-License-Identifier: Apache-2.0
// Images in the work space of a network of convolutions: [channel][image][pixel], and the shifted
// copies that a 3x3 layer reads.
#pragma once

#include "conv_network/conv_product.h"

PFK_BEGIN

namespace {

// ---- work space of a task ----------------------------------------------------------------------
template <class T>
struct ConvWork {
  T *copies, *band, *a, *b, *h, *edge, *flipped, *part;
  T *left_mask, *right_mask;  // zero where a shifted row reads beyond its end, else not

  static constexpr int64_t kPanel = 2 * Vec<T>::kLanes;  // channels of a panel of `flipped`

  static int64_t numbers(const ConvArgs& n, T* memory = nullptr, ConvWork* w = nullptr) {
    int64_t at = kConvMargin;
    auto take = [&](T*& p, int64_t size) {
      if (w) p = memory + at;
      at += (size + 2 * kConvMargin + 15) / 16 * 16;
    };
    ConvWork none;
    ConvWork& to = w ? *w : none;
    take(to.copies, 3 * n.widest * n.copy_stride);
    take(to.band, n.widest * n.band_stride);
    take(to.a, n.widest * n.stride);
    take(to.b, n.widest * n.stride);
    take(to.h, n.widest * n.stride);
    take(to.edge, n.widest * n.stride);
    take(to.left_mask, n.copy_stride);
    take(to.right_mask, n.copy_stride);
    take(to.flipped, n.backward ? n.stride * kPanel : 0);
    take(to.part, n.backward ? n.size : 0);
    return at;
  }
  ConvWork() = default;
  ConvWork(const ConvArgs& n, void* memory) {
    numbers(n, typed<T>(memory), this);
    for (int64_t i = 0; i < n.copy_stride; ++i) {
      left_mask[i] = T(i % n.width != 0);
      right_mask[i] = T((i + 1) % n.width != 0);
    }
  }
};

// The images of a group and the rows of a band of them.
struct ConvBand {
  int64_t first, images;
  bool opens_run;  // of sums of gradients
  int64_t y, rows;
};

// ---- images in and out -------------------------------------------------------------------------
template <class T>
void load_images(const ConvArgs& n, const Planes& from, int64_t channels, const ConvBand& g,
                 T* to) {
  const int64_t pixels = n.height * n.width;
  for (int64_t i = 0; i < g.images; ++i) {
    const T* image = typed<T>(from.p) + (g.first + i) * from.image;
    if (from.pixel == 1) {
      copy_rows(image, from.channel, to + i * n.plane, n.stride, channels, pixels);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      T* row = to + c * n.stride + i * n.plane;
      for (int64_t p = 0; p < pixels; ++p) row[p] = image[c * from.channel + p * from.pixel];
    }
  }
}

template <class T>
void store_images(const ConvArgs& n, const T* from, int64_t channels, const ConvBand& g,
                  const Planes& to) {
  const int64_t pixels = n.height * n.width;
  for (int64_t i = 0; i < g.images; ++i) {
    T* image = typed<T>(to.p) + (g.first + i) * to.image;
    if (to.pixel == 1) {
      copy_rows(from + i * n.plane, n.stride, image, to.channel, channels, pixels);
      continue;
    }
    for (int64_t p = 0; p < pixels; ++p) {
      const T* column = from + i * n.plane + p;
      for (int64_t c = 0; c < channels; ++c) {
        image[c * to.channel + p * to.pixel] = column[c * n.stride];
      }
    }
  }
}

// ---- the input of a 3x3 layer ------------------------------------------------------------------
template <class T>
void zero_row(T* to, int64_t width) {  // and up to a vector more, which is written later
  for (int64_t j = 0; j < width; j += Vec<T>::kLanes) Vec<T>(T(0)).store(to + j);
}

// Three copies of a channel's rows [y - 1, y + rows + 1), which lie `apart` from each other.
template <class T>
void shift_rows(const ConvArgs& n, const ConvWork<T>& w, const T* channel, const ConvBand& g, T* to,
                int64_t apart) {
  const int64_t above = g.y > 0 ? g.y - 1 : 0;
  const int64_t below = g.y + g.rows < n.height ? g.y + g.rows + 1 : n.height;
  const int64_t count = (below - above) * n.width;
  const T* from = channel + above * n.width;
  T* body = to + (g.y > 0 ? 0 : n.width);
  const Vec<T> zero = T(0);
  if (g.y == 0) {
    for (int d = 0; d < 3; ++d) zero_row(to + d * apart, n.width);
  }
  for (int64_t j = 0; j < count; j += Vec<T>::kLanes) {
    const auto no_left = Vec<T>::load(w.left_mask + j) == zero;
    const auto no_right = Vec<T>::load(w.right_mask + j) == zero;
    select(no_left, zero, Vec<T>::load(from + j - 1)).store(body + j);
    Vec<T>::load(from + j).store(body + apart + j);
    select(no_right, zero, Vec<T>::load(from + j + 1)).store(body + 2 * apart + j);
  }
  if (g.y + g.rows == n.height) {
    for (int d = 0; d < 3; ++d) zero_row(body + d * apart + count, n.width);
  }
}

// What a layer reads: `count` rows of pixels, `stride` apart, those of an image `pitch` from those
// of the next; the rows of a filter are `width` apart.
template <class T>
struct ConvSource {
  const T* p;
  int64_t count, stride, pitch;
};

template <class T>
ConvSource<T> conv_source(const ConvArgs& n, const ConvWork<T>& w, int side, const T* dense,
                          int64_t channels, const ConvBand& g) {
  if (side == 1) return {dense + g.y * n.width, channels, n.stride, n.plane};
  const int64_t pitch = (g.rows + 2) * n.width;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < g.images; ++i) {
      shift_rows(n, w, dense + c * n.stride + i * n.plane, g,
                 w.copies + c * n.copy_stride + i * pitch, channels * n.copy_stride);
    }
  }
  return {w.copies, 3 * channels, n.copy_stride, pitch};
}

// Makes zero what lies between images, so that what is kept is a function of the arguments.
template <class T>
void clear_margins(const ConvArgs& n, const ConvBand& g, int64_t channels, T* rows) {
  const int64_t pixels = n.height * n.width;
  for (int64_t c = 0; c < channels; ++c, rows += n.stride) {
    for (int64_t i = 0; i < g.images; ++i) {
      for (int64_t j = pixels; j < n.plane; ++j) rows[i * n.plane + j] = T(0);
    }
    for (int64_t j = g.images * n.plane; j < n.stride; ++j) rows[j] = T(0);
  }
}

}  // namespace

PFK_END
