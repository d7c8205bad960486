#include "attention.h"
#include "../checks.h"
#include "attention_arguments.h"
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
  check_attention(check, q, k, v, mask);
  const Tensor keys = in_lines(k);
  const Tensor values = in_lines(v);
  const Tensor queries = in_lines(q);
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options());
  for_dtype("attention", "q", q,
            [&](auto number) { attend<decltype(number)>(queries, keys, values, mask, scale, out); });
  return out;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
