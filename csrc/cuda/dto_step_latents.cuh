// dto_step of latents rows, up to max_steps in one launch: one pass over the head per step, as identity (b) of the
// design has it.
//
// A row belongs to a team of blocks, each with one part of the vocabulary. After a pass (dto_step_latents_worker.cuh)
// the team exchanges one part per block, and every block comes to the same decision from the same parts; A and B go
// through global memory, and each block sums and updates some columns of the row.
#pragma once

#include "dto_step_latents_worker.cuh"

namespace nabla_fast::cuda {

// Sums A and B over the team for some columns and updates these columns of the row.
__device__ __forceinline__ void update_columns(const DtoRows& rows, const DtoHead& head, int row, int rank, int team,
                                               const State& all, const float* weights, const float* vectors,
                                               const AdamStep& adam_numbers, int warps, float (*sums)[2][32]) {
  const int hidden = static_cast<int>(head.hidden);
  const float mean = all.sum_exp_grad / all.sum_exp, outer = static_cast<float>(head.scale);
#pragma unroll 1
  for (int block = rank; block * 32 < hidden; block += team) {
    const int column = block * 32 + lane_index();
    float a = 0, b = 0;
#pragma unroll 8  // so many loads are under way at a time
    for (int member = warp_index(); column < hidden && member < team; member += warps) {
      const float* const vector = vectors + static_cast<int64_t>(2 * member) * hidden + column;
      a += weights[member] * load_shared_by_blocks(vector);
      b += weights[member] * load_shared_by_blocks(vector + hidden);
    }
    sums[warp_index()][0][lane_index()] = a;
    sums[warp_index()][1][lane_index()] = b;
    block_sync();
    if (warp_index() == 0 && column < hidden) {
#pragma unroll 1
      for (int warp = 1; warp < warps; ++warp) {
        a += sums[warp][0][lane_index()];
        b += sums[warp][1][lane_index()];
      }
      float& parameter = rows.parameters[row * rows.parameters_stride + column];
      adam(parameter, rows.exp_avg[row * rows.exp_avg_stride + column],
           rows.exp_avg_sq[row * rows.exp_avg_sq_stride + column],
           outer * (a - mean * b) / static_cast<float>(rows.tau), adam_numbers);
    }
    block_sync();
  }
}

// Where a row's team meets. One copy of everything is enough: a step has one barrier between the parts' writing and
// their reading and another between their reading and the next step's writing.
struct Scratch {
  unsigned* counter;
  State* parts;    // one per block
  float* vectors;  // A and B (2, d), one pair per block
};

__device__ __forceinline__ Scratch scratch_of(const DtoRows& rows, const DtoHead& head, int row, int team) {
  State* const parts = reinterpret_cast<State*>(static_cast<char*>(rows.scratch) + counter_bytes(rows.rows));
  float* const vectors = reinterpret_cast<float*>(parts + rows.rows * team);
  const int64_t before = static_cast<int64_t>(row) * team;
  return {static_cast<unsigned*>(rows.scratch) + row, parts + before, vectors + 2 * before * head.hidden};
}

template <Weight kType, int kChunks>
__global__ void __launch_bounds__(kMostThreads, Shape<kType, kChunks>::kResident)
    dto_latents_kernel(DtoRows rows, DtoHead head, DtoPlan plan) {
  const int team = static_cast<int>(plan.team);
  LatentsShared* const shared = reinterpret_cast<LatentsShared*>(shared_memory());
  if (thread_index() == 0) {
    const int row = block_index() / team;
    shared->progress = progress_of(rows, row);
    shared->pass = pass_of(rows, head, row, block_index() % team, team);
  }
  block_sync();
  const Place place(static_cast<int>(plan.threads), head.hidden, Shape<kType, kChunks>::kColumns);
  Worker<kType, kChunks> worker{head, place, shared, static_cast<int>(plan.stages)};

  for (int done = 0;; ++done) {
    const bool need_gradient = done < shared->progress.allowed;
    worker.load_h(rows.parameters + shared->pass.row * rows.parameters_stride);
    worker.run(need_gradient);
    // Read again after every pass, so that no register has to keep what follows from them.
    const int row = shared->pass.row, rank = shared->pass.rank;
    const Scratch scratch = scratch_of(rows, head, row, team);
    const State mine = worker.finish(need_gradient, scratch.vectors + 2 * rank * head.hidden);
    if (thread_index() == 0) scratch.parts[rank] = mine;
    counter_barrier(scratch.counter, (2 * done + 1) * team);
    const State all = team_merge(scratch.parts, team, Merge{shared->pass.inverse_tau});
    const int token = token_of(all);
    if (shared->progress.stops(token, done)) {
      if (rank == 0 && thread_index() == 0) report(rows, row, shared->progress, token, done);
      return;
    }
#pragma unroll 1
    for (int member = thread_index(); member < team; member += place.threads) {
      shared->weights[member] =
          rescale(load_part(scratch.parts[member]).max, all.max, shared->pass.inverse_tau) / all.sum_exp;
    }
    block_sync();
    update_columns(rows, head, row, rank, team, all, shared->weights, scratch.vectors,
                   next_step(rows, shared->progress.start, done), place.warps(), shared->sums);
    counter_barrier(scratch.counter, (2 * done + 2) * team);
  }
}

}  // namespace nabla_fast::cuda
