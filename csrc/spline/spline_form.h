// SPDX-License-Identifier: Apache-2.0
// A spline map as ops are given it, checked.
#pragma once

#include "core/host.h"
#include "spline/spline.h"

namespace pfk {

inline SplineForm checked_form(int64_t kind, int64_t tails, int64_t parameterization,
                               int64_t bins) {
  STD_TORCH_CHECK(bins >= 2 && bins <= kMostBins, "a spline has 2 to ", kMostBins, " bins, got ",
                  bins);
  return {checked_kind("kind", kind, kSplineKinds), checked_kind("tails", tails, kSplineTails),
          checked_kind("parameterization", parameterization, kSplineParameters),
          static_cast<int>(bins)};
}

inline SplineNumbers spline_numbers(const std::vector<double>& n) {
  STD_TORCH_CHECK(n.size() == 6, "a spline map takes 6 numbers, got ", n.size());
  return {n[0], n[1], n[2], n[3], n[4], n[5]};
}

}  // namespace pfk
