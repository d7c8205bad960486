// The functions of csrc/cuda/launchers.h on the emulated device, for nabla_fast/ops/cuda.py to call in their place.
// A device number stands for the shape of a team: blocks per row, times 2, plus 1 where threads may keep their entries;
// of latents it says how deep the ring of tiles is, too.
#include "device.h"
#include "dto_step_latents.cuh"
#include "dto_step_logits.cuh"
#include "token_diff.cuh"

using namespace nabla_fast::cuda;

namespace {

// Where the threads of a launch may meet. What scratch held before is nobody's business but the counters'.
Launch shape_of(const DtoRows& rows, const DtoPlan& plan, int64_t width, int64_t threads, int64_t shared_bytes) {
  const int64_t counters = counter_bytes(rows.rows);
  std::memset(rows.scratch, 0xff, static_cast<size_t>(plan.scratch_bytes));
  std::memset(rows.scratch, 0, static_cast<size_t>(counters));
  const auto state = [&](const char* name, const float* data, int64_t stride) {
    return Memory{name, data, 4 * ((rows.rows - 1) * stride + width), true};
  };
  return {static_cast<int>(rows.rows * plan.team),
          static_cast<int>(threads),
          shared_bytes,
          {{"scratch", static_cast<char*>(rows.scratch) + counters, plan.scratch_bytes - counters, false},
           state("parameters", rows.parameters, rows.parameters_stride),
           state("exp_avg", rows.exp_avg, rows.exp_avg_stride),
           state("exp_avg_sq", rows.exp_avg_sq, rows.exp_avg_sq_stride),
           {"step", rows.step, 8 * rows.rows, true},
           {"token", rows.token, 8 * rows.rows, false}}};
}

template <Weight kType, int kChunks>
int run_latents(const DtoRows& rows, const DtoHead& head, const DtoPlan& plan) {
  return launch(shape_of(rows, plan, head.hidden, plan.threads, latents_shared_bytes(plan.threads, plan.stages)),
                [&] { dto_latents_kernel<kType, kChunks>(rows, head, plan); });
}

template <Weight kType>
int run_latents_type(const DtoRows& rows, const DtoHead& head, const DtoPlan& plan) {
  switch (block_shape(kType, head.hidden).chunks) {
    case 1: return run_latents<kType, 1>(rows, head, plan);
    case 2: return run_latents<kType, 2>(rows, head, plan);
    case 4: return run_latents<kType, 4>(rows, head, plan);
    case 8:
      if constexpr (kType == Weight::kFloat32) return run_latents<kType, 8>(rows, head, plan);
  }
  return 1;
}

}  // namespace

extern "C" {

int nabla_fast_cuda_check(int) { return 0; }

const char* nabla_fast_cuda_error(int) { return last_mistake(); }

int nabla_fast_cuda_token_diff(const int64_t* old_tokens, int64_t old_row, int64_t old_column,
                               const int64_t* new_tokens, int64_t new_row, int64_t new_column, int64_t* first,
                               int64_t* count, int64_t rows, int64_t columns, int, void*) {
  const Tokens before{old_tokens, old_row, old_column}, after{new_tokens, new_row, new_column};
  return launch({static_cast<int>(rows), kDiffThreads, 2 * sizeof(long long) * (kDiffThreads / 32), {}},
                [&] { token_diff_kernel(before, after, first, count, columns); });
}

int nabla_fast_cuda_plan_latents(int64_t rows, int64_t, int64_t type, int64_t hidden, int device_number,
                                 DtoPlan* plan) {
  const int64_t team = device_number / 2, stages = kLeastStages + device_number % 3;
  const int64_t threads = block_shape(static_cast<Weight>(type), hidden).threads;
  const int64_t scratch = counter_bytes(rows) + rows * team * static_cast<int64_t>(sizeof(State) + 8 * hidden);
  *plan = {team, 0, threads, stages, scratch};
  return 0;
}

int nabla_fast_cuda_plan_logits(int64_t rows, int64_t vocabulary, int device_number, DtoPlan* plan) {
  const int64_t team = device_number / 2, slice = slice_size(vocabulary, team);
  const int64_t kept = device_number % 2 == 0 ? 0 : slice <= 4 * kThreads ? 4 : slice <= 12 * kThreads ? 12 : 0;
  *plan = {team, kept, 0, 0, counter_bytes(rows) + 2 * rows * team * static_cast<int64_t>(sizeof(State))};
  return 0;
}

int nabla_fast_cuda_dto_latents(const DtoRows* rows, const DtoHead* head, const DtoPlan* plan, int, void*) {
  switch (static_cast<Weight>(head->type)) {
    case Weight::kFloat32: return run_latents_type<Weight::kFloat32>(*rows, *head, *plan);
    case Weight::kBfloat16: return run_latents_type<Weight::kBfloat16>(*rows, *head, *plan);
    case Weight::kFloat16: return run_latents_type<Weight::kFloat16>(*rows, *head, *plan);
  }
  return 1;
}

int nabla_fast_cuda_dto_logits(const DtoRows* rows, const DtoPlan* plan, int, void*) {
  return launch(shape_of(*rows, *plan, rows->vocabulary, kThreads, sizeof(LogitsShared)), [&] {
    switch (plan->kept) {
      case 4: return dto_logits_kernel<4>(*rows, *plan);
      case 12: return dto_logits_kernel<12>(*rows, *plan);
      default: return dto_logits_kernel<0>(*rows, *plan);
    }
  });
}

}  // extern "C"
