// Products of tens to hundreds of rows with a weight that lies in memory.
#pragma once

#include "operators.h"

#include <cstdint>

namespace nabla_fast::cpu::CPU_CAPABILITY {

// Whether they are multiplied here: float32 or bfloat16, `size` numbers in each sum.
bool multiplies_blocks(at::ScalarType dtype, int64_t size);

// out (M, N), of float32 or the dtype of both: x (M, K) weight (N, K)^T + bias (N,) float32, or undefined. Their rows
// may have gaps between them.
void linear_blocks(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
