// Passes over the vocabulary for several rows, a tile at a time. One pass is identity (b) of the design, and no (rows,
// V) tensor exists. Two passes with the logits kept in between multiply one weight with the values where one pass has
// to multiply two, e and e G.
#pragma once

#include "online_softmax.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <numeric>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

// A summand of the gradient over the vocabulary: vectors (n, d_k) times table^T (V, d_k). `softcap` caps the product.
struct GradientTerm {
  at::Tensor vectors;
  at::Tensor table;
  double softcap = 0;
  double factor = 1;  // on the capped product; without a cap it is cheaper in the vectors, but for those of bfloat16
};

struct PassInput {
  PassInput(const at::Tensor& z, double tau) : z(z), tau(tau) {}
  PassInput(const at::Tensor& weight, double scale, double softcap, double tau)
      : weight(weight), scale(scale), softcap(softcap), tau(tau) {}

  int64_t vocabulary() const { return z.defined() ? z.size(1) : weight.size(0); }

  std::vector<int64_t> rows;  // n of them: which rows of the (N, V) tensors below
  at::Tensor z;               // (N, V) logits, or undefined:
  at::Tensor hidden;          // (n, d)
  at::Tensor weight;          // (V, d)
  at::Tensor base;            // (N, V) what is added to hidden weight^T before scale and cap, or undefined
  bool base_alone = false;    // since hidden is all zeros
  double scale = 1;           // of hidden weight^T
  double softcap = 0;
  at::Tensor soft_noise;            // (N, V) or undefined
  at::Tensor hard_noise;            // (N, V) or undefined
  at::Tensor gradient;              // dense G (N, V), or undefined
  std::vector<GradientTerm> terms;  // or G as terms
  double tau;
  at::Tensor values;         // (V, k): what is summed with the weights e; undefined for the tokens alone
  bool through_cap = false;  // weights carry the derivative of the softcap
  // Without noise and gradient: of every row the likeliest entry, which is the hard token, is left out of all sums.
  // Those of the others keep their digits where it holds nearly all of the weight.
  bool apart = false;
  // (kept_size) of acc_t: the first of two passes leaves the logits there, for the second. Then it sums no values.
  at::Tensor kept;
};

inline std::vector<int64_t> row_numbers(int64_t first, int64_t last) {
  std::vector<int64_t> rows(last - first);
  std::iota(rows.begin(), rows.end(), first);
  return rows;
}

template <typename acc_t>
struct PassOutput {
  std::vector<State> states;  // x = logit + soft noise, hard values = logit + hard noise
  int64_t width;              // k
  // (n, k) sums of e * values; with a gradient (n, k) sums of e (G - reference) * values before them.
  std::vector<acc_t> sums;
};

template <typename acc_t>
PassOutput<acc_t> vocabulary_pass(const PassInput& input);

// dL/d(hidden) before the head's scale, (n, k), from a pass with a gradient; rows without a softmax are NaN.
template <typename acc_t>
at::Tensor hidden_gradient(const PassOutput<acc_t>& output, double tau);

// Entries that the logits of `rows` rows take between two passes.
int64_t kept_size(int64_t rows, int64_t vocabulary);

// The second of two passes: `hidden_gradient`, for the `chosen` of the first pass's rows, which the states are of.
template <typename acc_t>
at::Tensor kept_gradient(const PassInput& input, const std::vector<State>& states, const std::vector<int64_t>& chosen);

// G from terms (n rows), written to `rows` of out (N, V).
template <typename acc_t>
void write_gradient(int64_t vocabulary, const std::vector<GradientTerm>& terms, const std::vector<int64_t>& rows,
                    const at::Tensor& out);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
