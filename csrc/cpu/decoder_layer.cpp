#include "../checks.h"
#include "operators.h"
#include "token_modules.h"

#include <cstdint>
#include <optional>
#include <string_view>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Of the linear layers, in the order in which they are given.
enum Layer : int64_t { kQuery, kKey, kValue, kOut, kGate, kUp, kDown, kLayers };
// Of the norms; those of heads may be missing.
enum Norm : int64_t { kBeforeAttention, kBeforeMLP, kQueryNorm, kKeyNorm, kNorms };

// New columns [past, past + S) of a buffer (B, heads, columns, D).
Tensor appended(const Check& check, const Tensor& buffer, const char* name, const Tensor& rows, int64_t past) {
  check.floats(buffer, name, {rows.size(0), rows.size(1), "columns", rows.size(3)});
  const int64_t width = past + rows.size(2);
  TORCH_CHECK_VALUE(past >= 0 && width <= buffer.size(2), "decoder_layer: ", name, " must have room for columns ", past,
                    " to ", width, ", got ", buffer.size(2));
  TORCH_CHECK_TYPE(buffer.scalar_type() == rows.scalar_type(), "decoder_layer: ", name, " must have the dtype of x, ",
                   dtype_name(rows), ", got ", dtype_name(buffer));
  buffer.narrow(2, past, rows.size(2)).copy_(rows);
  return buffer.narrow(2, 0, width);
}

}  // namespace

Tensor decoder_layer(const Tensor& x, at::TensorList weights, const OptionalTensors& scales,
                     const OptionalTensors& biases, const OptionalTensors& norms, const Tensor& cos, const Tensor& sin,
                     const OptionalTensor& mask, const Tensor& keys, const Tensor& values, int64_t past, double scaling,
                     double epsilon, bool offset, double head_epsilon, bool head_offset, std::string_view activation) {
  const Check check("decoder_layer");
  TORCH_CHECK_VALUE(static_cast<int64_t>(weights.size()) == kLayers && scales.size() == kLayers &&
                        biases.size() == kLayers && norms.size() == kNorms,
                    "decoder_layer: there must be 7 weights, scales and biases, and 4 norms, got ", weights.size(), ", ",
                    scales.size(), ", ", biases.size(), " and ", norms.size());
  const auto optional = [](const OptionalTensors& tensors, int64_t i) { return OptionalTensor(tensors.get(i)); };
  const auto layer = [&](Layer which) {
    return LinearLayer{weights[which], optional(scales, which), optional(biases, which)};
  };
  const Tensor normed = rms_norm(x, optional(norms, kBeforeAttention), epsilon, offset);
  const auto [queries, new_keys, new_values] =
      attention_inputs(check, normed, layer(kQuery), layer(kKey), layer(kValue), optional(norms, kQueryNorm),
                       optional(norms, kKeyNorm), cos, sin, head_epsilon, head_offset);
  const Tensor all_keys = appended(check, keys, "keys", new_keys, past);
  const Tensor all_values = appended(check, values, "values", new_values, past);
  const Tensor mixed = attention(queries, all_keys, all_values, mask, scaling);
  const Tensor rows = mixed.view({x.size(0), x.size(1), mixed.size(2) * mixed.size(3)});
  Tensor middle = linear_layers(check, rows, layer(kOut), x.scalar_type())[0];
  check.floats(middle, "the output of attention", {x.size(0), x.size(1), x.size(2)});
  middle.add_(x);
  Tensor out = gated_mlp(check, rms_norm(middle, optional(norms, kBeforeMLP), epsilon, offset), layer(kGate),
                         layer(kUp), layer(kDown), activation);
  check.floats(out, "the output of the network", {x.size(0), x.size(1), x.size(2)});
  return out.add_(middle);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
