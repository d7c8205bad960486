// What the launchers share.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "team.cuh"

namespace nabla_fast::cuda {

#define NABLA_FAST_TRY(call)                                      \
  if (const cudaError_t error_ = (call); error_ != cudaSuccess) { \
    return error_;                                                \
  }

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// Lets the kernel take `bytes` of shared memory; false where the device has less.
template <typename Kernel>
bool allow_shared(Kernel* kernel, int64_t bytes, int device) {
  return bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) ==
             cudaSuccess;
}

// Most blocks of the kernel that are resident at the same time; 0 where a grid cannot wait for itself.
template <typename Kernel>
int64_t resident_blocks(Kernel* kernel, int threads, int64_t bytes, int device) {
  int per_processor = 0;
  if (!attribute(cudaDevAttrCooperativeLaunch, device) || !allow_shared(kernel, bytes, device) ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, bytes) != cudaSuccess) {
    cudaGetLastError();  // the answer is 0, nothing has failed
    return 0;
  }
  return static_cast<int64_t>(per_processor) * attribute(cudaDevAttrMultiProcessorCount, device);
}

// A team's size: an equal share of the resident blocks, and no more than the vocabulary gives work to.
inline int64_t team_size(int64_t blocks, int64_t rows, int64_t useful) {
  return std::min({blocks / rows, std::max<int64_t>(useful, 1), static_cast<int64_t>(kMostTeam)});
}

// Starts plan.team blocks per row, all resident at the same time, with the arrival counters at zero.
template <typename Kernel>
cudaError_t launch_cooperative(Kernel* kernel, void** arguments, const DtoRows& rows, const DtoPlan& plan, int threads,
                               int64_t bytes, cudaStream_t stream) {
  NABLA_FAST_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  NABLA_FAST_TRY(cudaMemsetAsync(rows.scratch, 0, counter_bytes(rows.rows), stream));
  const dim3 grid(static_cast<unsigned>(rows.rows * plan.team));
  return cudaLaunchCooperativeKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), arguments, bytes, stream);
}

}  // namespace nabla_fast::cuda
