#include "operators.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <numeric>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

void check(const Tensor& rows, const char* name, const Tensor& table, int64_t vocabulary, double tau) {
  TORCH_CHECK(rows.dim() == 2, "soft_embedding: ", name, " must have two dimensions, got ", rows.sizes());
  TORCH_CHECK(table.dim() == 2 && table.size(0) == vocabulary && vocabulary > 0, "soft_embedding: table must have ",
              vocabulary, " rows and at least one, got ", table.sizes());
  TORCH_CHECK_VALUE(tau > 0 && std::isnormal(static_cast<float>(1 / tau)), "soft_embedding: tau must be positive, got ",
                    tau);
}

// The mixtures and log-sum-exps of all rows, by passes over the vocabulary.
template <typename acc_t>
std::tuple<Tensor, Tensor> mixtures(PassInput input, int64_t rows, const Tensor& hidden) {
  const auto options = at::dtype(c10::CppTypeToScalarType<acc_t>::value);
  Tensor mixture = at::empty({rows, input.values.size(1)}, options);
  Tensor lse = at::empty({rows}, options);
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
      lse.mutable_data_ptr<acc_t>()[begin + i] =
          static_cast<acc_t>(defined ? state.max / input.tau + std::log(state.sum) : nan);
    }
  }
  return {mixture, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> soft_embedding(const Tensor& z, const Tensor& table, double tau) {
  check(z, "z", table, z.size(-1), tau);
  PassInput input;
  input.vocabulary = z.size(1);
  input.z = z;
  input.tau = tau;
  input.values = table;
  const bool exact = z.scalar_type() == at::kDouble;
  return exact ? mixtures<double>(input, z.size(0), {}) : mixtures<float>(input, z.size(0), {});
}

std::tuple<Tensor, Tensor> linear_soft_embedding(const Tensor& h, const Tensor& weight, double scale, double softcap,
                                                 const Tensor& table, double tau) {
  check(h, "h", table, weight.size(0), tau);
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == h.size(1), "linear_soft_embedding: h and weight must share their ",
              "last dimension, got ", h.sizes(), " and ", weight.sizes());
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
