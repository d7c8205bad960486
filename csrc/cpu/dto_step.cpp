#include "dto_step.h"

#include "operators.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

void check_rows(const at::Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, "dto_step: ", name,
              " must have shape (", rows, ", ", columns, "), got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.is_floating_point(), "dto_step: ", name, " must be a float tensor, got ",
                   tensor.scalar_type());
}

std::vector<int64_t> integers(const at::Tensor& tensor, const char* name, int64_t rows) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows, "dto_step: ", name, " must have shape (", rows, "), got ",
              tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, "dto_step: ", name, " must be int64, got ",
                   tensor.scalar_type());
  const at::Tensor contiguous = tensor.contiguous();
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  return {data, data + rows};
}

std::vector<int64_t> group_starts(const std::optional<at::Tensor>& group, int64_t rows) {
  std::vector<int64_t> starts;
  const std::vector<int64_t> ids = group ? integers(*group, "group", rows) : std::vector<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    if (group && row > 0 && ids[row] == ids[row - 1]) continue;
    TORCH_CHECK_VALUE(!group || row == 0 || ids[row] > ids[row - 1], "dto_step: group must ascend, got ",
                      group ? ids[row] : 0, " after ", group && row ? ids[row - 1] : 0);
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
  const auto add = [&](const at::Tensor& vectors, const at::Tensor& where, double factor, double softcap) {
    at::Tensor scaled = vectors.to(dtype).mul(softcap ? problem.scale : factor);
    terms.push_back({scaled.contiguous(), where, softcap, softcap ? factor : 1.0});
  };
  add(embedding, table, 1, 0);
  add(reward_embedding, reward_table, 1, 0);
  if (nll_coeff != 0) {
    add(hidden, problem.weight, problem.softcap ? -nll_coeff : -nll_coeff * problem.scale, problem.softcap);
  }
  return terms;
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

std::tuple<Tensor, Tensor> dto_step(const Tensor& parameters, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                                    const Tensor& step, const Tensor& tokens, const Tensor& learning_rates,
                                    const std::optional<Tensor>& gradient, const std::optional<Tensor>& hidden,
                                    const std::optional<Tensor>& embedding,
                                    const std::optional<Tensor>& reward_embedding, const Tensor& weight,
                                    const Tensor& embedding_table, const Tensor& reward_table, double scale,
                                    double softcap, double nll_coeff, bool latents, double tau, double weight_decay,
                                    const std::optional<Tensor>& soft_noise, const std::optional<Tensor>& hard_noise,
                                    const std::optional<Tensor>& group, int64_t max_steps) {
  TORCH_CHECK(parameters.dim() == 2 && weight.dim() == 2, "dto_step: parameters and the head's weight must have two ",
              "dimensions, got ", parameters.sizes(), " and ", weight.sizes());
  const int64_t rows = parameters.size(0);
  const auto dtype = parameters.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "dto_step: parameters must be float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(tau > 0 && std::isnormal(static_cast<float>(1 / tau)), "dto_step: tau must be positive, got ", tau);
  TORCH_CHECK_VALUE(max_steps >= 0, "dto_step: max_steps must not be negative, got ", max_steps);
  TORCH_CHECK(weight.size(0) > 0, "dto_step: the head must have at least one vocabulary entry, got ", weight.sizes());

  DtoProblem problem;
  problem.vocabulary = weight.size(0);
  check_rows(parameters, "parameters", rows, latents ? weight.size(1) : problem.vocabulary);
  for (const Tensor* moment : {&exp_avg, &exp_avg_sq}) {
    check_rows(*moment, "exp_avg and exp_avg_sq", rows, parameters.size(1));
    TORCH_CHECK_TYPE(moment->scalar_type() == dtype, "dto_step: exp_avg and exp_avg_sq must be ", dtype, ", got ",
                     moment->scalar_type());
  }
  problem.parameters = parameters.contiguous();
  problem.exp_avg = exp_avg.contiguous();
  problem.exp_avg_sq = exp_avg_sq.contiguous();
  problem.step = integers(step, "step", rows);
  problem.tokens = integers(tokens, "tokens", rows);
  problem.current.assign(rows, -1);
  problem.groups = group_starts(group, rows);
  problem.max_steps = max_steps;
  problem.weight = weight;
  problem.scale = scale;
  problem.softcap = softcap;
  problem.tau = tau;
  problem.weight_decay = weight_decay;
  const Tensor rates = learning_rates.contiguous();
  AT_DISPATCH_FLOATING_TYPES(rates.scalar_type(), "dto_step: learning_rates", [&] {
    problem.rates.assign(rates.const_data_ptr<scalar_t>(), rates.const_data_ptr<scalar_t>() + rates.numel());
  });
  for (const int64_t made : problem.step) {
    TORCH_CHECK_VALUE(made >= 0, "dto_step: step must not be negative, got ", made);
  }
  if (soft_noise) {
    check_rows(*soft_noise, "soft_noise", rows, problem.vocabulary);
    problem.soft_noise = *soft_noise;
  }
  if (hard_noise) {
    check_rows(*hard_noise, "hard_noise", rows, problem.vocabulary);
    problem.hard_noise = *hard_noise;
  }
  if (gradient) {
    check_rows(*gradient, "gradient", rows, problem.vocabulary);
    problem.gradient = *gradient;
  } else {
    TORCH_CHECK(hidden && embedding && reward_embedding, "dto_step: gradient must be dense or all three factors");
    check_rows(embedding_table, "the embedding table", problem.vocabulary, embedding_table.size(-1));
    check_rows(reward_table, "the reward embedding table", problem.vocabulary, reward_table.size(-1));
    check_rows(*hidden, "gradient.hidden", rows, weight.size(1));
    check_rows(*embedding, "gradient.embedding", rows, embedding_table.size(1));
    check_rows(*reward_embedding, "gradient.reward_embedding", rows, reward_table.size(1));
    problem.terms =
        gradient_terms(*hidden, *embedding, *reward_embedding, problem, embedding_table, reward_table, nll_coeff);
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
