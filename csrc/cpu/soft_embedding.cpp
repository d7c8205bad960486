#include "../checks.h"
#include "operators.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/empty.h>

#include <cmath>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// The mixtures of all rows, by passes over the vocabulary.
template <typename acc_t>
Tensor mixtures(PassInput input, int64_t rows, const Tensor& hidden) {
  const auto options = at::dtype(c10::CppTypeToScalarType<acc_t>::value);
  Tensor mixture = at::empty({rows, input.values.size(1)}, options);
  acc_t* out = mixture.mutable_data_ptr<acc_t>();
  each_pass(rows, [&](int64_t begin, int64_t count) {
    input.rows = row_numbers(begin, begin + count);
    if (hidden.defined()) input.hidden = hidden.narrow(0, begin, count);
    const PassOutput<acc_t> output = vocabulary_pass<acc_t>(input);
    for (int64_t i = 0; i < count; ++i) {
      const State& state = output.states[i];
      const auto factor = static_cast<acc_t>(state.defined() ? 1 / state.sum_exp : std::nan(""));
      for (int64_t at = i * output.width; at < (i + 1) * output.width; ++at) {
        out[begin * output.width + at] = output.sums[at] * factor;
      }
    }
  });
  return mixture;
}

}  // namespace

Tensor soft_embedding(const Tensor& z, const Tensor& table, double tau) {
  const Check check("soft_embedding");
  check.logits(z);
  check.table(table, "table", z.size(1), "d_k");
  check.inverse_of(tau);
  PassInput input(z, tau);
  input.values = table;
  return any_double({z}) ? mixtures<double>(input, z.size(0), {}) : mixtures<float>(input, z.size(0), {});
}

Tensor linear_soft_embedding(const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& table,
                             double tau) {
  const Check check("linear_soft_embedding");
  check.product(h, "h", weight, "weight");
  check.table(table, "table", weight.size(0), "d_k");
  check.inverse_of(tau);
  PassInput input(weight, scale, softcap, tau);
  input.values = table;
  return any_double({h, weight}) ? mixtures<double>(input, h.size(0), h) : mixtures<float>(input, h.size(0), h);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
