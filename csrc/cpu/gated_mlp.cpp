#include "../checks.h"
#include "half_precision.h"
#include "operators.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <string_view>

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

Tensor gated_mlp(const Tensor& x, const Tensor& gate, const OptionalTensor& gate_bias, const Tensor& up,
                 const OptionalTensor& up_bias, const Tensor& down, const OptionalTensor& down_bias,
                 std::string_view activation) {
  const Check check("gated_mlp");
  TORCH_CHECK_VALUE(activation == "silu" || activation == "gelu" || activation == "gelu_tanh",
                    "gated_mlp: activation must be silu, gelu or gelu_tanh, got ", activation);
  check.floats(gate, "gate", {"I", "d"});
  check.floats(up, "up", {gate.size(0), gate.size(1)});
  check.floats(down, "down", {"d_out", gate.size(0)});
  const at::ScalarType dtype = x.scalar_type();
  const Tensor gates = linear(x, gate, std::nullopt, gate_bias, dtype);
  const Tensor values = linear(x, up, std::nullopt, up_bias, dtype);
  const Tensor product = at::empty_like(gates);
  for_dtype("gated_mlp", "x", x, [&](auto number) {
    using scalar_t = decltype(number);
    if (activation == "silu") return gated<scalar_t>(gates, values, product, Silu());
    if (activation == "gelu") return gated<scalar_t>(gates, values, product, Gelu());
    gated<scalar_t>(gates, values, product, GeluTanh());
  });
  return linear(product, down, std::nullopt, down_bias, dtype);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
