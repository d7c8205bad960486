// How the threads of a block, and the blocks of a row's team, put their parts of the row together.
#pragma once

#include "arguments.h"
#include "intrinsics.cuh"
#include "row.cuh"

namespace nabla_fast::cuda {

constexpr int kMostTeam = 1024;  // blocks per row

// A scratch buffer begins with one arrival counter per row, zero at launch.
__host__ __device__ constexpr int64_t counter_bytes(int64_t rows) { return (rows * 4 + 15) / 16 * 16; }

// A state of what `take` makes of the fields of another one.
template <typename Take>
__device__ __forceinline__ State each_field(const State& state, const Take& take) {
  return {take(state.max), take(state.sum_exp), take(state.sum_exp_grad), take(state.best), take(state.token)};
}

// How two parts are put together: relative to each one's maximum, or to one base.
struct Merge {
  float inverse_tau;
  __device__ __forceinline__ State operator()(const State& a, const State& b) const { return merge(a, b, inverse_tau); }
};
struct MergeSums {
  __device__ __forceinline__ State operator()(const State& a, const State& b) const { return merge_sums(a, b); }
};

// The whole warp's part, in every lane. The rounding of a merge depends on its order, so all take lane 0's result:
// blocks that merge the same parts must come to the same decision.
template <typename How>
__device__ __forceinline__ State warp_merge(State part, const How& how) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    part = how(part, each_field(part, [&](auto field) { return shuffle_xor(field, offset); }));
  }
  return each_field(part, [](auto field) { return shuffle(field, 0); });
}

__device__ __forceinline__ State load_part(const State& part) {
  return each_field(part, [](const auto& field) { return load_shared_by_blocks(&field); });
}

// The whole row's part, in every lane, from one part per block of the team in global memory.
template <typename How>
__device__ __forceinline__ State team_merge(const State* parts, int team, const How& how) {
  State part;
#pragma unroll 4  // so many loads are under way at a time
  for (int rank = lane_index(); rank < team; rank += 32) part = how(part, load_part(parts[rank]));
  return warp_merge(part, how);
}

// Where a row stands: the same in all threads of its team.
struct Progress {
  int64_t expected;  // the token at which the gradient was taken
  int64_t start;     // steps made before this call
  int allowed;       // steps this call may make

  __device__ __forceinline__ bool stops(int token, int done) const {
    return token < 0 || token != expected || done >= allowed;
  }
};

__device__ __forceinline__ Progress progress_of(const DtoRows& rows, int row) {
  const int64_t start = rows.step[row], left = rows.rates - start;
  // Learning rates are looked up by it, and asking beforehand would make the host wait: such a row makes no step.
  const int64_t most = start < 0 ? 0 : rows.max_steps;
  return {rows.tokens[row], start, static_cast<int>(left < most ? left : most)};
}

__device__ __forceinline__ AdamStep next_step(const DtoRows& rows, int64_t start, int done) {
  const int64_t index = start + done;
  const double rate = rows.rates_are_double ? static_cast<const double*>(rows.learning_rates)[index]
                                            : static_cast<const float*>(rows.learning_rates)[index];
  return adam_step(index + 1, rate, static_cast<float>(rows.weight_decay));
}

// By one thread of the team.
__device__ __forceinline__ void report(const DtoRows& rows, int row, const Progress& progress, int token, int done) {
  rows.token[row] = token;
  rows.changed[row] = token < 0 || token != progress.expected;
  rows.step[row] = progress.start + done;
}

}  // namespace nabla_fast::cuda
