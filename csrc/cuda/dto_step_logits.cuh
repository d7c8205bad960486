// dto_step of logits rows, up to max_steps in one launch.
//
// A row belongs to a team of blocks on processors of their own, each with one slice of the vocabulary. A thread keeps
// its entries in registers from the first step to the last, where they fit; elsewhere they stay in place, which in
// practice is the level-two cache. A step visits every entry once: gradient, Adam, and the new logit's share in the
// next softmax and argmax. Then the team exchanges one small part per block, and every block comes to the same decision
// from the same parts.
//
// Exponentials are relative to a base that the whole team shares and that stays as long as it does: a step moves the
// maximum a little, so the new exponentials need not wait for it, and parts of the row are added up without one.
#pragma once

#include "team.cuh"

namespace nabla_fast::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr float kLog2E = 1.44269504f;
// How far the maximum may be from the base, in powers of two: far from where sums overflow, or what counts is lost.
constexpr float kRange = 32;

struct Slice {
  float* logits;
  float* exp_avg;
  float* exp_avg_sq;
  const float* gradient;
  const float* soft_noise;  // or null
  const float* hard_noise;  // or null
  int first, count;         // of the vocabulary
};

struct LogitEntry {
  float logit, exp_avg, exp_avg_sq, gradient;  // relative to the expected token's gradient
  float weight;                                // exp((logit + noise - base) / tau)
};

// What the whole team knows after an exchange.
struct Decision {
  State row;
  float mean, factor;  // <p, G>; weight times it is p / tau
  AdamStep next;       // of the step that may follow
};

struct LogitsShared {
  State slots[kWarps];
  Decision decision;
};

__host__ __device__ constexpr int64_t slice_size(int64_t vocabulary, int64_t team) {
  return (vocabulary + team - 1) / team;
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

// What the softmax is first taken relative to: the likeliest token's logit, if the expected token is that.
__device__ __forceinline__ float first_base(const DtoRows& rows, int row, int64_t token) {
  if (token < 0 || token >= rows.vocabulary) return 0;
  float x = rows.parameters[row * rows.parameters_stride + token];
  if (rows.soft_noise) x += rows.soft_noise[row * rows.soft_noise_stride + token];
  return fabsf(x) < INFINITY ? x : 0.0f;
}

// One thread's share of a row.
template <int kKept>
struct Share {
  const Slice slice;
  const float shift, exponent;  // of the gradient; (x - base) times it is a power of two
  float base;
  LogitEntry kept[kKept > 0 ? kKept : 1];

  __device__ __forceinline__ LogitEntry load(int i) const {
    return {slice.logits[i], slice.exp_avg[i], slice.exp_avg_sq[i], slice.gradient[i] - shift, 0};
  }

  __device__ __forceinline__ void store(int i, const LogitEntry& entry) const {
    slice.logits[i] = entry.logit;
    slice.exp_avg[i] = entry.exp_avg;
    slice.exp_avg_sq[i] = entry.exp_avg_sq;
  }

  template <typename Visit>
  __device__ __forceinline__ void each_kept(const Visit& visit) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int i = k * kThreads + thread_index();
      if (i < slice.count) visit(kept[k], i);
    }
  }

  __device__ __forceinline__ float softmax_input(int i, float logit) const {
    return slice.soft_noise ? logit + slice.soft_noise[i] : logit;
  }

  __device__ __forceinline__ float hard_value(int i, float logit) const {
    return slice.hard_noise ? logit + slice.hard_noise[i] : logit;
  }

  // Adds the entry to the softmax.
  __device__ __forceinline__ void weigh_entry(State& part, LogitEntry& entry, int i) const {
    const float x = softmax_input(i, entry.logit);
    entry.weight = approximate_exp2((x - base) * exponent);
    part.max = fmaxf(part.max, x);
    part.sum_exp += entry.weight;
    part.sum_exp_grad += weigh(entry.weight, entry.gradient);
  }

  // What the entries say about the next step, as they are.
  __device__ __forceinline__ State look() {
    State part;
    const auto visit = [&](LogitEntry& entry, int i) {
      weigh_entry(part, entry, i);
      add_hard(part, hard_value(i, entry.logit), slice.first + i);
    };
    each_kept(visit);
    for (int i = thread_index(); kKept == 0 && i < slice.count; i += kThreads) {
      LogitEntry entry = load(i);
      visit(entry, i);
    }
    return part;
  }

  // One step of the entries; what they say about the next one. Noise has been looked at before: a NaN that is new is
  // one of the logit, and shows in the softmax.
  __device__ __forceinline__ State step(const Decision& decision) {
    const float mean = decision.mean, factor = decision.factor;
    const AdamStep numbers = decision.next;
    State part;
    const auto visit = [&](LogitEntry& entry, int i) {
      // Where the weight is 0, an infinite gradient moves nothing; a mean of NaN does.
      const float difference = (entry.weight > 0 ? entry.gradient : 0.0f) - mean;
      adam(entry.logit, entry.exp_avg, entry.exp_avg_sq, factor * entry.weight * difference, numbers);
      weigh_entry(part, entry, i);
      const float value = hard_value(i, entry.logit);
      if (value > part.best) {
        part.best = value;
        part.token = slice.first + i;
      }
    };
    each_kept(visit);
    for (int i = thread_index(); kKept == 0 && i < slice.count; i += kThreads) {
      LogitEntry entry = load(i);
      entry.weight = approximate_exp2((softmax_input(i, entry.logit) - base) * exponent);
      visit(entry, i);
      store(i, entry);
    }
    return part;
  }
};

