// How the threads of a block, and the blocks of a row's team, put their parts of the row together.
#pragma once

#include "arguments.h"
#include "intrinsics.cuh"
#include "row.cuh"

namespace nabla_fast::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// A scratch buffer begins with one arrival counter per row, zero at launch.
__host__ __device__ constexpr int64_t counter_bytes(int64_t rows) { return (rows * 4 + 15) / 16 * 16; }

// A state of what `take` makes of the fields of another one.
template <typename Take>
__device__ __forceinline__ State each_field(const State& state, const Take& take) {
  return {take(state.max), take(state.sum_exp), take(state.sum_exp_grad), take(state.best), take(state.token)};
}

// The whole warp's part, in every lane. The rounding of a merge depends on its order, so all take lane 0's result:
// blocks that merge the same parts must come to the same decision.
__device__ __forceinline__ State warp_merge(State part, float inverse_tau) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    part = merge(part, each_field(part, [&](auto field) { return shuffle_xor(field, offset); }), inverse_tau);
  }
  return each_field(part, [](auto field) { return shuffle(field, 0); });
}

// The whole block's part, in every thread. `slots` has room for kWarps parts and is free again on return.
__device__ __forceinline__ State block_merge(const State& part, State* slots, float inverse_tau) {
  const State mine = warp_merge(part, inverse_tau);
  if (lane_index() == 0) slots[warp_index()] = mine;
  block_sync();
  const State all = warp_merge(lane_index() < kWarps ? slots[lane_index()] : State{}, inverse_tau);
  block_sync();
  return all;
}

__device__ __forceinline__ State load_part(const State& part) {
  return each_field(part, [](const auto& field) { return load_shared_by_blocks(&field); });
}

// The whole row's part, in every thread, from one part per block of the team in global memory.
__device__ __forceinline__ State team_merge(const State* parts, int team, float inverse_tau) {
  State part;
#pragma unroll 1
  for (int rank = lane_index(); rank < team; rank += 32) part = merge(part, load_part(parts[rank]), inverse_tau);
  return warp_merge(part, inverse_tau);
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
