#include "operators.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <numeric>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

template <typename acc_t>
Tensor backward(PassInput input, const Tensor& hidden, const Tensor& lse, const Tensor& mean,
                const std::vector<GradientTerm>& terms) {
  const int64_t rows = hidden.size(0);
  Tensor result = at::empty(hidden.sizes(), hidden.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  const Tensor log_sums = lse.to(at::kDouble).contiguous();
  for (int64_t begin = 0; begin < rows; begin += kRowsPerPass) {
    const int64_t count = std::min(kRowsPerPass, rows - begin);
    input.rows.resize(count);
    std::iota(input.rows.begin(), input.rows.end(), begin);
    input.hidden = hidden.narrow(0, begin, count);
    input.terms.clear();
    for (const GradientTerm& term : terms) {
      input.terms.push_back({term.vectors.narrow(0, begin, count), term.table});
    }
    if (mean.defined()) input.mean = mean.narrow(0, begin, count);
    const PassOutput output = vocabulary_pass<acc_t>(input);
    const Tensor gradients = hidden_gradient<acc_t>(output, input.tau);
    for (int64_t i = 0; i < count; ++i) {
      // The weights as the forward pass normalised them.
      const RowState& state = output.states[i];
      const double total = state.sum * std::exp(state.max / input.tau - log_sums.const_data_ptr<double>()[begin + i]);
      gradients[i].mul_(total);
    }
    result.narrow(0, begin, count).copy_(gradients);
  }
  return result;
}

}  // namespace

Tensor linear_relaxed_backward(const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& lse,
                               at::TensorList vectors, at::TensorList tables, const std::optional<Tensor>& mean,
                               double tau) {
  TORCH_CHECK(h.dim() == 2 && weight.dim() == 2 && weight.size(1) == h.size(1) && weight.size(0) > 0,
              "linear_relaxed_backward: h and weight must be (N, d) and (V, d), got ", h.sizes(), " and ",
              weight.sizes());
  TORCH_CHECK(lse.dim() == 1 && lse.size(0) == h.size(0), "linear_relaxed_backward: lse must have shape (", h.size(0),
              "), got ", lse.sizes());
  TORCH_CHECK(!mean || mean->sizes() == lse.sizes(), "linear_relaxed_backward: mean must have shape (", h.size(0),
              "), got ", mean ? mean->sizes() : lse.sizes());
  TORCH_CHECK(vectors.size() == tables.size() && !tables.empty(), "linear_relaxed_backward: vectors and tables must ",
              "be as many and at least one, got ", vectors.size(), " and ", tables.size());
  TORCH_CHECK_VALUE(tau > 0 && std::isnormal(static_cast<float>(1 / tau)),
                    "linear_relaxed_backward: tau must be positive, got ", tau);
  const bool exact = h.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  std::vector<GradientTerm> terms;
  for (size_t i = 0; i < tables.size(); ++i) {
    TORCH_CHECK(tables[i].dim() == 2 && tables[i].size(0) == weight.size(0) && vectors[i].dim() == 2 &&
                    vectors[i].size(0) == h.size(0) && vectors[i].size(1) == tables[i].size(1),
                "linear_relaxed_backward: vectors and tables must be (N, d_k) and (V, d_k), got ", vectors[i].sizes(),
                " and ", tables[i].sizes());
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
  const Tensor means = mean ? mean->to(at::kDouble).contiguous() : Tensor();
  return (exact ? backward<double>(input, h, lse, means, terms) : backward<float>(input, h, lse, means, terms))
      .mul_(scale);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
