// Layers of few tokens in the portable instruction set, against PyTorch's operators in double.
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/rsqrt.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <tuple>

#include "cpu/operators.h"

namespace {

using nabla_fast::cpu::DEFAULT::attention;
using nabla_fast::cpu::DEFAULT::attention_blocks;
using nabla_fast::cpu::DEFAULT::attention_blocks_backward;
using nabla_fast::cpu::DEFAULT::rms_norm;
using nabla_fast::cpu::DEFAULT::rms_norm_backward;
using nabla_fast::cpu::DEFAULT::rotary;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

bool near(const at::Tensor& ours, const at::Tensor& meant) {
  const double rounding = ours.scalar_type() == at::kFloat ? 1e-5 : 1e-2;
  return ours.to(at::kDouble).allclose(meant, rounding, rounding);
}

// As a whole: numbers that come out small have been summed from large ones.
bool close(const at::Tensor& ours, const at::Tensor& meant) {
  const double rounding = ours.scalar_type() == at::kFloat ? 1e-5 : 1e-2;
  return ours.to(at::kDouble).sub(meant).norm().item<double>() <= rounding * meant.norm().item<double>();
}

void norms(at::ScalarType dtype, int64_t rows, int64_t width) {
  const at::Tensor x = at::randn({rows, width}).to(dtype);
  const at::Tensor weight = at::randn({width}).to(dtype);
  const at::Tensor wide = x.to(at::kDouble);
  const at::Tensor unit = wide.mul(at::rsqrt(wide.square().mean(-1, true).add(1e-6)));
  require(near(rms_norm(x, std::nullopt, 1e-6, false), unit), "norm without a weight");
  require(near(rms_norm(x, weight, 1e-6, false), unit.mul(weight.to(at::kDouble))), "norm");
  require(near(rms_norm(x, weight, 1e-6, true), unit.mul(weight.to(at::kDouble).add(1))), "norm with an offset");
  const at::Tensor grad = at::randn({rows, width}).to(dtype);
  const at::Tensor slopes = grad.to(at::kDouble).mul(weight.to(at::kDouble).add(1));
  const at::Tensor along = unit.mul(unit.mul(slopes).mean(-1, true));
  const at::Tensor factor = at::rsqrt(wide.square().mean(-1, true).add(1e-6));
  require(width < 7 || near(rms_norm_backward(grad, x, weight, 1e-6, true), slopes.sub(along).mul(factor)),
          "gradient of a norm");
}

at::Tensor turned(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor wide = x.to(at::kDouble);
  const auto halves = wide.chunk(2, -1);
  const at::Tensor crossed = at::cat({halves[1].neg(), halves[0]}, -1);
  return wide.mul(cos.to(at::kDouble).unsqueeze(1)).add(crossed.mul(sin.to(at::kDouble).unsqueeze(1)));
}

void rotations(at::ScalarType dtype, int64_t heads, int64_t tokens, int64_t width) {
  const at::Tensor q = at::randn({2, tokens, heads, width}).to(dtype).transpose(1, 2);
  const at::Tensor k = at::randn({2, 1, tokens, width}).to(dtype);
  for (const int64_t tables : {1, 2}) {
    const at::Tensor cos = at::randn({tables, tokens, width}).to(dtype);
    const at::Tensor sin = at::randn({tables, tokens, width}).to(dtype);
    const auto [queries, keys] = rotary(q, k, cos, sin);
    require(near(queries, turned(q, cos, sin)) && near(keys, turned(k, cos, sin)), "rotary embedding");
  }
}

// Of attention; every query reads the first column.
struct Operands {
  at::Tensor q;
  at::Tensor k;
  at::Tensor v;
  at::Tensor mask;

  Operands(at::ScalarType dtype, int64_t tokens, int64_t width, int64_t size, int64_t value_size)
      : q(at::randn({2, tokens, 4, size}).to(dtype).transpose(1, 2)),
        k(at::randn({2, 2, width + 3, size}).to(dtype).narrow(2, 0, width)),
        v(at::randn({2, 2, width, value_size}).to(dtype)),
        mask(at::rand({2, 1, tokens, width}).gt(0.4)) {
    mask.select(3, 0).fill_(true);
  }

  static at::Tensor of_heads(const at::Tensor& x) { return x.to(at::kDouble).repeat_interleave(2, 1); }
  at::Tensor scores() const { return q.to(at::kDouble).matmul(of_heads(k).transpose(2, 3)).mul(0.3); }
  at::Tensor masked_scores() const {
    return scores().masked_fill(mask.logical_not(), -std::numeric_limits<double>::infinity());
  }
};

void mixtures(at::ScalarType dtype, int64_t tokens, int64_t width, int64_t size, int64_t value_size) {
  const Operands own(dtype, tokens, width, size, value_size);
  const auto meant = [&](const at::Tensor& z) { return z.softmax(-1).matmul(own.of_heads(own.v)).transpose(1, 2); };
  require(near(attention(own.q, own.k, own.v, std::nullopt, 0.3), meant(own.scores())), "attention");
  require(near(attention(own.q, own.k, own.v, own.mask, 0.3), meant(own.masked_scores())), "attention with a mask");
  const at::Tensor nobody = at::ones({1, 1, 1, width}, at::kBool).logical_not();
  require(attention(own.q, own.k, own.v, nobody, 0.3).eq(0).all().item<bool>(), "attention that reads nothing");
}

void blocks(at::ScalarType dtype, int64_t tokens, int64_t width, int64_t size, int64_t value_size) {
  const Operands own(dtype, tokens, width, size, value_size);
  const at::Tensor chances = own.masked_scores().softmax(-1);
  const auto [out, sums] = attention_blocks(own.q, own.k, own.v, own.mask, 0.3);
  require(near(out, chances.matmul(own.of_heads(own.v)).transpose(1, 2)), "attention of blocks");
  const at::Tensor grad = at::randn(out.sizes()).to(dtype);
  const at::Tensor sent = grad.to(at::kDouble).transpose(1, 2);
  const at::Tensor slopes = sent.matmul(own.of_heads(own.v).transpose(2, 3));
  const at::Tensor inner = chances.mul(slopes.sub(chances.mul(slopes).sum(-1, true))).mul(0.3);
  const auto shared = [&](const at::Tensor& each) { return each.unflatten(1, {2, 2}).sum(2); };
  const auto [to_q, to_k, to_v] = attention_blocks_backward(grad, own.q, own.k, own.v, own.mask, out, sums, 0.3);
  require(close(to_q, inner.matmul(own.of_heads(own.k))), "gradient of queries");
  require(close(to_k, shared(inner.transpose(2, 3).matmul(own.q.to(at::kDouble)))), "gradient of keys");
  require(close(to_v, shared(chances.transpose(2, 3).matmul(sent))), "gradient of values");
}

}  // namespace

int main() {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t width : {1, 7, 16, 31, 32, 33, 100}) norms(dtype, 3, width);
    norms(dtype, 400, 100);  // by several threads
    for (const int64_t width : {2, 6, 32, 66}) rotations(dtype, 3, 4, width);
    for (const int64_t tokens : {1, 5}) {
      mixtures(dtype, tokens, 5, 8, 8);
      mixtures(dtype, tokens, 37, 33, 70);
    }
    mixtures(dtype, 4, 500, 64, 64);  // by several threads
    blocks(dtype, 3, 5, 16, 48);
    blocks(dtype, 70, 300, 32, 16);
  }
  std::puts("passed");
}
