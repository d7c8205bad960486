// The online softmax of a tile of logits that has one column per row (tile_matmul.h).
#pragma once

#include "online_softmax.h"
#include "tile_matmul.h"

#include <array>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Columns [0, kVectors * Vec::size()) of a tile; see add_tile.
template <int kVectors, bool kKeep, typename acc_t>
void add_columns(acc_t* logits, int64_t size, int64_t stride, int64_t begin, double inverse_tau, State* states,
                 double* factors) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t kLanes = kVectors * Vec::size();
  std::array<Vec, kVectors> max;
  for (int k = 0; k < kVectors; ++k) max[k] = Vec::loadu(logits + k * Vec::size());
  for (int64_t v = 1; v < size; ++v) {
    // clamp_min is the bare instruction. It may drop a NaN, which the sum below will show.
    for (int k = 0; k < kVectors; ++k) {
      max[k] = at::vec::clamp_min(max[k], Vec::loadu(logits + v * stride + k * Vec::size()));
    }
  }

  std::array<acc_t, kLanes> lanes;
  for (int k = 0; k < kVectors; ++k) max[k].store(lanes.data() + k * Vec::size());
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    State& state = states[lane];
    factors[lane] = 1;
    if (lanes[lane] > state.max) {
      // Seldom, where the order is random: the tile is searched only then.
      int64_t v = 0;
      while (logits[v * stride + lane] != lanes[lane]) ++v;
      factors[lane] = state.raise_max(lanes[lane], inverse_tau).factor;
      state.add_hard(lanes[lane], begin + v);
    }
    lanes[lane] = finite_or_zero<acc_t>(state.max);
  }

  const Vec scale(static_cast<acc_t>(inverse_tau * Power<acc_t>::kUnits));
  const Vec lowest(Power<acc_t>::kLowest);
  std::array<Vec, kVectors> sum;
  std::array<Vec, kVectors> weighted;
  for (int k = 0; k < kVectors; ++k) {
    max[k] = Vec::loadu(lanes.data() + k * Vec::size());
    sum[k] = weighted[k] = Vec(acc_t(0));
  }
  for (int64_t v = 0; v < size; ++v) {
    for (int k = 0; k < kVectors; ++k) {
      acc_t* entry = logits + v * stride + k * Vec::size();
      const Vec y = at::vec::clamp_min((Vec::loadu(entry) - max[k]) * scale, lowest);
      const Vec e = Power<acc_t>::of(y);
      sum[k] = sum[k] + e;
      weighted[k] = at::vec::fmadd(e, y, weighted[k]);
      if constexpr (kKeep) e.store(entry);
    }
  }
  std::array<acc_t, kLanes> weighted_lanes;
  for (int k = 0; k < kVectors; ++k) {
    sum[k].store(lanes.data() + k * Vec::size());
    weighted[k].store(weighted_lanes.data() + k * Vec::size());
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    states[lane].sum_exp += lanes[lane];
    states[lane].sum_exp_logit += weighted_lanes[lane] * (1 / Power<acc_t>::kUnits);
  }
}

// Adds a tile (size, columns) of logits, the first line of which is vocabulary entry `begin`, to its columns' states.
// With kKeep, exp((logit - max) / tau) takes the logit's place. What was added up before with another maximum is to be
// multiplied by factors[column].
template <bool kKeep, typename acc_t>
void add_tile(acc_t* logits, int64_t size, int64_t columns, int64_t begin, double inverse_tau, State* states,
              double* factors) {
  constexpr int64_t kOne = at::vec::Vectorized<acc_t>::size();
  constexpr int64_t kFour = 4 * kOne;
  int64_t column = 0;
  for (; column + kFour <= columns; column += kFour) {
    add_columns<4, kKeep>(logits + column, size, columns, begin, inverse_tau, states + column, factors + column);
  }
  for (; column < columns; column += kOne) {
    add_columns<1, kKeep>(logits + column, size, columns, begin, inverse_tau, states + column, factors + column);
  }
}

// The states of all parts of the vocabulary as one, row by row.
inline std::vector<State> merge_parts(const std::vector<std::vector<State>>& parts, double inverse_tau) {
  std::vector<State> merged = parts[0];
  for (size_t part = 1; part < parts.size(); ++part) {
    for (size_t row = 0; row < merged.size(); ++row) merged[row].merge(parts[part][row], inverse_tau);
  }
  return merged;
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
