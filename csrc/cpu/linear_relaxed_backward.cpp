#include "../checks.h"
#include "operators.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/empty.h>

#include <numeric>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

template <typename acc_t>
Tensor backward(PassInput input, const Tensor& hidden, const std::vector<GradientTerm>& terms) {
  const int64_t rows = hidden.size(0);
  Tensor result = at::empty(hidden.sizes(), hidden.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  for (int64_t begin = 0; begin < rows; begin += kRowsPerPass) {
    const int64_t count = std::min(kRowsPerPass, rows - begin);
    input.rows.resize(count);
    std::iota(input.rows.begin(), input.rows.end(), begin);
    input.hidden = hidden.narrow(0, begin, count);
    input.terms.clear();
    for (const GradientTerm& term : terms) {
      input.terms.push_back({term.vectors.narrow(0, begin, count), term.table});
    }
    result.narrow(0, begin, count).copy_(hidden_gradient<acc_t>(vocabulary_pass<acc_t>(input), input.tau));
  }
  return result;
}

}  // namespace

Tensor linear_relaxed_backward(const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& lse,
                               at::TensorList vectors, at::TensorList tables, double tau) {
  const Check check("linear_relaxed_backward");
  check.product(h, "h", weight, "weight");
  // Only looked at: the pass takes the sum anew, and a log-sum-exp of large logits is rounded too far to normalise with.
  check.floats(lse, "lse", {h.size(0)});
  check.vectors_and_tables(vectors, tables, h.size(0), weight.size(0));
  check.inverse_of(tau);
  const bool exact = h.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  std::vector<GradientTerm> terms;
  for (size_t i = 0; i < tables.size(); ++i) {
    terms.push_back({rounded_beside(tables[i], vectors[i], h.scalar_type()), tables[i]});
  }
  PassInput input;
  input.vocabulary = weight.size(0);
  input.weight = weight;
  input.scale = scale;
  input.softcap = softcap;
  input.tau = tau;
  input.values = weight;
  input.through_cap = true;
  return (exact ? backward<double>(input, h, terms) : backward<float>(input, h, terms)).mul_(scale);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
