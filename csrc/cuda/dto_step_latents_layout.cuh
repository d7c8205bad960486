// Who works on what in dto_step of latents rows: the shape of a tile of W, a thread's place in its block, a block's
// part of the vocabulary, and what the threads of a block share.
#pragma once

#include "team.cuh"

namespace nabla_fast::cuda {

enum class Weight { kFloat32, kBfloat16, kFloat16 };

constexpr int kStages = 2;
constexpr int kTileChunks = 8;  // 16-byte chunks of W per thread and tile

template <Weight kType, int kChunks>
struct Shape {
  static constexpr int kVector = kType == Weight::kFloat32 ? 4 : 8;  // elements in a chunk
  static constexpr int kElementBytes = 16 / kVector;
  static constexpr int kColumns = kChunks * kVector;
  static constexpr int kDepth = kTileChunks / kChunks;
  // h, A and B of 16 columns leave registers for few chunks of W at a time.
  static constexpr int kUnroll = kColumns < 16 ? kDepth : 1;
  static constexpr int kLanes = 32 / kDepth;  // lanes that share one vocabulary entry after the dot products are summed
};

// Which columns and which entries of a tile a thread works on.
struct Place {
  int group_warps, groups, group, member;  // warps per group, groups per block, this thread's group and number in it
  bool active;                             // the last warps of a block may make no whole group

  __device__ __forceinline__ Place(int64_t hidden, int columns) {
    group_warps = static_cast<int>((hidden + 32 * columns - 1) / (32 * columns));
    groups = kWarps / group_warps;
    group = warp_index() / group_warps;
    member = thread_index() - group * group_warps * 32;
    active = group < groups;
  }

  __device__ __forceinline__ int chunk(int c) const { return c * group_warps * 32 + member; }
};

// A block's part of the vocabulary.
struct Pass {
  int row, rank;  // of the block
  int begin, end;
  float shift, inverse_tau, scale, softcap;
  const float* gradient;
  const float* soft_noise;  // or null
  const float* hard_noise;  // or null
};

struct LatentsShared {
  uint4 tiles[kStages * kTileChunks * kThreads];  // after a pass: A and B of every group
  float dots[2][kWarps][kTileChunks];
  float weights[kThreads];
  float sums[kWarps][2][32];
  State slots[kWarps];
  // Here rather than in registers, of which the tiles' loop needs all.
  Pass pass;
  Progress progress;
};

__device__ __forceinline__ Pass pass_of(const DtoRows& rows, const DtoHead& head, int row, int rank, int team) {
  const int vocabulary = static_cast<int>(rows.vocabulary), size = (vocabulary - 1) / team + 1;
  const int begin = min(rank * size, vocabulary);
  const float* const gradient = rows.gradient + row * rows.gradient_stride;
  return {row,
          rank,
          begin,
          min(begin + size, vocabulary),
          gradient_shift(gradient, rows.tokens[row], vocabulary),
          static_cast<float>(1 / rows.tau),
          static_cast<float>(head.scale),
          static_cast<float>(head.softcap),
          gradient,
          rows.soft_noise ? rows.soft_noise + row * rows.soft_noise_stride : nullptr,
          rows.hard_noise ? rows.hard_noise + row * rows.hard_noise_stride : nullptr};
}

}  // namespace nabla_fast::cuda
