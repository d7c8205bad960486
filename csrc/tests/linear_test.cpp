// linear in the portable instruction set, for every number of rows that a group may have, against a plain loop.
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
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
    const at::Tensor product = linear(x, weight, std::nullopt, bias, at::kFloat);
    require(product.to(at::kDouble).allclose(meant, 1e-5, 1e-3), "product");
    require(linear(x, weight, std::nullopt, std::nullopt, dtype).scalar_type() == dtype, "dtype");
    require(linear(x.t().contiguous().t(), weight, std::nullopt, bias, at::kFloat).equal(product), "rows with gaps");

    const at::Tensor integers = at::randint(-128, 128, {entries, width}).to(at::kChar);
    const at::Tensor scale = at::rand({entries});
    const at::Tensor whole = integers.to(at::kDouble).mul(scale.to(at::kDouble).unsqueeze(1));
    const at::Tensor scaled = linear(x, integers, scale, bias, at::kFloat);
    const at::Tensor sum = x.to(at::kDouble).matmul(whole.t()).add(bias.to(at::kDouble));
    require(scaled.to(at::kDouble).allclose(sum, 1e-5, 1e-1), "product with integers");
  }
}

}  // namespace

int main() {
  for (int64_t rows = 0; rows <= 18; ++rows) every_dtype(rows, 13, 96);
  every_dtype(17, 3000, 64);  // by several threads
  std::puts("passed");
}
