// draw_token in the portable instruction set, with edges that end inside a block and a part, against a plain loop.
#include <ATen/Parallel.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>

#include "cpu/gumbel.h"
#include "cpu/operators.h"

namespace {

using nabla_fast::cpu::DEFAULT::draw_token;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// The argmax over all tokens, each with its noise.
int64_t by_hand(const float* z, int64_t size, nabla_fast::cpu::DEFAULT::NoiseKey key) {
  nabla_fast::cpu::DEFAULT::Best<float> best;
  for (int64_t i = 0; i < size; ++i) {
    best.take(z[i] + nabla_fast::cpu::DEFAULT::gumbel(key.bits(static_cast<uint32_t>(i))), i);
  }
  return best.token;
}

void every_setting(int64_t rows, int64_t size) {
  const at::Tensor z = at::randn({rows, size}).mul_(3);
  const at::Tensor low = at::randint(int64_t(1) << 32, {rows}, at::kLong);
  const at::Tensor high = at::randint(int64_t(1) << 32, {rows}, at::kLong);
  const at::Tensor drawn = draw_token(z, low, high, 1, std::nullopt, std::nullopt);
  for (int64_t row = 0; row < rows; ++row) {
    const nabla_fast::cpu::DEFAULT::NoiseKey key{static_cast<uint32_t>(low[row].item<int64_t>()),
                                                 static_cast<uint32_t>(high[row].item<int64_t>())};
    require(drawn[row].item<int64_t>() == by_hand(z[row].const_data_ptr<float>(), size, key), "argmax over all tokens");
  }
  const at::Tensor greedy = draw_token(z, low, high, 0, std::nullopt, std::nullopt);
  require(greedy.equal(z.argmax(-1)), "temperature 0");
  require(draw_token(z, low, high, 1, 1, std::nullopt).equal(greedy), "top-k of one");
  require(draw_token(z, low, high, 0.7, std::nullopt, 1e-9).equal(greedy), "a nucleus of one");
  for (const double top_p : {0.5, 0.95, 0.9999999}) {
    for (const int64_t top_k : {int64_t(1), int64_t(40), size}) {
      for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
        const at::Tensor tokens = draw_token(z.to(dtype).t().contiguous().t(), low, high, 0.7, top_k, top_p);
        require(tokens.ge(0).all().item<bool>() && tokens.lt(size).all().item<bool>(), "a token of the vocabulary");
      }
    }
  }
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    at::Tensor spoilt = z.clone();
    spoilt.select(1, size - 1).fill_(bad);
    for (const auto top_p : {std::optional<double>(), std::optional<double>(0.9), std::optional<double>(0.99999)}) {
      require(draw_token(spoilt, low, high, 1, std::nullopt, top_p).eq(-1).all().item<bool>(), "no token");
    }
  }
}

}  // namespace

int main() {
  for (const int64_t size : {1, 7, 255, 256, 257, 16384, 16385, 40000}) every_setting(3, size);
  std::puts("passed");
}
