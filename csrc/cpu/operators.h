// The CPU operators. What each one means stands above its schema in nabla_fast/ops/native.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace nabla_fast::cpu {

std::tuple<at::Tensor, at::Tensor> token_diff(const at::Tensor& old_tokens, const at::Tensor& new_tokens);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relaxed_stats(const at::Tensor& logits, double tau);

}  // namespace nabla_fast::cpu
