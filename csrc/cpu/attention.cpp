#include "attention.h"
#include "../checks.h"
#include "half_precision.h"
#include "operators.h"

#include <ATen/ops/empty.h>

#include <cstdint>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale,
            const Tensor& out) {
  const Columns columns(mask, k.size(2));
  Attention<scalar_t>{q.const_data_ptr<scalar_t>(),
                      q.strides(),
                      k.const_data_ptr<scalar_t>(),
                      k.strides(),
                      v.const_data_ptr<scalar_t>(),
                      v.strides(),
                      q.size(0),
                      q.size(1),
                      k.size(1),
                      q.size(2),
                      q.size(3),
                      v.size(3),
                      static_cast<float>(scale)}
      .run(columns, out.mutable_data_ptr<scalar_t>());
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale) {
  const Check check("attention");
  check.floats(q, "q", {"B", "heads", "S", "D"});
  check.floats(k, "k", {q.size(0), "key heads", "T", q.size(3)});
  check.floats(v, "v", {q.size(0), k.size(1), k.size(2), "E"});
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "attention: q must have a multiple of the ", k.size(1),
                    " heads of k, got ", q.size(1));
  for (const Tensor* other : {&k, &v}) {
    TORCH_CHECK_TYPE(other->scalar_type() == q.scalar_type(), "attention: q, k and v must have one dtype, got ",
                     dtype_name(q), " and ", dtype_name(*other));
  }
  if (mask.has_value()) {
    check.memory(*mask, "mask");
    const bool fits = mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == q.size(0)) &&
                      (mask->size(1) == 1 || mask->size(1) == q.size(1)) &&
                      (mask->size(2) == 1 || mask->size(2) == q.size(2)) && mask->size(3) == k.size(2);
    TORCH_CHECK_VALUE(fits && mask->scalar_type() == at::kBool, "attention: mask must be bool (", q.size(0), " or 1, ",
                      q.size(1), " or 1, ", q.size(2), " or 1, ", k.size(2), "), got ", dtype_name(*mask), " ",
                      mask->sizes());
  }
  const auto lined = [](const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const Tensor keys = lined(k);
  const Tensor values = lined(v);
  const Tensor queries = lined(q);
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options());
  for_dtype("attention", "q", q,
            [&](auto number) { attend<decltype(number)>(queries, keys, values, mask, scale, out); });
  return out;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
