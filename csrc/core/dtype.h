// SPDX-License-Identifier: Apache-2.0
// How kernels name element types.  16-bit floats are storage alone: they are computed in float.
#pragma once

namespace pfk {

enum DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8 };

// The type a storage type is computed in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// Calls f with a value of the type that dtype is computed in.
template <class F>
void with_compute_type(DType dtype, F f) {
  dtype == kFloat64 ? f(double{}) : f(float{});
}

}  // namespace pfk
