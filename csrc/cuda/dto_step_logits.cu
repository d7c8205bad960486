#include "dto_step_logits.cuh"
#include "launch.cuh"
#include "launchers.h"

using namespace nabla_fast::cuda;

namespace {

constexpr int64_t kMaxCluster = 16;
// Entries per block: blocks with fewer would wait for each other more than they work.
constexpr int64_t kSliceWanted = 8 * kThreads;

struct ClusterLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster;

  ClusterLaunch(int64_t rows, int64_t team, int64_t bytes, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(team), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(rows * team));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
};

int64_t cluster_bytes(int64_t vocabulary, const DtoPlan& plan) {
  return logits_shared_bytes(plan.chip_gradient ? 4 : 3, slice_size(vocabulary, plan.team));
}

// More than 8 blocks in a cluster must be asked for. The limit on shared memory is always the device's own, so that
// threads of the host that launch other sizes do not lower it for each other.
cudaError_t allow_cluster(int device) {
  NABLA_FAST_TRY(cudaFuncSetAttribute(dto_logits_kernel<true>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  return cudaFuncSetAttribute(dto_logits_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

bool cluster_fits(int64_t rows, int64_t vocabulary, const DtoPlan& plan, int device) {
  const int64_t bytes = cluster_bytes(vocabulary, plan);
  if (bytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) || allow_cluster(device) != cudaSuccess) {
    return false;
  }
  ClusterLaunch launch(rows, plan.team, bytes, nullptr);
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, dto_logits_kernel<true>, &launch.config) == cudaSuccess &&
         clusters > 0;
}

// The device may have clusters, and run code that was compiled for one that has not.
bool has_clusters(int device) {
  cudaFuncAttributes attributes;
  return attribute(cudaDevAttrClusterLaunch, device) &&
         cudaFuncGetAttributes(&attributes, dto_logits_kernel<true>) == cudaSuccess && attributes.ptxVersion >= 90;
}

}  // namespace

int nabla_fast_cuda_plan_logits(int64_t rows, int64_t vocabulary, int device, DtoPlan* plan) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  int64_t wanted = 1;
  while (wanted < kMaxCluster && wanted * kSliceWanted < vocabulary) wanted *= 2;
  if (has_clusters(device)) {
    // A processor group may have room for 8 blocks but not for 16.
    for (const int64_t team : {wanted, (wanted + 1) / 2}) {
      for (const int64_t chip_gradient : {1, 0}) {
        *plan = {team, 1, chip_gradient, 0};
        if (cluster_fits(rows, vocabulary, *plan, device)) return cudaSuccess;
      }
    }
  }
  cudaGetLastError();  // what did not fit is not a failure
  *plan = {};
  plan->team = team_size(resident_blocks(dto_logits_kernel<false>, sizeof(LogitsShared), device), rows,
                         (vocabulary + kSliceWanted - 1) / kSliceWanted);
  plan->scratch_bytes = counter_bytes(rows) + 2 * rows * plan->team * static_cast<int64_t>(sizeof(State));
  return cudaSuccess;
}

int nabla_fast_cuda_dto_logits(const DtoRows* rows, const DtoPlan* plan, int device, cudaStream_t stream) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  if (plan->team < 1) return cudaErrorInvalidValue;
  DtoRows rows_copy = *rows;
  DtoPlan plan_copy = *plan;
  void* arguments[] = {&rows_copy, &plan_copy};
  if (!plan->cluster) {
    return launch_cooperative(dto_logits_kernel<false>, arguments, *rows, *plan, sizeof(LogitsShared), stream);
  }
  const int64_t bytes = cluster_bytes(rows->vocabulary, *plan);
  NABLA_FAST_TRY(allow_cluster(device));
  ClusterLaunch launch(rows->rows, plan->team, bytes, stream);
  return cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(dto_logits_kernel<true>), arguments);
}
