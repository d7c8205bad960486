#include "../checks.h"
#include "operators.h"
#include "token_modules.h"

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

ThreeTensors attention_inputs(const Check& check, const Tensor& x, const LinearLayer& query, const LinearLayer& key,
                              const LinearLayer& value, const OptionalTensor& query_norm,
                              const OptionalTensor& key_norm, const Tensor& cos, const Tensor& sin, double epsilon,
                              bool offset) {
  check.floats(x, "x", {"B", "S", "d"});
  check.floats(cos, "cos", {"B", "S", "D"});
  const int64_t size = cos.size(2);
  const std::vector<Tensor> products = linear_layers(check, x, {query, key, value}, x.scalar_type());
  // (B, heads, S, D), in memory (B, S, heads, D), as attention reads it.
  const auto heads = [&](const Tensor& product, const char* name, const OptionalTensor& norm) {
    const int64_t rows = product.size(2);
    TORCH_CHECK_VALUE(size > 0 && rows % size == 0, check.name(), ": ", name, " must have a multiple of the ", size,
                      " features of cos as rows, got ", rows);
    const Tensor split = product.view({x.size(0), x.size(1), rows / size, size});
    return (norm.has_value() ? rms_norm(split, norm, epsilon, offset) : split).transpose(1, 2);
  };
  const auto [queries, keys] = rotary(heads(products[0], "query", query_norm), heads(products[1], "key", key_norm), cos, sin);
  return {queries, keys, heads(products[2], "value", std::nullopt)};
}

ThreeTensors attention_inputs(const Tensor& x, const Tensor& query, const OptionalTensor& query_bias, const Tensor& key,
                              const OptionalTensor& key_bias, const Tensor& value, const OptionalTensor& value_bias,
                              const OptionalTensor& query_norm, const OptionalTensor& key_norm, const Tensor& cos,
                              const Tensor& sin, double epsilon, bool offset) {
  const Check check("attention_inputs");
  check.floats(x, "x", {"B", "S", "d"});
  for (const auto& [weight, name] : {std::pair(&query, "query"), std::pair(&key, "key"), std::pair(&value, "value")}) {
    check.floats(*weight, name, {"heads * D", x.size(2)});
  }
  return attention_inputs(check, x, {query, std::nullopt, query_bias}, {key, std::nullopt, key_bias},
                          {value, std::nullopt, value_bias}, query_norm, key_norm, cos, sin, epsilon, offset);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
