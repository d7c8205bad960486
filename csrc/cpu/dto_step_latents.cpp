#include "adam.h"
#include "dto_step.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <type_traits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Entries of G (N, V) that are kept from step to step: 256 MiB of float32, 512 MiB of float64.
constexpr int64_t kMostGradient = int64_t(1) << 26;
// Entries of the logits (rows, V) that are kept between two passes, where those are not of one panel.
constexpr int64_t kMostLogits = int64_t(1) << 25;
// Steps from which on `Gradients::keep_base` pays.
constexpr int64_t kFewestFromBase = 3;
// Fewer rows are worked on at the speed at which the head is read, and two passes read it twice.
constexpr int64_t kFewestForTwoPasses = 16;

PassInput pass_input(const DtoProblem& problem, const std::vector<int64_t>& rows) {
  const at::Tensor index =
      at::from_blob(const_cast<int64_t*>(rows.data()), {static_cast<int64_t>(rows.size())}, at::kLong);
  PassInput input(problem.weight, problem.scale, problem.softcap, problem.tau);
  input.rows = rows;
  input.hidden = problem.parameters.index_select(0, index);
  if (problem.base.defined()) {
    input.hidden = input.hidden.sub(problem.start.index_select(0, index)).to(at::kBFloat16);
    input.base = problem.base;
    input.base_alone = problem.at_start;
  }
  input.soft_noise = problem.soft_noise;
  input.hard_noise = problem.hard_noise;
  return input;
}

void set_tokens(DtoProblem& problem, const std::vector<int64_t>& rows, const std::vector<State>& states) {
  for (size_t i = 0; i < rows.size(); ++i) problem.current[rows[i]] = states[i].defined() ? states[i].token : -1;
}

// Rows `from` (n, d), before the head's scale, to `rows` of dL/dh (N, d).
template <typename acc_t>
void write_rows(const at::Tensor& from, const std::vector<int64_t>& rows, double scale, const at::Tensor& gradients) {
  const int64_t d = gradients.size(1);
  const at::Tensor scaled = from.mul(scale);
  const acc_t* source = scaled.template const_data_ptr<acc_t>();
  for (size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(source + i * d, d, gradients.template mutable_data_ptr<acc_t>() + rows[i] * d);
  }
}

// Whether one row goes by the pass that is made for one.
template <typename acc_t>
bool goes_alone(const DtoProblem& problem, const std::vector<int64_t>& rows) {
  return std::is_same_v<acc_t, float> && rows.size() == 1 && latents_row_fits(problem);
}

void pass_alone(DtoProblem& problem, int64_t row, float* gradient) {
  const float* hidden = problem.parameters.const_data_ptr<float>() + row * problem.parameters.size(1);
  problem.current[row] = latents_row_pass(problem, {row, hidden, problem.tokens[row], gradient});
}

// Sets `current` of the rows.
template <typename acc_t>
void find_tokens(DtoProblem& problem, const std::vector<int64_t>& rows) {
  if (goes_alone<acc_t>(problem, rows)) return pass_alone(problem, rows[0], nullptr);
  each_pass(static_cast<int64_t>(rows.size()), [&](int64_t first, int64_t count) {
    const std::vector<int64_t> block(rows.begin() + first, rows.begin() + first + count);
    set_tokens(problem, block, vocabulary_pass<acc_t>(pass_input(problem, block)).states);
  });
}

// The same, and their rows of dL/dh (N, d).
template <typename acc_t>
void one_pass(DtoProblem& problem, const std::vector<int64_t>& rows, const at::Tensor& gradients) {
  PassInput input = pass_input(problem, rows);
  input.gradient = problem.gradient;
  input.terms = select_terms(problem.terms, rows);
  input.values = problem.weight;
  input.through_cap = true;
  const PassOutput<acc_t> output = vocabulary_pass<acc_t>(input);
  set_tokens(problem, rows, output.states);
  write_rows<acc_t>(hidden_gradient<acc_t>(output, problem.tau), rows, problem.scale, gradients);
}

