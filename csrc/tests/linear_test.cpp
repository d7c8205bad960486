// linear in the portable instruction set, for every number of rows that a group may have, against a plain loop.
#include <ATen/ops/randn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>

#include "cpu/operators.h"

namespace {

using nabla_fast::cpu::DEFAULT::linear;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void every_dtype(int64_t rows, int64_t entries, int64_t width) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor x = at::randn({rows, width}).to(dtype);
    const at::Tensor weight = at::randn({entries, width}).to(dtype);
    const at::Tensor bias = at::randn({entries}).to(dtype);
    const at::Tensor meant = x.to(at::kDouble).matmul(weight.to(at::kDouble).t()).add(bias.to(at::kDouble));
    const at::Tensor product = linear(x, weight, bias, at::kFloat);
    require(product.to(at::kDouble).allclose(meant, 1e-5, 1e-3), "product");
    require(linear(x, weight, std::nullopt, dtype).scalar_type() == dtype, "dtype");
    require(linear(x.t().contiguous().t(), weight, bias, at::kFloat).equal(product), "rows with gaps");
  }
}

}  // namespace

int main() {
  for (int64_t rows = 0; rows <= 18; ++rows) every_dtype(rows, 13, 96);
  every_dtype(17, 3000, 64);  // by several threads
  std::puts("passed");
}
