// The Gumbel noise of nabla_fast/ops/noise.py, and the argmax of noisy scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

inline uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Of the key of a row and a token, 32 bits. The fewer their value, the larger is the noise.
struct NoiseKey {
  uint32_t bits(uint32_t token) const { return hash32(hash32(token ^ low) ^ high); }

  uint32_t low;
  uint32_t high;
};

// Rounded to float32 where PyTorch rounds. The logarithms are rounded from double, PyTorch's own may be an ulp away.
inline float gumbel(uint32_t bits) {
  const float uniform = std::min((static_cast<float>(bits) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  const auto exponential = static_cast<float>(-std::log1p(-static_cast<double>(uniform)));
  return static_cast<float>(-std::log(static_cast<double>(exponential)));
}

// The largest score, and its token; of equals the lowest.
template <typename acc_t>
struct Best {
  void take(acc_t other, int64_t other_token) {
    if (other > score || (other == score && other_token < token)) {
      score = other;
      token = other_token;
    }
  }

  // The largest bits with which a token of logit x, divided by the temperature, can still win; -1 if none can.
  //
  // Noise is -log(e) of an exponential e, and e is at least u = bits / 2^32. So x + noise reaches the score only if
  // u <= exp(x - score). The slack is many times what rounding of x, the noise and their sum makes.
  int64_t reach(double x) const {
    constexpr double kAll = 4294967295.0;
    if (token < 0) return static_cast<int64_t>(kAll);
    const double slack = 1e-5 + 1e-6 * (std::abs(x) + std::abs(static_cast<double>(score)));
    const double share = std::exp(x - static_cast<double>(score) + slack);
    return share < 1 ? static_cast<int64_t>(std::floor(share * kAll - 0.5)) : static_cast<int64_t>(kAll);
  }

  // Takes a token of logit x, divided by the temperature; -inf is none.
  void enter(acc_t x, int64_t other_token, uint32_t bits) {
    if (x > -std::numeric_limits<acc_t>::infinity() && bits <= reach(x)) take(x + gumbel(bits), other_token);
  }

  acc_t score = -std::numeric_limits<acc_t>::infinity();
  int64_t token = -1;
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
