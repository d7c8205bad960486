#include "../checks.h"
#include "half_precision.h"
#include "operators.h"
#include "token_modules.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

struct Silu {
  Vec operator()(const Vec& x) const { return x / (Vec(1.0F) + x.neg().exp()); }
};

struct Gelu {
  Vec operator()(const Vec& x) const { return x * Vec(0.5F) * (Vec(1.0F) + (x * Vec(0.70710678F)).erf()); }
};

struct GeluTanh {
  Vec operator()(const Vec& x) const {
    const Vec inner = Vec(0.79788456F) * (x + Vec(0.044715F) * x * x * x);
    return x * Vec(0.5F) * (Vec(1.0F) + inner.tanh());
  }
};

// activation(gate) * up, rounded once. Few rows: no work for a second thread.
template <typename scalar_t, typename Activation>
void gated(const Tensor& gate, const Tensor& up, const Tensor& out, const Activation& activation) {
  const auto* gates = gate.const_data_ptr<scalar_t>();
  const auto* values = up.const_data_ptr<scalar_t>();
  auto* to = out.mutable_data_ptr<scalar_t>();
  for (int64_t i = 0; i < gate.numel(); i += kPair) {
    const int64_t count = gate.numel() - i;
    Pair entries = load_pair(gates + i, count);
    const Pair factors = load_pair(values + i, count);
    for (int v = 0; v < 2; ++v) entries[v] = activation(entries[v]) * factors[v];
    store_pair(entries, to + i, std::min(count, kPair));
  }
}

}  // namespace

Tensor gated_mlp(const Check& check, const Tensor& x, const LinearLayer& gate, const LinearLayer& up,
                 const LinearLayer& down, std::string_view activation) {
  TORCH_CHECK_VALUE(activation == "silu" || activation == "gelu" || activation == "gelu_tanh", check.name(),
                    ": activation must be silu, gelu or gelu_tanh, got ", activation);
  const std::vector<Tensor> both = linear_layers(check, x, {gate, up}, x.scalar_type());
  const Tensor& gates = both[0];
  const Tensor& values = both[1];
  TORCH_CHECK_VALUE(gates.sizes() == values.sizes(), check.name(), ": up must have as many rows as gate, ",
                    gates.size(-1), ", got ", values.size(-1));
  const Tensor product = at::empty_like(gates);
  for_dtype(check.name(), "x", x, [&](auto number) {
    using scalar_t = decltype(number);
    if (activation == "silu") return gated<scalar_t>(gates, values, product, Silu());
    if (activation == "gelu") return gated<scalar_t>(gates, values, product, Gelu());
    gated<scalar_t>(gates, values, product, GeluTanh());
  });
  return linear_layers(check, product, down, x.scalar_type())[0];
}

Tensor gated_mlp(const Tensor& x, const Tensor& gate, const OptionalTensor& gate_bias, const Tensor& up,
                 const OptionalTensor& up_bias, const Tensor& down, const OptionalTensor& down_bias,
                 std::string_view activation) {
  const Check check("gated_mlp");
  check.floats(gate, "gate", {"I", "d"});
  check.floats(up, "up", {gate.size(0), gate.size(1)});
  check.floats(down, "down", {"d_out", gate.size(0)});
  return gated_mlp(check, x, {gate, std::nullopt, gate_bias}, {up, std::nullopt, up_bias},
                   {down, std::nullopt, down_bias}, activation);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
