// token_diff: one block per row, one launch, nothing copied to the host.
#pragma once

#include "intrinsics.cuh"

namespace nabla_fast::cuda {

constexpr int kDiffThreads = 256;

struct Tokens {
  const int64_t* data;
  int64_t row_stride, column_stride;
};

__global__ void __launch_bounds__(kDiffThreads, 1)
    token_diff_kernel(Tokens old_tokens, Tokens new_tokens, int64_t* first, int64_t* count, int64_t columns) {
  const int64_t row = block_index();
  const int64_t* const before = old_tokens.data + row * old_tokens.row_stride;
  const int64_t* const after = new_tokens.data + row * new_tokens.row_stride;
  long long lowest = columns, changes = 0;
  for (int64_t i = thread_index(); i < columns; i += kDiffThreads) {
    if (before[i * old_tokens.column_stride] != after[i * new_tokens.column_stride]) {
      lowest = i < lowest ? i : lowest;
      ++changes;
    }
  }
  auto reduce = [&] {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const long long other = shuffle_xor(lowest, offset);
      lowest = other < lowest ? other : lowest;
      changes += shuffle_xor(changes, offset);
    }
  };
  reduce();
  constexpr int kDiffWarps = kDiffThreads / 32;
  long long* const slots = reinterpret_cast<long long*>(shared_memory());
  if (lane_index() == 0) {
    slots[2 * warp_index()] = lowest;
    slots[2 * warp_index() + 1] = changes;
  }
  block_sync();
  if (warp_index() == 0) {
    const bool used = lane_index() < kDiffWarps;
    lowest = used ? slots[2 * lane_index()] : columns;
    changes = used ? slots[2 * lane_index() + 1] : 0;
    reduce();
    if (lane_index() == 0) {
      first[row] = lowest;
      count[row] = changes;
    }
  }
}

}  // namespace nabla_fast::cuda
