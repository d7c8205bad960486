#include "../checks.h"
#include "operators.h"
#include "token_modules.h"

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

ThreeTensors attention_inputs(const Tensor& x, const Tensor& query, const OptionalTensor& query_bias, const Tensor& key,
                              const OptionalTensor& key_bias, const Tensor& value, const OptionalTensor& value_bias,
                              const OptionalTensor& query_norm, const OptionalTensor& key_norm, const Tensor& cos,
                              const Tensor& sin, double epsilon, bool offset) {
  const Check check("attention_inputs");
  check.floats(x, "x", {"B", "S", "d"});
  check.floats(cos, "cos", {"B", "S", "D"});
  const int64_t size = cos.size(2);
  for (const auto& [weight, name] : {std::pair(&query, "query"), std::pair(&key, "key"), std::pair(&value, "value")}) {
    check.floats(*weight, name, {"heads * D", x.size(2)});
    TORCH_CHECK_VALUE(size > 0 && weight->size(0) % size == 0, "attention_inputs: ", name,
                      " must have a multiple of the ", size, " features of cos as rows, got ", weight->size(0));
  }
  const std::vector<Tensor> products = linear_layers(
      check, x, {{query, std::nullopt, query_bias}, {key, std::nullopt, key_bias}, {value, std::nullopt, value_bias}},
      x.scalar_type());
  // (B, heads, S, D), in memory (B, S, heads, D), as attention reads it.
  const auto heads = [&](const Tensor& product, const OptionalTensor& norm) {
    const Tensor split = product.view({x.size(0), x.size(1), product.size(2) / size, size});
    return (norm.has_value() ? rms_norm(split, norm, epsilon, offset) : split).transpose(1, 2);
  };
  const auto [queries, keys] = rotary(heads(products[0], query_norm), heads(products[1], key_norm), cos, sin);
  return {queries, keys, heads(products[2], std::nullopt)};
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
