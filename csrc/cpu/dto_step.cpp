#include "dto_step.h"
#include "../checks.h"

#include "operators.h"
#include "vocabulary_table.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <c10/util/Exception.h>

#include <iterator>
#include <utility>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

std::vector<int64_t> to_vector(const at::Tensor& integers) {
  const at::Tensor contiguous = integers.contiguous();
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  return {data, data + contiguous.numel()};
}

std::vector<int64_t> group_starts(const std::optional<at::Tensor>& group, int64_t rows) {
  std::vector<int64_t> starts;
  const std::vector<int64_t> ids = group ? to_vector(*group) : row_numbers(0, rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (row > 0 && ids[row] == ids[row - 1]) continue;
    TORCH_CHECK_VALUE(row == 0 || ids[row] > ids[row - 1], "dto_step: group must ascend, got ", ids[row], " after ",
                      ids[row - 1]);
    starts.push_back(row);
  }
  starts.push_back(rows);
  return starts;
}

// The factored gradient as terms; without a softcap the head's term is one more plain product.
std::vector<GradientTerm> gradient_terms(const at::Tensor& hidden, const at::Tensor& embedding,
                                         const at::Tensor& reward_embedding, const DtoProblem& problem,
                                         const at::Tensor& table, const at::Tensor& reward_table, double nll_coeff) {
  const auto dtype = problem.parameters.scalar_type();
  std::vector<GradientTerm> terms;
  const auto add = [&](const at::Tensor& vectors, const at::Tensor& where, double scale, double factor,
                       double softcap) {
    if (scale == 1 && dtype == at::kFloat && rounds_factors(vectors.scalar_type(), Matrix(where))) {
      // Nothing is rounded there, and the factor is not to be.
      terms.push_back({vectors, where, softcap, factor});
    } else {
      const at::Tensor scaled = vectors.to(dtype).mul(softcap ? scale : scale * factor);
      terms.push_back({scaled.contiguous(), where, softcap, softcap ? factor : 1.0});
    }
  };
  // Without the likelihood the head is not read, but a row whose hidden state is NaN is one without a gradient.
  const at::Tensor nothing = zero_or_nan(hidden).to(embedding.scalar_type()).unsqueeze(1);
  add(nll_coeff == 0 ? embedding.add(nothing) : embedding, table, 1, 1, 0);
  add(reward_embedding, reward_table, 1, 1, 0);
  if (nll_coeff != 0) add(hidden, problem.weight, problem.scale, -nll_coeff, problem.softcap);
  return terms;
}

// What is updated in place: shapes, and that no number has two meanings.
void check_state(const Check& check, const at::Tensor& parameters, const at::Tensor& exp_avg,
                 const at::Tensor& exp_avg_sq, const at::Tensor& step) {
  const std::pair<const at::Tensor&, const char*> moments[] = {{exp_avg, "exp_avg"}, {exp_avg_sq, "exp_avg_sq"}};
  for (const auto& [moment, name] : moments) {
    check.floats(moment, name, {parameters.size(0), parameters.size(1)});
    TORCH_CHECK_TYPE(moment.scalar_type() == parameters.scalar_type(), "dto_step: ", name, " must be ",
                     dtype_name(parameters), " as parameters are, got ", dtype_name(moment));
  }
  check.integers(step, "step", {parameters.size(0)});
  const std::pair<const at::Tensor&, const char*> written[] = {
      {parameters, "parameters"}, {exp_avg, "exp_avg"}, {exp_avg_sq, "exp_avg_sq"}, {step, "step"}};
  for (size_t i = 0; i < std::size(written); ++i) {
    const auto& [tensor, name] = written[i];
    TORCH_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, "dto_step: ", name,
                " must not be expanded, since it is updated in place, got strides ", tensor.strides());
    for (size_t j = 0; j < i; ++j) {
      const auto overlap = at::get_overlap_status(tensor, written[j].first);
      TORCH_CHECK(overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial, "dto_step: ", name,
                  " must not share memory with ", written[j].second, ", since both are updated in place");
    }
  }
}

void write_back(const at::Tensor& target, const at::Tensor& result) {
  if (!target.is_same(result)) target.copy_(result);
}

}  // namespace

