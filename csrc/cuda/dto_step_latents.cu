#include "dto_step_latents.cuh"
#include "launch.cuh"
#include "launchers.h"

using namespace nabla_fast::cuda;

namespace {

using Kernel = void(DtoRows, DtoHead, DtoPlan);

template <Weight kType>
Kernel* kernel_of(int chunks) {
  switch (chunks) {
    case 1: return dto_latents_kernel<kType, 1>;
    case 2: return dto_latents_kernel<kType, 2>;
    case 4: return dto_latents_kernel<kType, 4>;
    case 8:
      if constexpr (kType == Weight::kFloat32) return dto_latents_kernel<kType, 8>;
  }
  return nullptr;
}

Kernel* kernel_for(Weight type, int chunks) {
  switch (type) {
    case Weight::kFloat32: return kernel_of<Weight::kFloat32>(chunks);
    case Weight::kBfloat16: return kernel_of<Weight::kBfloat16>(chunks);
    case Weight::kFloat16: return kernel_of<Weight::kFloat16>(chunks);
  }
  return nullptr;
}

}  // namespace

int nabla_fast_cuda_plan_latents(int64_t rows, int64_t vocabulary, int64_t type, int64_t hidden, int device,
                                 DtoPlan* plan) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  *plan = {};
  const BlockShape shape = block_shape(static_cast<Weight>(type), hidden);
  Kernel* const kernel = kernel_for(static_cast<Weight>(type), shape.chunks);
  if (kernel == nullptr) return cudaSuccess;
  const auto blocks = [&](int stages) {
    return resident_blocks(kernel, shape.threads, latents_shared_bytes(shape.threads, stages), device);
  };
  // As deep a ring as there is room for beside all blocks that a processor can hold.
  int stages = kMostStages;
  while (stages > kLeastStages && blocks(stages) < blocks(kLeastStages)) --stages;
  plan->team = team_size(blocks(stages), rows, (vocabulary + kTileChunks - 1) / kTileChunks);
  plan->threads = shape.threads;
  plan->stages = stages;
  plan->scratch_bytes = counter_bytes(rows) + rows * plan->team * (sizeof(State) + 2 * hidden * sizeof(float));
  return cudaSuccess;
}

int nabla_fast_cuda_dto_latents(const DtoRows* rows, const DtoHead* head, const DtoPlan* plan, int device,
                                cudaStream_t stream) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  const Weight type = static_cast<Weight>(head->type);
  Kernel* const kernel = kernel_for(type, block_shape(type, head->hidden).chunks);
  if (kernel == nullptr || plan->team < 1) return cudaErrorInvalidValue;
  DtoRows rows_copy = *rows;
  DtoHead head_copy = *head;
  DtoPlan plan_copy = *plan;
  void* arguments[] = {&rows_copy, &head_copy, &plan_copy};
  return launch_cooperative(kernel, arguments, *rows, *plan, static_cast<int>(plan->threads),
                            latents_shared_bytes(plan->threads, plan->stages), stream);
}
