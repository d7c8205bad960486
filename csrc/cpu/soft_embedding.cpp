#include "../checks.h"
#include "operators.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/empty.h>

#include <limits>
#include <numeric>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// The mixtures of all rows, by passes over the vocabulary.
template <typename acc_t>
Tensor mixtures(PassInput input, int64_t rows, const Tensor& hidden) {
  const auto options = at::dtype(c10::CppTypeToScalarType<acc_t>::value);
  Tensor mixture = at::empty({rows, input.values.size(1)}, options);
  for (int64_t begin = 0; begin < rows; begin += kRowsPerPass) {
    const int64_t count = std::min(kRowsPerPass, rows - begin);
    input.rows.resize(count);
    std::iota(input.rows.begin(), input.rows.end(), begin);
    if (hidden.defined()) input.hidden = hidden.narrow(0, begin, count);
    const PassOutput output = vocabulary_pass<acc_t>(input);
    for (int64_t i = 0; i < count; ++i) {
      const RowState& state = output.states[i];
      const bool defined = !state.undefined && state.sum > 0;
      const double nan = std::numeric_limits<double>::quiet_NaN();
      mixture[begin + i].copy_(output.mixture[i]).mul_(defined ? 1 / state.sum : nan);
    }
  }
  return mixture;
}

}  // namespace

Tensor soft_embedding(const Tensor& z, const Tensor& table, double tau) {
  const Check check("soft_embedding");
  check.logits(z);
  check.table(table, "table", z.size(1), "d_k");
  check.inverse_of(tau);
  PassInput input;
  input.vocabulary = z.size(1);
  input.z = z;
  input.tau = tau;
  input.values = table;
  const bool exact = z.scalar_type() == at::kDouble;
  return exact ? mixtures<double>(input, z.size(0), {}) : mixtures<float>(input, z.size(0), {});
}

Tensor linear_soft_embedding(const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& table,
                             double tau) {
  const Check check("linear_soft_embedding");
  check.product(h, "h", weight, "weight");
  check.table(table, "table", weight.size(0), "d_k");
  check.inverse_of(tau);
  const bool exact = h.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  PassInput input;
  input.vocabulary = weight.size(0);
  input.weight = weight;
  input.scale = scale;
  input.softcap = softcap;
  input.tau = tau;
  input.values = table;
  return exact ? mixtures<double>(input, h.size(0), h) : mixtures<float>(input, h.size(0), h);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
