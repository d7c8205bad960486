// Parts of modules that several operators consist of.
#pragma once

#include "../checks.h"
#include "operators.h"

#include <c10/util/ArrayRef.h>

#include <string_view>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

// A linear layer; its weight may be of int8, with a scale for each row.
struct LinearLayer {
  Tensor weight;
  OptionalTensor scale;
  OptionalTensor bias;
};

// What `linear` gives for each of the layers, one or more, whose weights have one dtype.
std::vector<Tensor> linear_layers(const Check& check, const Tensor& x, c10::ArrayRef<LinearLayer> layers,
                                  at::ScalarType dtype);

// See `attention_inputs` and `gated_mlp` in nabla_fast/ops/token_layers.py.
ThreeTensors attention_inputs(const Check& check, const Tensor& x, const LinearLayer& query, const LinearLayer& key,
                              const LinearLayer& value, const OptionalTensor& query_norm,
                              const OptionalTensor& key_norm, const Tensor& cos, const Tensor& sin, double epsilon,
                              bool offset);
Tensor gated_mlp(const Check& check, const Tensor& x, const LinearLayer& gate, const LinearLayer& up,
                 const LinearLayer& down, std::string_view activation);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