// The same with a dense G, but for rows whose groups may not move on from these tokens. `logits` is for `kept`.
template <typename acc_t>
void two_passes(DtoProblem& problem, const std::vector<int64_t>& rows, const at::Tensor& logits,
                const at::Tensor& gradients) {
  PassInput input = pass_input(problem, rows);
  input.gradient = problem.gradient;
  input.values = problem.weight;
  input.through_cap = true;
  input.kept = logits;
  const std::vector<State> states = vocabulary_pass<acc_t>(input).states;
  set_tokens(problem, rows, states);
  std::vector<int64_t> chosen;
  std::vector<int64_t> moving;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!problem.may_move(problem.group_of(rows[i]))) continue;
    chosen.push_back(static_cast<int64_t>(i));
    moving.push_back(rows[i]);
  }
  if (moving.empty()) return;
  write_rows<acc_t>(kept_gradient<acc_t>(input, states, chosen), moving, problem.scale, gradients);
}

// Tokens and gradients of the rows that may move.
template <typename acc_t>
class Gradients {
 public:
  explicit Gradients(DtoProblem& problem) : values(at::empty_like(problem.parameters)), problem_(problem) {}

  void find(const std::vector<int64_t>& rows) {
    if (!problem_.gradient.defined()) keep_gradient(rows);
    if (goes_alone<acc_t>(problem_, rows)) {
      const int64_t row = rows[0];
      return pass_alone(problem_, row, values.template mutable_data_ptr<float>() + row * values.size(1));
    }
    const auto n = static_cast<int64_t>(rows.size());
    const bool twice = problem_.gradient.defined() && n >= kFewestForTwoPasses;
    int64_t most = kRowsPerPass;
    if (twice) {
      if (!problem_.base.defined()) keep_base(rows);
      most = std::clamp(kMostLogits / problem_.vocabulary / kPanel * kPanel, kPanel, kRowsPerPass);
      if (!logits_.defined()) {
        logits_ = at::empty({kept_size(std::min(most, n), problem_.vocabulary)}, problem_.parameters.options());
      }
    }
    for (int64_t first = 0; first < n; first += most) {
      const std::vector<int64_t> block(rows.begin() + first, rows.begin() + std::min(first + most, n));
      twice ? two_passes<acc_t>(problem_, block, logits_, values) : one_pass<acc_t>(problem_, block, values);
    }
    problem_.at_start = false;
  }

  at::Tensor values;  // dL/dh (N, d)

 private:
  // G does not change from step to step: where it fits in, and another step may follow, it is made once.
  void keep_gradient(const std::vector<int64_t>& rows) {
    const auto size = static_cast<int64_t>(problem_.tokens.size()) * problem_.vocabulary;
    if (problem_.max_steps < 2 || size > kMostGradient) return;
    at::Tensor gradient = at::empty({values.size(0), problem_.vocabulary}, problem_.parameters.options());
    write_gradient<acc_t>(problem_.vocabulary, select_terms(problem_.terms, rows), rows, gradient);
    problem_.gradient = gradient;
    problem_.terms.clear();
  }

  // Beside a bfloat16 head the products of all further steps are those of how far the latents have moved, in bfloat16:
  // what rounding loses is a part of the movement, not of the logits. Weights are rounded with it (`rounds_factors`).
  void keep_base(const std::vector<int64_t>& rows) {
    const auto size = static_cast<int64_t>(problem_.tokens.size()) * problem_.vocabulary;
    if (std::is_same_v<acc_t, double> || problem_.max_steps < kFewestFromBase || size > kMostGradient) return;
    if (!rounds_factors(at::kBFloat16, Matrix(problem_.weight))) return;
    problem_.start = problem_.parameters.clone();
    problem_.at_start = true;
    problem_.base = at::empty({values.size(0), problem_.vocabulary}, problem_.parameters.options());
    write_gradient<acc_t>(problem_.vocabulary, select_terms({{problem_.start, problem_.weight}}, rows), rows,
                          problem_.base);
  }

  DtoProblem& problem_;
  at::Tensor logits_;
};

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
  Gradients<acc_t> gradients(problem);
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
    if (!resting.empty()) find_tokens<acc_t>(problem, resting);
    if (moving.empty()) return;
    gradients.find(moving);
    for (const size_t group : moving_groups) {
      const bool moves = problem.may_move(group);
      if (moves) step_group(problem, group, gradients.values.template const_data_ptr<acc_t>());
      for (int64_t row = problem.groups[group]; row < problem.groups[group + 1]; ++row) known[row] = !moves;
    }
  }
}

template void step_latents<float>(DtoProblem&);
template void step_latents<double>(DtoProblem&);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
