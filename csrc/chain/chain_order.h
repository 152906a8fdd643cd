// SPDX-License-Identifier: Apache-2.0
// In which order the inverse of an autoregressive step finds features, and the units of its
// network.
#pragma once

#include <algorithm>
#include <vector>

#include "chain/chain.h"
#include "core/host.h"

namespace pfk {

// The parameters of feature j of `moved` read the first units of each layer: how many, is written
// to need[hidden layers], unless more were needed before.  Returns how many inputs they read.
inline int32_t plan_feature(const ChainElements& e, const ChainLayer* layer, int64_t j,
                            int32_t* need) {
  const int last = e.layers - 1;
  const auto inputs = [&](int l, int64_t rows) -> int32_t {
    if (rows == 0) return 0;
    return layer[l].prefix == nullptr ? static_cast<int32_t>(layer[l].in)
                                      : layer[l].prefix[rows - 1];
  };
  const ChainGroup& g = group_of(e, j);
  const int64_t end = g.row(j) + (g.per_feature - 1) * g.param_step + 1;
  int32_t most = inputs(last, end);
  for (int l = last; l > 0; --l) {
    need[l - 1] = std::max(need[l - 1], most);
    const bool closes = e.residual && l - 1 > 0 && (l - 1) % 2 == 0;
    if (closes) need[l - 3] = std::max(need[l - 3], need[l - 1]);
    most = inputs(l - 1, need[l - 1]);
  }
  return most;
}

// Fills in what `walks` stands for, in `table`, unless the network reads nothing that is moved.
// Returns the rows of a tile for gradients of hidden units.
inline int64_t plan_walk(ChainElements& e, ChainLayer* layer, int64_t features,
                         std::vector<int32_t>& table) {
  std::vector<int32_t> place(features, -1), moves_at(features, -1);
  for (int64_t r = 0; r < e.reads; ++r) place[e.read[r]] = static_cast<int32_t>(r);
  for (int64_t j = 0; j < e.moves; ++j) {
    moves_at[e.moved[j]] = static_cast<int32_t>(j);
    e.walks |= place[e.moved[j]] >= 0;
  }
  if (!e.walks) return 0;
  const int64_t hidden = e.layers - 1;
  table.assign(e.moves + e.moves * hidden + e.reads, 0);
  int32_t *places = table.data(), *needs = places + e.moves, *passing = needs + e.moves * hidden;
  e.places = places, e.needs = needs, e.passing = passing;
  for (int64_t r = 0; r < e.reads; ++r) {
    if (moves_at[e.read[r]] < 0) passing[e.passes++] = static_cast<int32_t>(r);
  }
  int32_t checked = 0;
  for (int64_t j = 0; j < e.moves; ++j) {
    places[j] = place[e.moved[j]];
    if (j > 0) std::copy_n(needs + (j - 1) * hidden, hidden, needs + j * hidden);
    const int32_t inputs = plan_feature(e, layer, j, needs + j * hidden);
    for (; checked < e.reads && first_input(e, checked) < inputs; ++checked) {
      STD_TORCH_CHECK(moves_at[e.read[checked]] < j,
                      "pyflowkern::chain: a feature's parameters depend on it or on later ones");
    }
  }
  int64_t rows = 0;
  for (int64_t l = 0; l < hidden; ++l) {
    layer[l].adjoint = e.rows + rows;
    rows += layer[l].out;
  }
  e.pulled = e.rows + rows;
  return rows + (e.frequency != nullptr ? 2 : 0);
}

}  // namespace pfk
