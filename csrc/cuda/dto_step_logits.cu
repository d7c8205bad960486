#include "dto_step_logits.cuh"
#include "launch.cuh"
#include "launchers.h"

using namespace nabla_fast::cuda;

namespace {

// Entries per block: blocks with fewer would wait for each other more than they work.
constexpr int64_t kSliceWanted = 2 * kThreads;

using Kernel = void(DtoRows, DtoPlan);

Kernel* kernel_for(int64_t kept) {
  return kept == 4 ? dto_logits_kernel<4> : kept == 12 ? dto_logits_kernel<12> : dto_logits_kernel<0>;
}

}  // namespace

int nabla_fast_cuda_plan_logits(int64_t rows, int64_t vocabulary, int device, DtoPlan* plan) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  *plan = {};
  // One block per processor: a second one would share its arithmetic, and wait for the others as well.
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, device);
  for (const int64_t kept : {4, 12, 0}) {
    const int64_t blocks =
        std::min(resident_blocks(kernel_for(kept), kThreads, sizeof(LogitsShared), device), processors);
    plan->team = team_size(blocks, rows, (vocabulary + kSliceWanted - 1) / kSliceWanted);
    plan->kept = kept;
    if (plan->team > 0 && slice_size(vocabulary, plan->team) <= kept * kThreads) break;
  }
  plan->scratch_bytes = counter_bytes(rows) + 2 * rows * plan->team * static_cast<int64_t>(sizeof(State));
  return cudaSuccess;
}

int nabla_fast_cuda_dto_logits(const DtoRows* rows, const DtoPlan* plan, int device, cudaStream_t stream) {
  NABLA_FAST_TRY(cudaSetDevice(device));
  if (plan->team < 1) return cudaErrorInvalidValue;
  DtoRows rows_copy = *rows;
  DtoPlan plan_copy = *plan;
  void* arguments[] = {&rows_copy, &plan_copy};
  return launch_cooperative(kernel_for(plan->kept), arguments, *rows, *plan, kThreads, sizeof(LogitsShared), stream);
}