std::vector<GradientTerm> select_terms(const std::vector<GradientTerm>& terms, const std::vector<int64_t>& rows) {
  const at::Tensor index =
      at::from_blob(const_cast<int64_t*>(rows.data()), {static_cast<int64_t>(rows.size())}, at::kLong);
  std::vector<GradientTerm> selected;
  for (const GradientTerm& term : terms) {
    selected.push_back({term.vectors.index_select(0, index), term.table, term.softcap, term.factor});
  }
  return selected;
}

TwoTensors dto_step NABLA_FAST_DTO_STEP_ARGUMENTS {
  const Check check("dto_step");
  check.table(weight, "weight", "V", "d");
  const int64_t vocabulary = weight.size(0);
  check.floats(parameters, "parameters", {"N", latents ? weight.size(1) : vocabulary});
  const int64_t rows = parameters.size(0);
  const auto dtype = parameters.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dto_step: parameters must be float32 or float64, got ",
                   dtype_name(parameters));
  check_state(check, parameters, exp_avg, exp_avg_sq, step);
  check.tokens(tokens, "tokens", rows, vocabulary);
  check.floats(learning_rates, "learning_rates", {"S"});
  if (group) check.integers(*group, "group", {rows});
  if (soft_noise) check.floats(*soft_noise, "soft_noise", {rows, vocabulary});
  if (hard_noise) check.floats(*hard_noise, "hard_noise", {rows, vocabulary});
  TORCH_CHECK(gradient.size() == 1 || gradient.size() == 3, "dto_step: gradient must be dense or three factors, got ",
              gradient.size(), " tensors");
  const bool dense = gradient.size() == 1;
  if (dense) {
    check.floats(gradient[0], "gradient", {rows, vocabulary});
  } else {
    check.table(embedding_table, "embedding_table", vocabulary, "d");
    check.table(reward_table, "reward_table", vocabulary, "d_r");
    check.floats(gradient[0], "hidden", {rows, weight.size(1)});
    check.floats(gradient[1], "embedding", {rows, embedding_table.size(1)});
    check.floats(gradient[2], "reward_embedding", {rows, reward_table.size(1)});
  }
  check.inverse_of(tau);
  TORCH_CHECK_VALUE(max_steps >= 0, "dto_step: max_steps must not be negative, got ", max_steps);

  DtoProblem problem;
  problem.vocabulary = vocabulary;
  problem.parameters = parameters.contiguous();
  problem.exp_avg = exp_avg.contiguous();
  problem.exp_avg_sq = exp_avg_sq.contiguous();
  problem.step = to_vector(step);
  problem.tokens = to_vector(tokens);
  problem.current.assign(rows, -1);
  problem.groups = group_starts(group, rows);
  problem.max_steps = max_steps;
  problem.weight = weight;
  problem.scale = scale;
  problem.softcap = softcap;
  problem.tau = tau;
  problem.weight_decay = weight_decay;
  const Tensor rates = learning_rates.to(at::kDouble).contiguous();
  problem.rates.assign(rates.const_data_ptr<double>(), rates.const_data_ptr<double>() + rates.numel());
  for (const int64_t made : problem.step) {
    TORCH_CHECK_VALUE(made >= 0, "dto_step: step must not be negative, got ", made);
  }
  if (soft_noise) problem.soft_noise = *soft_noise;
  if (hard_noise) problem.hard_noise = *hard_noise;
  if (dense) {
    problem.gradient = gradient[0];
  } else {
    problem.terms =
        gradient_terms(gradient[0], gradient[1], gradient[2], problem, embedding_table, reward_table, nll_coeff);
  }

  if (rows > 0) {
    if (dtype == at::kDouble) {
      latents ? step_latents<double>(problem) : step_logits<double>(problem);
    } else {
      latents ? step_latents<float>(problem) : step_logits<float>(problem);
    }
  }
  write_back(parameters, problem.parameters);
  write_back(exp_avg, problem.exp_avg);
  write_back(exp_avg_sq, problem.exp_avg_sq);
  Tensor current = at::empty({rows}, tokens.options());
  Tensor changed = at::empty({rows}, tokens.options().dtype(at::kBool));
  // Written by hand: for one row, every call of an operator costs as much as a hundredth of a step.
  auto* made = step.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    current.mutable_data_ptr<int64_t>()[row] = problem.current[row];
    changed.mutable_data_ptr<bool>()[row] = problem.current[row] != problem.tokens[row];
    made[row * step.stride(0)] = problem.step[row];
  }
  return {current, changed};
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
