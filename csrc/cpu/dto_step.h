// What the parts of dto_step share.
#pragma once

#include "vocabulary_pass.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

struct DtoProblem {
  // (N, d) or (N, V), contiguous; updated in place.
  at::Tensor parameters;
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  std::vector<int64_t> step;     // (N,) steps made so far; updated
  std::vector<int64_t> tokens;   // (N,) at which the gradient was taken
  std::vector<int64_t> current;  // (N,) result; -1 where a row has no argmax
  std::vector<double> rates;     // learning rate of every step
  std::vector<int64_t> groups;   // first row of each group, then N
  int64_t vocabulary;
  int64_t max_steps;
  at::Tensor weight;
  double scale;
  double softcap;
  double tau;
  double weight_decay;
  at::Tensor soft_noise;            // (N, V) or undefined
  at::Tensor hard_noise;            // (N, V) or undefined
  at::Tensor gradient;              // (N, V), or undefined:
  std::vector<GradientTerm> terms;  // G in terms
  at::Tensor start;                 // (N, d) latents, and
  at::Tensor base;                  // (N, V) their products with the head, where those of others are made from them
  bool at_start = false;            // the latents are there still

  // Whether the group may make a step: its tokens are as they were, as far as `current` knows, and no row has used up
  // its learning rates.
  bool may_move(size_t group) const {
    for (int64_t row = groups[group]; row < groups[group + 1]; ++row) {
      if (current[row] < 0 || current[row] != tokens[row]) return false;
      if (step[row] >= static_cast<int64_t>(rates.size())) return false;
    }
    return true;
  }

  // The group of a row.
  size_t group_of(int64_t row) const {
    return std::upper_bound(groups.begin(), groups.end(), row) - groups.begin() - 1;
  }
};

template <typename acc_t>
void step_latents(DtoProblem& problem);

template <typename acc_t>
void step_logits(DtoProblem& problem);

// The terms for some of the rows.
std::vector<GradientTerm> select_terms(const std::vector<GradientTerm>& terms, const std::vector<int64_t>& rows);

// One row of latents against a float32 or bfloat16 head, with the gradient dense.
struct LatentsRow {
  int64_t row;
  const float* hidden;     // (d,)
  int64_t token;           // a good guess of the likeliest token
  float* hidden_gradient;  // (d,) result; nullptr for the token alone
};

// Whether `latents_row_pass` can take the problem.
bool latents_row_fits(const DtoProblem& problem);

// The row's token, by one pass over the head that also makes dL/dh.
int64_t latents_row_pass(const DtoProblem& problem, const LatentsRow& row);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
