#include "adam.h"
#include "dto_step.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>

#include <type_traits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Sets `current` of the rows and, where `hidden_gradients` (N, d) is defined, their rows of it.
template <typename acc_t>
void pass_block(DtoProblem& problem, const std::vector<int64_t>& rows, const at::Tensor& hidden_gradients) {
  const int64_t d = problem.parameters.size(1);
  if constexpr (std::is_same_v<acc_t, float>) {
    if (rows.size() == 1 && latents_row_fits(problem)) {
      const int64_t row = rows[0];
      float* gradient = hidden_gradients.defined() ? hidden_gradients.mutable_data_ptr<float>() + row * d : nullptr;
      const LatentsRow work{row, problem.parameters.const_data_ptr<float>() + row * d, problem.tokens[row], gradient};
      problem.current[row] = latents_row_pass(problem, work);
      return;
    }
  }
  const at::Tensor index =
      at::from_blob(const_cast<int64_t*>(rows.data()), {static_cast<int64_t>(rows.size())}, at::kLong);
  PassInput input;
  input.rows = rows;
  input.hidden = problem.parameters.index_select(0, index);
  input.weight = problem.weight;
  input.scale = problem.scale;
  input.softcap = problem.softcap;
  input.soft_noise = problem.soft_noise;
  input.hard_noise = problem.hard_noise;
  input.tau = problem.tau;
  if (hidden_gradients.defined()) {
    input.gradient = problem.gradient;
    input.terms = select_terms(problem.terms, rows);
    input.values = problem.weight;
    input.through_cap = true;
  }
  const PassOutput<acc_t> output = vocabulary_pass<acc_t>(input);
  for (size_t i = 0; i < rows.size(); ++i) {
    problem.current[rows[i]] = output.states[i].defined() ? output.states[i].token : -1;
  }
  if (!hidden_gradients.defined()) return;
  const at::Tensor gradients = hidden_gradient<acc_t>(output, problem.tau).mul(problem.scale);
  const acc_t* from = gradients.template const_data_ptr<acc_t>();
  acc_t* to = hidden_gradients.template mutable_data_ptr<acc_t>();
  for (size_t i = 0; i < rows.size(); ++i) std::copy_n(from + i * d, d, to + rows[i] * d);
}

template <typename acc_t>
void pass(DtoProblem& problem, const std::vector<int64_t>& rows, const at::Tensor& hidden_gradients) {
  each_pass(static_cast<int64_t>(rows.size()), [&](int64_t first, int64_t count) {
    pass_block<acc_t>(problem, {rows.begin() + first, rows.begin() + first + count}, hidden_gradients);
  });
}

// Adam for every row of the group.
template <typename acc_t>
void step_group(DtoProblem& problem, size_t group, const acc_t* gradients) {
  const int64_t d = problem.parameters.size(1);
  for (int64_t row = problem.groups[group]; row < problem.groups[group + 1]; ++row) {
    const double rate = problem.rates[problem.step[row]];
    Adam<acc_t>(++problem.step[row], rate, problem.weight_decay)
        .update(problem.parameters.mutable_data_ptr<acc_t>() + row * d,
                problem.exp_avg.mutable_data_ptr<acc_t>() + row * d,
                problem.exp_avg_sq.mutable_data_ptr<acc_t>() + row * d, gradients + row * d, d);
  }
}

}  // namespace

template <typename acc_t>
void step_latents(DtoProblem& problem) {
  const auto rows = static_cast<int64_t>(problem.tokens.size());
  const size_t groups = problem.groups.size() - 1;
  at::Tensor gradients = at::empty_like(problem.parameters);
  // Whether `current` belongs to the parameters. A group that may move learns that by the pass that makes its gradient;
  // until then its tokens are assumed to be unchanged.
  std::vector<bool> known(rows, false);
  problem.current = problem.tokens;
  for (int64_t i = 0;; ++i) {
    std::vector<int64_t> moving;
    std::vector<int64_t> resting;
    std::vector<size_t> moving_groups;
    for (size_t group = 0; group < groups; ++group) {
      const bool moves = i < problem.max_steps && problem.may_move(group);
      if (moves) moving_groups.push_back(group);
      for (int64_t row = problem.groups[group]; row < problem.groups[group + 1]; ++row) {
        if (moves) {
          moving.push_back(row);
        } else if (!known[row]) {
          resting.push_back(row);
          known[row] = true;
        }
      }
    }
    pass<acc_t>(problem, resting, at::Tensor());
    if (moving.empty()) return;
    pass<acc_t>(problem, moving, gradients);
    for (const size_t group : moving_groups) {
      const bool moves = problem.may_move(group);
      if (moves) step_group(problem, group, gradients.const_data_ptr<acc_t>());
      for (int64_t row = problem.groups[group]; row < problem.groups[group + 1]; ++row) known[row] = !moves;
    }
  }
}

template void step_latents<float>(DtoProblem&);
template void step_latents<double>(DtoProblem&);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
