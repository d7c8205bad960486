// One thread's share of a block's pass over its part of the head, in dto_step of latents rows.
//
// A block works on tiles: `groups` groups of warps, kDepth vocabulary entries each. A thread holds kColumns columns of
// h, A and B in registers and copies the same columns of W to shared memory for itself, into a ring of tiles of which
// all but the one in use are on their way. The dot products are summed over the group; then all its threads know the
// entries' logits, and add the entries to A and B:
//
//     A = sum_v e_v G_v slope_v W_v    B = sum_v e_v slope_v W_v    dL/dh = scale * (A/S - (Q/S) * (B/S)) / tau
#pragma once

#include "dto_step_latents_layout.cuh"

namespace nabla_fast::cuda {

struct Entry {
  float gradient = 0, soft_noise = 0, hard_noise = 0;
};

template <Weight kType>
__device__ __forceinline__ void unpack(const uint4& chunk, float* out) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == Weight::kFloat32) {
      out[i] = float_of_bits(words[i]);
    } else if constexpr (kType == Weight::kBfloat16) {
      out[2 * i] = float_of_bits(words[i] << 16);
      out[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
    } else {
      out[2 * i] = float_of_half(static_cast<uint16_t>(words[i]));
      out[2 * i + 1] = float_of_half(static_cast<uint16_t>(words[i] >> 16));
    }
  }
}

// Sums kCount numbers over the warp's lanes; lane l returns the sum of number l / (32 / kCount). Every exchange halves
// the numbers that are left, so it takes 9 shuffles for 8 numbers instead of 40.
template <int kCount>
__device__ __forceinline__ float transpose_sum(float (&values)[kCount]) {
#pragma unroll
  for (int half = kCount / 2, offset = 16; half > 0; half /= 2, offset /= 2) {
    const bool upper = lane_index() & offset;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float send = upper ? values[k] : values[k + half];
      const float keep = upper ? values[k + half] : values[k];
      values[k] = keep + shuffle_xor(send, offset);
    }
  }
#pragma unroll
  for (int offset = 16 / kCount; offset > 0; offset /= 2) values[0] += shuffle_xor(values[0], offset);
  return values[0];
}

// The whole block's part, in every thread. `slots` has room for one part of each of its `warps` and is free again on
// return.
__device__ __forceinline__ State block_merge(const State& part, State* slots, int warps, float inverse_tau) {
  const State mine = warp_merge(part, Merge{inverse_tau});
  if (lane_index() == 0) slots[warp_index()] = mine;
  block_sync();
  const State all = warp_merge(lane_index() < warps ? slots[lane_index()] : State{}, Merge{inverse_tau});
  block_sync();
  return all;
}

template <Weight kType, int kChunks>
struct Worker {
  using S = Shape<kType, kChunks>;

  const DtoHead& head;
  const Place& place;
  LatentsShared* const shared;
  const int stages;
  float h[S::kColumns], a[S::kColumns], b[S::kColumns];
  State part;  // softmax: the maximum of the group, the sums of this lane's entries; hard token: of this lane's entries

  // The first vocabulary entry of this thread's group in a tile.
  __device__ __forceinline__ int entry(int tile) const {
    return shared->pass.begin + (tile * place.groups + place.group) * S::kDepth;
  }

  // Of the ring's stage number `stage`.
  __device__ __forceinline__ uint4* slot(int stage, int j, int c) const {
    return shared->tiles() + ((stage * S::kDepth + j) * kChunks + c) * place.threads + thread_index();
  }

  // d is a multiple of kVector, so a chunk is all inside a row of W or all past its end.
  __device__ __forceinline__ bool has_chunk(int c) const { return place.chunk(c) * S::kVector < head.hidden; }

  __device__ __forceinline__ void load_h(const float* row) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const bool valid = has_chunk(c);
      const float* const from = row + place.chunk(c) * S::kVector;
#pragma unroll
      for (int k = 0; k < S::kVector; ++k) h[c * S::kVector + k] = valid ? load_shared_by_blocks(from + k) : 0.0f;
    }
  }

  __device__ __forceinline__ void copy_tile(int tile, int stage) const {
    const int first = entry(tile);
    const int64_t row_bytes = head.stride * S::kElementBytes;
    const char* row = static_cast<const char*>(head.weight) + first * row_bytes;
#pragma unroll
    for (int j = 0; j < S::kDepth; ++j, row += row_bytes) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const bool valid = first + j < shared->pass.end && has_chunk(c);
        copy_async(slot(stage, j, c), valid ? row + place.chunk(c) * 16 : head.weight, valid);
      }
    }
    commit_copies();
  }

  // Until the oldest tile of the ring is there.
  __device__ __forceinline__ void wait_tile() const {
    static_assert(kLeastStages == 2 && kMostStages == 4, "an instruction for each");
    if (stages == 2) {
      wait_copies<1>();
    } else if (stages == 3) {
      wait_copies<2>();
    } else {
      wait_copies<3>();
    }
  }

  // Of the entry that this lane takes care of once the dot products are summed.
  __device__ __forceinline__ Entry load_entry(int tile) const {
    const int v = entry(tile) + lane_index() / S::kLanes;
    Entry out;
    if (v < shared->pass.end) {
      out.gradient = shared->pass.gradient[v] - shared->pass.shift;
      out.soft_noise = shared->pass.soft_noise ? shared->pass.soft_noise[v] : 0.0f;
      out.hard_noise = shared->pass.hard_noise ? shared->pass.hard_noise[v] : 0.0f;
    }
    return out;
  }

  // W_v h of this lane's entry.
  __device__ __forceinline__ float product(int tile, int stage) const {
    float dots[S::kDepth];
#pragma unroll
    for (int j = 0; j < S::kDepth; ++j) {
      dots[j] = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float w[S::kVector];
        unpack<kType>(*slot(stage, j, c), w);
#pragma unroll
        for (int k = 0; k < S::kVector; ++k) dots[j] += w[k] * h[c * S::kVector + k];
      }
    }
    const float mine = transpose_sum(dots);
    // Two buffers in turn, so that one barrier per tile is enough: who is a tile ahead writes to the other one, and
    // nobody is two ahead.
    float (*const buffer)[kTileChunks] = shared->dots[tile % 2];
    const int j = lane_index() / S::kLanes, share = lane_index() % S::kLanes;
    if (share == 0) buffer[warp_index()][j] = mine;
    block_sync();
    float sum = 0;
