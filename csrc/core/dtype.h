// SPDX-License-Identifier: Apache-2.0
// How kernels name element types.  16-bit floats are storage alone: they are computed in float.
#pragma once

namespace pfk {

enum DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8 };

}  // namespace pfk
