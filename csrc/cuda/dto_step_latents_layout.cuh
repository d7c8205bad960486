// Who works on what in dto_step of latents rows: the shape of a tile of W, a thread's place in its block, a block's
// part of the vocabulary, and what the threads of a block share.
#pragma once

#include "team.cuh"

namespace nabla_fast::cuda {

enum class Weight { kFloat32, kBfloat16, kFloat16 };

constexpr int kTileChunks = 8;  // 16-byte chunks of W per thread and tile
// Of a block: small enough that a processor holds two or more, and one works while the other waits.
constexpr int kMostWarps = 8;
constexpr int kMostThreads = 32 * kMostWarps;
constexpr int kLeastStages = 2, kMostStages = 4;  // tiles of the ring, of which one is in use

template <Weight kType, int kChunks>
struct Shape {
  static constexpr int kVector = kType == Weight::kFloat32 ? 4 : 8;  // elements in a chunk
  static constexpr int kElementBytes = 16 / kVector;
  static constexpr int kColumns = kChunks * kVector;
  static constexpr int kDepth = kTileChunks / kChunks;
  // Entries that are added to A and B side by side: h, A and B of many columns leave registers for few chunks of W.
  static constexpr int kUnroll = kColumns < 16 ? kDepth : kDepth == 4 ? 2 : 1;
  static constexpr int kLanes = 32 / kDepth;  // lanes that share one vocabulary entry after the dot products are summed
  // Blocks of a processor that the registers must be enough for.
  static constexpr int kResident = kColumns < 32 ? 2 : 1;
};

// How a row of the head is divided among the threads of a block.
struct BlockShape {
  int chunks;       // per thread; 0: such a row is too long
  int group_warps;  // that share a row
  int threads;      // of as many whole groups as there may be: no warp is idle
};

__host__ __device__ inline BlockShape block_shape(Weight type, int64_t hidden) {
  const int64_t vector = type == Weight::kFloat32 ? 4 : 8, chunks_of_row = (hidden + vector - 1) / vector;
  for (int chunks = 1; chunks * vector <= 32; chunks *= 2) {
    const int warps = static_cast<int>((chunks_of_row + 32 * chunks - 1) / (32 * chunks));
    if (warps <= kMostWarps) return {chunks, warps, kMostWarps / warps * warps * 32};
  }
  return {};
}

// Which columns and which entries of a tile a thread works on.
struct Place {
  int threads, group_warps, groups, group, member;  // member: this thread's number in its group

  __device__ __forceinline__ Place(int block_threads, int64_t hidden, int columns) {
    threads = block_threads;
    group_warps = static_cast<int>((hidden + 32 * columns - 1) / (32 * columns));
    groups = threads / 32 / group_warps;
    group = warp_index() / group_warps;
    member = thread_index() - group * group_warps * 32;
  }

  __device__ __forceinline__ int warps() const { return threads / 32; }
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

// In front of the tiles.
struct alignas(16) LatentsShared {
  float dots[2][kMostWarps][kTileChunks];
  float weights[kMostTeam];
  float sums[kMostWarps][2][32];
  State slots[kMostWarps];
  // Here rather than in registers, of which the tiles' loop needs all.
  Pass pass;
  Progress progress;

  // After a pass: A and B of every group.
  __device__ __forceinline__ uint4* tiles() { return reinterpret_cast<uint4*>(this + 1); }
};

__host__ __device__ constexpr int64_t latents_shared_bytes(int64_t threads, int64_t stages) {
  return sizeof(LatentsShared) + stages * kTileChunks * threads * sizeof(uint4);
}

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
