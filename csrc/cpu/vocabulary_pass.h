// One pass over the vocabulary for several rows: identity (b) of the design, a tile at a time, so that no (rows, V)
// tensor exists.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

// A summand of the gradient over the vocabulary: vectors (n, d_k) times table^T (V, d_k). `softcap` caps the product.
struct GradientTerm {
  at::Tensor vectors;
  at::Tensor table;
  double softcap = 0;
  double factor = 1;  // on the capped product; fold it into the vectors where there is no cap
};

// Of the vocabulary entries of one row that were seen so far. With x = logit + soft noise and e = exp((x - max) / tau).
struct RowState {
  double max = -std::numeric_limits<double>::infinity();  // of x
  double sum = 0;                                         // of e
  // G of the maximum. Sums are taken of G - reference: only differences of G matter, and where one token holds nearly
  // all of the weight, those of the others would drown in its rounding.
  double reference = 0;
  double gradient_sum = 0;                                 // of e (G - reference)
  double best = -std::numeric_limits<double>::infinity();  // of logit + hard noise
  int64_t token = -1;                                      // where `best` is, the lowest index of equals
  bool undefined = false;                                  // NaN or +inf seen, or no x above -inf in the end
};

// The factors that bring the sums of a state, and what was accumulated with them, to another maximum and reference.
struct Rescale {
  double factor;
  double shift;
};
Rescale raise_maximum(RowState& state, double max, double reference, double inverse_tau);

struct PassInput {
  int64_t vocabulary;
  std::vector<int64_t> rows;  // n of them: which rows of the (N, V) tensors below
  at::Tensor z;               // (N, V) logits, or undefined:
  at::Tensor hidden;          // (n, d)
  at::Tensor weight;          // (V, d)
  double scale = 1;           // of hidden weight^T
  double softcap = 0;
  at::Tensor soft_noise;            // (N, V) or undefined
  at::Tensor hard_noise;            // (N, V) or undefined
  at::Tensor gradient;              // dense G (N, V), or undefined
  std::vector<GradientTerm> terms;  // or G as terms
  double tau = 1;
  at::Tensor values;          // (V, k): what is summed with the weights e; undefined for the tokens alone
  bool through_cap = false;   // weights carry the derivative of the softcap
};

struct PassOutput {
  std::vector<RowState> states;
  at::Tensor mixture;   // (n, k) sum of e * values
  at::Tensor weighted;  // (n, k) sum of e * (G - reference) * values, with a gradient
};

template <typename acc_t>
PassOutput vocabulary_pass(const PassInput& input);

// dL/d(hidden) before the head's scale, (n, k), from a pass with a gradient; rows of undefined states are NaN.
template <typename acc_t>
at::Tensor hidden_gradient(const PassOutput& output, double tau);

// G of the rows written to out (rows, V), from terms.
template <typename acc_t>
void write_gradient(int64_t vocabulary, const std::vector<GradientTerm>& terms, const at::Tensor& out);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
