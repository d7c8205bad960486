#include "dto_step_latents.cuh"
#include "launch.cuh"
#include "launchers.h"

using namespace nabla_fast::cuda;

namespace {

using Kernel = void(DtoRows, DtoHead, DtoPlan);

template <Weight kType>
Kernel* kernel_for_width(int64_t hidden) {
  constexpr int64_t kOne = kThreads * Shape<kType, 1>::kColumns;
  if (hidden <= kOne) return dto_latents_kernel<kType, 1>;
  if (hidden <= 2 * kOne) return dto_latents_kernel<kType, 2>;
  if constexpr (kType == Weight::kFloat32) {
    if (hidden <= 4 * kOne) return dto_latents_kernel<kType, 4>;
  }
  return nullptr;
}

Kernel* kernel_for(int64_t type, int64_t hidden) {
  switch (static_cast<Weight>(type)) {
    case Weight::kFloat32: return kernel_for_width<Weight::kFloat32>(hidden);
    case Weight::kBfloat16: return kernel_for_width<Weight::kBfloat16>(hidden);
    case Weight::kFloat16: return kernel_for_width<Weight::kFloat16>(hidden);
  }
  return nullptr;
}

}  // namespace

int nabla_fast_cuda_plan_latents(int64_t rows, int64_t vocabulary, int64_t type, int64_t hidden, int device,
                                 DtoPlan* plan) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  *plan = {};
  Kernel* const kernel = kernel_for(type, hidden);
  if (kernel == nullptr) return cudaSuccess;
  plan->team = team_size(resident_blocks(kernel, sizeof(LatentsShared), device), rows,
                         (vocabulary + kTileChunks - 1) / kTileChunks);
  plan->scratch_bytes = counter_bytes(rows) + rows * plan->team * (sizeof(State) + 2 * hidden * sizeof(float));
  return cudaSuccess;
}

int nabla_fast_cuda_dto_latents(const DtoRows* rows, const DtoHead* head, const DtoPlan* plan, int device,
                                cudaStream_t stream) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  Kernel* const kernel = kernel_for(head->type, head->hidden);
  if (kernel == nullptr || plan->team < 1) return cudaErrorInvalidValue;
  DtoRows rows_copy = *rows;
  DtoHead head_copy = *head;
  DtoPlan plan_copy = *plan;
  void* arguments[] = {&rows_copy, &head_copy, &plan_copy};
  return launch_cooperative(kernel, arguments, *rows, *plan, sizeof(LatentsShared), stream);
}
