// The functions of csrc/cuda/launchers.h on the emulated device, for nabla_fast/ops/cuda.py to call in their place.
// A device number stands for the shape of a team: blocks per row, times 2, plus 1 for a cluster.
#include "device.h"
#include "dto_step_latents.cuh"
#include "dto_step_logits.cuh"
#include "token_diff.cuh"

using namespace nabla_fast::cuda;

namespace {

unsigned seed = 0;

template <Weight kType, int kChunks>
void run_latents(const DtoRows& rows, const DtoHead& head, const DtoPlan& plan) {
  launch(static_cast<int>(rows.rows * plan.team), kThreads, 1, sizeof(LatentsShared), ++seed,
         [&] { dto_latents_kernel<kType, kChunks>(rows, head, plan); });
}

template <Weight kType>
void run_latents_type(const DtoRows& rows, const DtoHead& head, const DtoPlan& plan) {
  const int64_t one = kThreads * Shape<kType, 1>::kColumns;
  if (head.hidden <= one) {
    run_latents<kType, 1>(rows, head, plan);
  } else if (head.hidden <= 2 * one) {
    run_latents<kType, 2>(rows, head, plan);
  } else if constexpr (kType == Weight::kFloat32) {
    run_latents<kType, 4>(rows, head, plan);
  }
}

}  // namespace

extern "C" {

int nabla_fast_cuda_check(int) { return 0; }

const char* nabla_fast_cuda_error(int) { return "emulated error"; }

int nabla_fast_cuda_token_diff(const int64_t* old_tokens, int64_t old_row, int64_t old_column,
                               const int64_t* new_tokens, int64_t new_row, int64_t new_column, int64_t* first,
                               int64_t* count, int64_t rows, int64_t columns, int, void*) {
  const Tokens before{old_tokens, old_row, old_column}, after{new_tokens, new_row, new_column};
  launch(static_cast<int>(rows), kDiffThreads, 1, 2 * sizeof(long long) * (kDiffThreads / 32), ++seed,
         [&] { token_diff_kernel(before, after, first, count, columns); });
  return 0;
}

int nabla_fast_cuda_plan_latents(int64_t rows, int64_t, int64_t, int64_t hidden, int device_number, DtoPlan* plan) {
  const int64_t team = device_number / 2;
  *plan = {team, 0, 0, counter_bytes(rows) + rows * team * static_cast<int64_t>(sizeof(Part) + 8 * hidden)};
  return 0;
}

int nabla_fast_cuda_plan_logits(int64_t rows, int64_t, int device_number, DtoPlan* plan) {
  const int64_t team = device_number / 2, cluster = device_number % 2;
  *plan = {team, cluster, rows % 2, counter_bytes(rows) + 2 * rows * team * static_cast<int64_t>(sizeof(Part))};
  return 0;
}

int nabla_fast_cuda_dto_latents(const DtoRows* rows, const DtoHead* head, const DtoPlan* plan, int, void*) {
  std::memset(rows->scratch, 0, static_cast<size_t>(counter_bytes(rows->rows)));
  switch (static_cast<Weight>(head->type)) {
    case Weight::kFloat32:
      run_latents_type<Weight::kFloat32>(*rows, *head, *plan);
      break;
    case Weight::kBfloat16:
      run_latents_type<Weight::kBfloat16>(*rows, *head, *plan);
      break;
    case Weight::kFloat16:
      run_latents_type<Weight::kFloat16>(*rows, *head, *plan);
      break;
  }
  return 0;
}

int nabla_fast_cuda_dto_logits(const DtoRows* rows, const DtoPlan* plan, int, void*) {
  std::memset(rows->scratch, 0, static_cast<size_t>(counter_bytes(rows->rows)));
  const int blocks = static_cast<int>(rows->rows * plan->team);
  if (plan->cluster) {
    const int64_t bytes =
        logits_shared_bytes(plan->chip_gradient ? 4 : 3, slice_size(rows->vocabulary, plan->team));
    launch(blocks, kThreads, static_cast<int>(plan->team), bytes, ++seed,
           [&] { dto_logits_kernel<true>(*rows, *plan); });
  } else {
    launch(blocks, kThreads, 1, sizeof(LogitsShared), ++seed, [&] { dto_logits_kernel<false>(*rows, *plan); });
  }
  return 0;
}

}  // extern "C"
