#include "../checks.h"
#include "half_precision.h"
#include "operators.h"
#include "token_modules.h"
#include "token_rows.h"

#include <ATen/ops/empty_like.h>

#include <optional>
#include <string_view>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

Tensor gated_mlp(const Tensor& x, const Tensor& gate, const OptionalTensor& gate_bias, const Tensor& up,
                 const OptionalTensor& up_bias, const Tensor& down, const OptionalTensor& down_bias,
                 std::string_view activation) {
  const Check check("gated_mlp");
  TORCH_CHECK_VALUE(is_activation(activation), "gated_mlp: activation must be silu, gelu or gelu_tanh, got ",
                    activation);
  check.floats(gate, "gate", {"I", "d"});
  check.floats(up, "up", {gate.size(0), gate.size(1)});
  check.floats(down, "down", {"d_out", gate.size(0)});
  const at::ScalarType dtype = x.scalar_type();
  const std::vector<Tensor> both =
      linear_layers(check, x, {{gate, std::nullopt, gate_bias}, {up, std::nullopt, up_bias}}, dtype);
  const Tensor product = at::empty_like(both[0]);
  for_dtype("gated_mlp", "x", x, [&](auto number) {
    using scalar_t = decltype(number);
    gated(both[0].const_data_ptr<scalar_t>(), both[1].const_data_ptr<scalar_t>(), product.numel(),
          product.mutable_data_ptr<scalar_t>(), activation);
  });
  return linear_layers(check, product, LinearLayer{down, std::nullopt, down_bias}, dtype)[0];
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
