// SPDX-License-Identifier: Apache-2.0
// The biases and gates of all layers of a field at a time, in one call.
//
// "concat" has one row w for each layer, and  b' = b + t w.  "concatsquash" has three, u, c and v:
//   g = sigmoid(c + t u),  b' = t v + g b,
// and with cotangents G of g and H of b':
//   S = (G + H b) g (1 - g);  those of b: g H,  u: t S,  c: S,  v: t H,  t: sum S u + H v;
// of "concat"  b: H,  w: t H,  t: sum H w.
#pragma once

#include "core/activations.h"

namespace pfk {

struct TimeLayer {
  int64_t size;
  const void* bias;
  const void* rows;  // [1 or 3, size]
  void* to_bias;
  void* to_gate;
  const void* grad_bias;
  const void* grad_gate;
  void* of_bias;
  void* of_rows;
};

constexpr int kTimeLayers = 16;  // at most: they are an argument of the kernel

struct TimeArgs {
  int count;
  bool squash;
  const void* time;
  void* of_time;
  TimeLayer layer[kTimeLayers];
};

}  // namespace pfk

PFK_BEGIN

// A bias of "concat", and its VJP.
template <class V>
PFK_HD V shifted_bias(V time, V row, V bias) {
  return bias + time * row;
}
template <class V>
struct ShiftVjp {
  V of_bias, of_row, of_time;
  PFK_HD ShiftVjp(V time, V row, V grad)
      : of_bias(grad), of_row(time * grad), of_time(grad * row) {}
};

// Gate and bias of "concatsquash".
template <class V>
struct TimeRows {
  V u, c, v;
};

template <class V>
PFK_HD V time_gate(V time, const TimeRows<V>& r) {
  return sigmoid_(r.c + time * r.u);
}
template <class V>
PFK_HD V time_bias(V time, const TimeRows<V>& r, V gate, V bias) {
  return time * r.v + gate * bias;
}

// The VJP of an element of a "concatsquash" layer.
template <class V>
struct TimeVjp {
  V of_bias, of_time;
  TimeRows<V> rows;
  PFK_HD TimeVjp(V time, const TimeRows<V>& r, V bias, V grad_gate, V grad_bias) {
    using T = Lane<V>;
    const V gate = time_gate(time, r);
    rows.c = (grad_gate + grad_bias * bias) * (gate * (V(T(1)) - gate));
    rows.u = time * rows.c;
    rows.v = time * grad_bias;
    of_bias = gate * grad_bias;
    of_time = rows.c * r.u + grad_bias * r.v;
  }
};

PFK_END