#pragma unroll
    for (int warp = share; warp < kMostWarps; warp += S::kLanes) {
      if (warp < place.group_warps) sum += buffer[place.group * place.group_warps + warp][j];
    }
#pragma unroll
    for (int offset = S::kLanes / 2; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
    return sum;
  }

  // Adds this lane's entry to the softmax; the entry's factors in A and B. All threads of a group keep one maximum.
  __device__ __forceinline__ float2 add_to_softmax(float x, float gradient, float slope) {
    float max = x;
#pragma unroll
    for (int offset = S::kLanes; offset < 32; offset *= 2) max = fmaxf(max, shuffle_xor(max, offset));
    if (max > part.max) {
      const float factor = raise_max(part, max, shared->pass.inverse_tau);
#pragma unroll
      for (int i = 0; i < S::kColumns; ++i) {
        a[i] *= factor;
        b[i] *= factor;
      }
    }
    const float e = relative_exp(x, part.max, shared->pass.inverse_tau), weighted = weigh(e, gradient);
    part.sum_exp += e;
    part.sum_exp_grad += weighted;
    return {weighted * slope, e * slope};
  }

  __device__ __forceinline__ void add_to_sums(int stage, const float2& factors) {
#pragma unroll(S::kUnroll)
    for (int j = 0; j < S::kDepth; ++j) {
      const float factor_a = shuffle(factors.x, j * S::kLanes), factor_b = shuffle(factors.y, j * S::kLanes);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float w[S::kVector];
        unpack<kType>(*slot(stage, j, c), w);
#pragma unroll
        for (int k = 0; k < S::kVector; ++k) {
          a[c * S::kVector + k] += factor_a * w[k];
          b[c * S::kVector + k] += factor_b * w[k];
        }
      }
    }
  }

  // One pass over the block's part of the vocabulary. Without `need_gradient` the hard token is all that is meant, and
  // whether there is a softmax.
  __device__ __forceinline__ void run(bool need_gradient) {
    const int depth = place.groups * S::kDepth, tiles = (shared->pass.end - shared->pass.begin + depth - 1) / depth;
    part = State{};
#pragma unroll
    for (int i = 0; i < S::kColumns; ++i) a[i] = b[i] = 0;
#pragma unroll 1
    for (int tile = 0; tile < stages; ++tile) copy_tile(tile, tile);
    Entry next = load_entry(0);
#pragma unroll 1
    for (int tile = 0, stage = 0; tile < tiles; ++tile, stage = stage + 1 < stages ? stage + 1 : 0) {
      const Entry now = next;
      next = load_entry(tile + 1);
      wait_tile();
      const float dot = product(tile, stage);
      const int v = entry(tile) + lane_index() / S::kLanes;
      const bool valid = v < shared->pass.end;
      const Logit logit = head_logit(dot, shared->pass.scale, shared->pass.softcap);
      const float x = valid ? logit.value + now.soft_noise : -INFINITY;
      if (valid) add_hard(part, logit.value + now.hard_noise, v);
      if (need_gradient) {
        add_to_sums(stage, add_to_softmax(x, now.gradient, valid ? logit.slope : 0.0f));
      } else {
        look_at_soft(part, x);
      }
      copy_tile(tile + stages, stage);
    }
    // The copies past the end bring nothing, but must not land in what `finish` puts in their place.
    wait_copies<0>();
  }

  // The block's part in every thread; its A and B, relative to the part's maximum, go to `vectors` (2, d).
  __device__ __forceinline__ State finish(bool need_gradient, float* vectors) {
    // An entry is held by several lanes and by every warp of the group: one of them counts it.
    State mine = part;
    if (place.member / 32 != 0 || lane_index() % S::kLanes != 0) mine.sum_exp = mine.sum_exp_grad = 0;
    const State all = block_merge(mine, shared->slots, place.warps(), shared->pass.inverse_tau);
    if (!need_gradient) return all;
    // block_merge was a barrier: nobody reads tiles any more.
    float* const staged = reinterpret_cast<float*>(shared->tiles());
    const float factor = rescale(part.max, all.max, shared->pass.inverse_tau);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int hidden = static_cast<int>(head.hidden);
      float* const to = staged + 2 * place.group * hidden + place.chunk(c) * S::kVector;
      if (has_chunk(c)) {
#pragma unroll
        for (int k = 0; k < S::kVector; ++k) {
          to[k] = factor * a[c * S::kVector + k];
          to[hidden + k] = factor * b[c * S::kVector + k];
        }
      }
    }
    block_sync();
#pragma unroll 1
    for (int i = thread_index(); i < 2 * head.hidden; i += place.threads) {
      float sum = 0;
#pragma unroll 1
      for (int group = 0; group < place.groups; ++group) sum += staged[2 * group * head.hidden + i];
      vectors[i] = sum;
    }
    // The tiles are free again on return, whatever the caller does next.
    block_sync();
    return all;
  }
};

}  // namespace nabla_fast::cuda
