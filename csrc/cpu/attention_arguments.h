// What operators of attention take.
#pragma once

#include "../checks.h"
#include "operators.h"

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// q (B, heads, S, D), k (B, key heads, T, D), v (B, key heads, T, E) and mask (B or 1, heads or 1, S or 1, T).
inline void check_attention(const Check& check, const Tensor& q, const Tensor& k, const Tensor& v,
                            const OptionalTensor& mask) {
  check.floats(q, "q", {"B", "heads", "S", "D"});
  check.floats(k, "k", {q.size(0), "key heads", "T", q.size(3)});
  check.floats(v, "v", {q.size(0), k.size(1), k.size(2), "E"});
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, check.name(), ": q must have a multiple of the ",
                    k.size(1), " heads of k, got ", q.size(1));
  for (const Tensor* other : {&k, &v}) {
    TORCH_CHECK_TYPE(other->scalar_type() == q.scalar_type(), check.name(), ": q, k and v must have one dtype, got ",
                     dtype_name(q), " and ", dtype_name(*other));
  }
  if (mask.has_value()) {
    check.memory(*mask, "mask");
    const bool fits = mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == q.size(0)) &&
                      (mask->size(1) == 1 || mask->size(1) == q.size(1)) &&
                      (mask->size(2) == 1 || mask->size(2) == q.size(2)) && mask->size(3) == k.size(2);
    TORCH_CHECK_VALUE(fits && mask->scalar_type() == at::kBool, check.name(), ": mask must be bool (", q.size(0),
                      " or 1, ", q.size(1), " or 1, ", q.size(2), " or 1, ", k.size(2), "), got ", dtype_name(*mask),
                      " ", mask->sizes());
  }
}

// The same with the last dimension in a row.
inline Tensor in_lines(const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
