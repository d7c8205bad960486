#include "../checks.h"
#include "operators.h"

#include <tuple>

namespace nabla_fast::cpu::CPU_CAPABILITY {

ThreeTensors attention_inputs(const Tensor& x, const Tensor& query, const OptionalTensor& query_bias, const Tensor& key,
                              const OptionalTensor& key_bias, const Tensor& value, const OptionalTensor& value_bias,
                              const OptionalTensor& query_norm, const OptionalTensor& key_norm, const Tensor& cos,
                              const Tensor& sin, double epsilon, bool offset) {
  const Check check("attention_inputs");
  check.floats(x, "x", {"B", "S", "d"});
  check.floats(cos, "cos", {"B", "S", "D"});
  const int64_t size = cos.size(2);
  // (B, S, heads * D) as attention reads it.
  const auto heads = [&](const Tensor& weight, const char* name, const OptionalTensor& bias,
                         const OptionalTensor& norm) {
    check.floats(weight, name, {"heads * D", x.size(2)});
    TORCH_CHECK_VALUE(size > 0 && weight.size(0) % size == 0, "attention_inputs: ", name,
                      " must have a multiple of the ", size, " features of cos as rows, got ", weight.size(0));
    const Tensor product = linear(x, weight, std::nullopt, bias, x.scalar_type());
    const Tensor split = product.view({x.size(0), x.size(1), weight.size(0) / size, size});
    return (norm.has_value() ? rms_norm(split, norm, epsilon, offset) : split).transpose(1, 2);
  };
  const auto [queries, keys] =
      rotary(heads(query, "query", query_bias, query_norm), heads(key, "key", key_bias, key_norm), cos, sin);
  return {queries, keys, heads(value, "value", value_bias, std::nullopt)};
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
