// dto_step of logits rows, up to max_steps in one launch.
//
// A row belongs to a team of blocks, each with one slice of the vocabulary. Where clusters exist (sm_90 on) the team is
// one, and the logits and Adam's moments stay in its shared memory from the first step to the last; elsewhere they stay
// in place, which in practice is the level-two cache. A step reads every entry once: gradient, Adam, and the new
// logit's share in the next softmax and argmax. Then the team exchanges one small part per block, and every block comes
// to the same decision from the same parts.
#pragma once

#include "team.cuh"

namespace nabla_fast::cuda {

struct Slice {
  float* logits;
  float* exp_avg;
  float* exp_avg_sq;
  const float* gradient;
  const float* soft_noise;  // or null
  const float* hard_noise;  // or null
  int first, count;         // of the vocabulary
};

// In front of the arrays in shared memory.
struct LogitsShared {
  State slots[kWarps];
  State exchange[2];
  float arrays[1];
};

__host__ __device__ constexpr int64_t slice_size(int64_t vocabulary, int64_t team) {
  return (vocabulary + team - 1) / team;
}

__host__ __device__ constexpr int64_t logits_shared_bytes(int64_t arrays, int64_t slice) {
  return sizeof(LogitsShared) + arrays * slice * sizeof(float);
}

__device__ __forceinline__ Slice slice_of(const DtoRows& rows, int row, int rank, int team) {
  const int64_t size = slice_size(rows.vocabulary, team), first = rank * size, left = rows.vocabulary - first;
  const auto noise = [&](const float* data, int64_t stride) { return data ? data + row * stride + first : nullptr; };
  return {rows.parameters + row * rows.parameters_stride + first,
          rows.exp_avg + row * rows.exp_avg_stride + first,
          rows.exp_avg_sq + row * rows.exp_avg_sq_stride + first,
          rows.gradient + row * rows.gradient_stride + first,
          noise(rows.soft_noise, rows.soft_noise_stride),
          noise(rows.hard_noise, rows.hard_noise_stride),
          static_cast<int>(first),
          static_cast<int>(left < 0 ? 0 : min(left, size))};
}

__device__ __forceinline__ void copy_slice(float* to, const float* from, int count) {
  for (int i = thread_index(); i < count; i += kThreads) to[i] = from[i];
}

__device__ __forceinline__ float softmax_input(const Slice& slice, int i, float logit) {
  return slice.soft_noise ? logit + slice.soft_noise[i] : logit;
}

__device__ __forceinline__ void add_entry(State& part, const Slice& slice, int i, float logit, float gradient,
                                          float inverse_tau) {
  add_soft(part, softmax_input(slice, i, logit), gradient, inverse_tau);
  add_hard(part, slice.hard_noise ? logit + slice.hard_noise[i] : logit, slice.first + i);
}

// One step of this thread's entries; what they say about the next one.
__device__ __forceinline__ State step_entries(const Slice& slice, const State& row, float shift, float inverse_tau,
                                              const AdamStep& adam_numbers) {
  const float mean = row.sum_exp_grad / row.sum_exp;
  State part;
  for (int i = thread_index(); i < slice.count; i += kThreads) {
    float logit = slice.logits[i], exp_avg = slice.exp_avg[i], exp_avg_sq = slice.exp_avg_sq[i];
    const float gradient = slice.gradient[i] - shift;
    const float x = softmax_input(slice, i, logit);
    adam(logit, exp_avg, exp_avg_sq, logit_gradient(x, gradient, row.max, row.sum_exp, mean, inverse_tau),
         adam_numbers);
    slice.logits[i] = logit;
    slice.exp_avg[i] = exp_avg;
    slice.exp_avg_sq[i] = exp_avg_sq;
    add_entry(part, slice, i, logit, gradient, inverse_tau);
  }
  return part;
}

// The team's part of the row in every thread, from every block's own. Two places are used in turn: nobody writes to one
// before all have passed the barrier after it was read.
template <bool kCluster>
__device__ __forceinline__ State exchange(const State& mine, LogitsShared* shared, const DtoRows& rows, int row,
                                          int rank, int team, int round, float inverse_tau) {
  if constexpr (kCluster) {
    State* const place = shared->exchange + round % 2;
    if (thread_index() == 0) *place = mine;
    cluster_sync();
    const int lane = lane_index();
    return warp_merge(lane < team ? *cluster_address(place, lane) : State{}, inverse_tau);
  } else {
    unsigned* const counter = static_cast<unsigned*>(rows.scratch) + row;
    State* const places = reinterpret_cast<State*>(static_cast<char*>(rows.scratch) + counter_bytes(rows.rows)) +
                          (2 * row + round % 2) * team;
    if (thread_index() == 0) places[rank] = mine;
    counter_barrier(counter, (round + 1) * team);
    return team_merge(places, team, inverse_tau);
  }
}

template <bool kCluster>
__global__ void __launch_bounds__(kThreads, 1) dto_logits_kernel(DtoRows rows, DtoPlan plan) {
  const int team = static_cast<int>(plan.team), row = block_index() / team;
  const int rank = kCluster ? cluster_rank() : block_index() % team;
  LogitsShared* const shared = reinterpret_cast<LogitsShared*>(shared_memory());
  const float inverse_tau = static_cast<float>(1 / rows.tau);
  const Progress progress = progress_of(rows, row);
  const float shift = gradient_shift(rows.gradient + row * rows.gradient_stride, progress.expected, rows.vocabulary);

  const Slice home = slice_of(rows, row, rank, team);
  Slice slice = home;
  if constexpr (kCluster) {
    const int64_t size = slice_size(rows.vocabulary, team);
    slice.logits = shared->arrays;
    slice.exp_avg = slice.logits + size;
    slice.exp_avg_sq = slice.exp_avg + size;
    copy_slice(slice.logits, home.logits, home.count);
    copy_slice(slice.exp_avg, home.exp_avg, home.count);
    copy_slice(slice.exp_avg_sq, home.exp_avg_sq, home.count);
    if (plan.chip_gradient) {
      float* const gradient = slice.exp_avg_sq + size;
      copy_slice(gradient, home.gradient, home.count);
      slice.gradient = gradient;
    }
  }

  // A thread reads and writes its own entries only, so the arrays need no barrier.
  State part;
  for (int i = thread_index(); i < slice.count; i += kThreads) {
    add_entry(part, slice, i, slice.logits[i], slice.gradient[i] - shift, inverse_tau);
  }
  for (int done = 0;; ++done) {
    const State mine = block_merge(part, shared->slots, inverse_tau);
    const State all = exchange<kCluster>(mine, shared, rows, row, rank, team, done, inverse_tau);
    const int token = token_of(all);
    if (progress.stops(token, done)) {
      if constexpr (kCluster) {
        if (done > 0) {
          copy_slice(home.logits, slice.logits, home.count);
          copy_slice(home.exp_avg, slice.exp_avg, home.count);
          copy_slice(home.exp_avg_sq, slice.exp_avg_sq, home.count);
        }
        cluster_sync();  // nobody leaves while another still reads its shared memory
      }
      if (rank == 0 && thread_index() == 0) report(rows, row, progress, token, done);
      return;
    }
    part = step_entries(slice, all, shift, inverse_tau, next_step(rows, progress.start, done));
  }
}

}  // namespace nabla_fast::cuda