// Puts every thread's part together, for all threads in `shared->decision`. Places in global memory are used in turn:
// nobody writes to one before all have passed the barrier after it was read.
__device__ __forceinline__ void exchange(const State& part, LogitsShared* shared, const DtoRows& rows, int row,
                                         int rank, int team, int round, const Progress& progress, int done) {
  const MergeSums how;
  const State mine = warp_merge(part, how);
  if (lane_index() == 0) shared->slots[warp_index()] = mine;
  block_sync();
  Decision& decision = shared->decision;
  if (thread_index() == kThreads - 1 && done < progress.allowed) {
    decision.next = next_step(rows, progress.start, done);
  }
  State all;
  if (warp_index() == 0) all = warp_merge(lane_index() < kWarps ? shared->slots[lane_index()] : State{}, how);
  if (team > 1) {
    State* const places = reinterpret_cast<State*>(static_cast<char*>(rows.scratch) + counter_bytes(rows.rows)) +
                          (2 * row + round % 2) * team;
    if (thread_index() == 0) places[rank] = all;
    counter_barrier(static_cast<unsigned*>(rows.scratch) + row, (round + 1) * team);
    if (warp_index() == 0) all = team_merge(places, team, how);
  }
  if (thread_index() == 0) {
    decision.row = all;
    decision.mean = all.sum_exp_grad / all.sum_exp;
    decision.factor = static_cast<float>(1 / rows.tau) / all.sum_exp;
  }
  block_sync();
}

template <int kKept>
__global__ void __launch_bounds__(kThreads, 1) dto_logits_kernel(DtoRows rows, DtoPlan plan) {
  const int team = static_cast<int>(plan.team), row = block_index() / team, rank = block_index() % team;
  LogitsShared* const shared = reinterpret_cast<LogitsShared*>(shared_memory());
  const Progress progress = progress_of(rows, row);
  Share<kKept> share{slice_of(rows, row, rank, team),
                     gradient_shift(rows.gradient + row * rows.gradient_stride, progress.expected, rows.vocabulary),
                     static_cast<float>(1 / rows.tau) * kLog2E, first_base(rows, row, progress.expected)};
  share.each_kept([&](LogitEntry& entry, int i) { entry = share.load(i); });

  bool looks = true;
#pragma unroll 1
  for (int done = 0, round = 0;; ++round) {
    exchange(looks ? share.look() : share.step(shared->decision), shared, rows, row, rank, team, round, progress, done);
    const State all = shared->decision.row;
    const float distance = fabsf(all.max - share.base);
    looks = fabsf(all.max) < INFINITY && distance > 0 && !(distance * share.exponent <= kRange);
    if (looks) {
      share.base = all.max;
      continue;
    }
    const int token = token_of(all);
    if (progress.stops(token, done)) {
      if (done > 0) share.each_kept([&](const LogitEntry& entry, int i) { share.store(i, entry); });
      if (rank == 0 && thread_index() == 0) report(rows, row, progress, token, done);
      return;
    }
    ++done;
  }
}

}  // namespace nabla_fast::cuda
