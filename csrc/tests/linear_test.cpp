// linear in the portable instruction set, for every number of rows that a group may have, and the modules that are made
// of it, against products in double.
#include <ATen/ops/cat.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/silu.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/operators.h"

namespace {

using nabla_fast::cpu::DEFAULT::attention;
using nabla_fast::cpu::DEFAULT::attention_inputs;
using nabla_fast::cpu::DEFAULT::decoder_layers;
using nabla_fast::cpu::DEFAULT::gated_mlp;
using nabla_fast::cpu::DEFAULT::linear;
using nabla_fast::cpu::DEFAULT::rms_norm;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

bool near(const at::Tensor& ours, const at::Tensor& meant) {
  const double rounding = ours.scalar_type() == at::kFloat ? 1e-5 : 1e-2;
  return ours.to(at::kDouble).allclose(meant, rounding, rounding);
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

// Against products of the same numbers in double, of results that are rounded as often.
void modules(at::ScalarType dtype, int64_t rows) {
  const auto matrix = [&](int64_t out, int64_t in) { return at::randn({out, in}).mul(0.1).to(dtype); };
  const auto times = [](const at::Tensor& x, const at::Tensor& weight) {
    return x.to(at::kDouble).matmul(weight.to(at::kDouble).t());
  };
  const auto rounded = [&](const at::Tensor& x) { return x.to(dtype).to(at::kDouble); };
  const at::Tensor x = at::randn({2, rows, 32}).to(dtype);
  const at::Tensor gate = matrix(96, 32);
  const at::Tensor up = matrix(96, 32);
  const at::Tensor down = matrix(32, 96);
  for (const auto* name : {"silu", "gelu", "gelu_tanh"}) {
    const std::string_view activation(name);
    const at::Tensor gates = rounded(times(x, gate));
    const at::Tensor active = activation == "silu"   ? at::silu(gates)
                              : activation == "gelu" ? at::gelu(gates)
                                                     : at::gelu(gates, "tanh");
    const at::Tensor meant = times(rounded(active.mul(rounded(times(x, up)))), down);
    require(near(gated_mlp(x, gate, std::nullopt, up, std::nullopt, down, std::nullopt, activation), meant), name);
  }
  const at::Tensor cos = at::randn({1, rows, 16}).to(dtype);
  const at::Tensor sin = at::randn({1, rows, 16}).to(dtype);
  const at::Tensor scale = at::randn({16}).to(dtype);
  const at::Tensor bias = at::randn({64}).to(dtype);
  const auto [q, k, v] = attention_inputs(x, matrix(64, 32), bias, matrix(32, 32), std::nullopt, gate.narrow(0, 0, 32),
                                          std::nullopt, scale, scale, cos, sin, 1e-6, false);
  require(q.size(1) == 4 && k.size(1) == 2, "heads");
  const at::Tensor values = times(x, gate.narrow(0, 0, 32)).view({2, rows, 2, 16}).transpose(1, 2);
  require(near(v, values), "values");
}

// Two layers in one call, against the operators that they consist of.
void layers(at::ScalarType dtype, int64_t batch, int64_t rows, bool head_norms) {
  constexpr int64_t kCount = 2;
  constexpr int64_t kPast = 3;
  const auto matrix = [&](int64_t out, int64_t in) { return at::randn({out, in}).mul(0.1).to(dtype); };
  std::vector<at::Tensor> weights;
  std::vector<at::Tensor> keys;
  std::vector<at::Tensor> values;
  nabla_fast::cpu::OptionalTensors nothing;
  nabla_fast::cpu::OptionalTensors biases;
  nabla_fast::cpu::OptionalTensors norms;
  for (int64_t i = 0; i < kCount; ++i) {
    for (const auto& [out, in] : std::vector<std::pair<int64_t, int64_t>>{
             {64, 32}, {32, 32}, {32, 32}, {32, 64}, {96, 32}, {96, 32}, {32, 96}}) {
      weights.push_back(matrix(out, in));
      nothing.push_back(std::nullopt);
      biases.push_back(i == 0 ? std::optional(at::randn({out}).to(dtype)) : std::nullopt);
    }
    for (const int64_t size : {32, 32}) norms.push_back(at::randn({size}).to(dtype));
    for (int n = 0; n < 2; ++n) norms.push_back(head_norms ? std::optional(at::randn({16}).to(dtype)) : std::nullopt);
    keys.push_back(at::randn({batch, 2, kPast + rows, 16}).to(dtype));
    values.push_back(at::randn({batch, 2, kPast + rows, 16}).to(dtype));
  }
  const at::Tensor x = at::randn({batch, rows, 32}).to(dtype);
  const at::Tensor cos = at::randn({1, rows, 16}).to(dtype);
  const at::Tensor sin = at::randn({1, rows, 16}).to(dtype);
  const at::Tensor mask = at::ones({batch, 1, rows, kPast + rows}, at::kBool).tril(kPast);
  at::Tensor meant = x;
  std::vector<at::Tensor> kept;
  for (int64_t i = 0; i < kCount; ++i) {
    const auto* w = &weights[i * 7];
    const auto bias = [&](int64_t n) { return std::optional<at::Tensor>(biases.get(i * 7 + n)); };
    const auto norm = [&](int64_t n) { return std::optional<at::Tensor>(norms.get(i * 4 + n)); };
    const auto [q, k, v] = attention_inputs(rms_norm(meant, norm(0), 1e-5, false), w[0], bias(0), w[1], bias(1), w[2],
                                            bias(2), norm(2), norm(3), cos, sin, 1e-6, true);
    kept.push_back(at::cat({keys[i].narrow(2, 0, kPast), k}, 2));
    const at::Tensor all = at::cat({values[i].narrow(2, 0, kPast), v}, 2);
    const at::Tensor mixed = attention(q, kept.back(), all, mask, 0.3).flatten(2);
    meant = meant.add(linear(mixed, w[3], std::nullopt, bias(3), dtype));
    meant = meant.add(
        gated_mlp(rms_norm(meant, norm(1), 1e-5, false), w[4], bias(4), w[5], bias(5), w[6], bias(6), "silu"));
  }
  const at::Tensor out = decoder_layers(x, weights, nothing, biases, norms, cos, sin, mask, keys, values, kPast, 0.3,
                                        1e-5, false, 1e-6, true, "silu");
  require(near(out, meant.to(at::kDouble)), "layers");
  for (int64_t i = 0; i < kCount; ++i) require(near(keys[i], kept[i].to(at::kDouble)), "keys");
}

}  // namespace

int main() {
  for (int64_t rows = 0; rows <= 18; ++rows) every_dtype(rows, 13, 96);
  every_dtype(17, 3000, 64);  // by several threads
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t rows : {1, 3}) modules(dtype, rows);
    layers(dtype, 1, 1, false);
    layers(dtype, 3, 5, true);
  }
  std::puts("passed");
}
