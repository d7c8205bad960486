// What a layer does with rows of a few tokens, beside products.
#pragma once

#include "half_precision.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Numbers = at::vec::Vectorized<float>;

// One row; every one is computed alike, whatever is beside it.
template <typename scalar_t>
void normalise(const scalar_t* x, const scalar_t* weight, int64_t size, float epsilon, float offset, scalar_t* out) {
  Pair squares{Numbers(0.0F), Numbers(0.0F)};
  for (int64_t i = 0; i < size; i += kPair) {
    const Pair entries = load_pair(x + i, size - i);
    for (int v = 0; v < 2; ++v) squares[v] = at::vec::fmadd(entries[v], entries[v], squares[v]);
  }
  const Numbers factor(1 / std::sqrt(sum_of(squares) / static_cast<float>(size) + epsilon));
  for (int64_t i = 0; i < size; i += kPair) {
    Pair entries = load_pair(x + i, size - i);
    for (auto& vector : entries) vector = vector * factor;
    if (weight != nullptr) {
      const Pair scale = load_pair(weight + i, size - i);
      for (int v = 0; v < 2; ++v) entries[v] = entries[v] * (scale[v] + Numbers(offset));
    }
    store_pair(entries, out + i, size - i);
  }
}

// The features of one head: each half is turned against the other. `out` may be `x`.
template <typename scalar_t>
void turn(const scalar_t* x, const scalar_t* cos, const scalar_t* sin, int64_t half, scalar_t* out) {
  for (int64_t i = 0; i < half; i += kPair) {
    const int64_t count = half - i;
    const Pair first = load_pair(x + i, count);
    const Pair second = load_pair(x + half + i, count);
    const Pair cos_first = load_pair(cos + i, count);
    const Pair cos_second = load_pair(cos + half + i, count);
    const Pair sin_first = load_pair(sin + i, count);
    const Pair sin_second = load_pair(sin + half + i, count);
    Pair one;
    Pair other;
    for (int v = 0; v < 2; ++v) {
      one[v] = first[v] * cos_first[v] - second[v] * sin_first[v];
      other[v] = second[v] * cos_second[v] + first[v] * sin_second[v];
    }
    store_pair(one, out + i, std::min(count, kPair));
    store_pair(other, out + half + i, std::min(count, kPair));
  }
}

struct Silu {
  Numbers operator()(const Numbers& x) const { return x / (Numbers(1.0F) + x.neg().exp()); }
};

struct Gelu {
  Numbers operator()(const Numbers& x) const {
    return x * Numbers(0.5F) * (Numbers(1.0F) + (x * Numbers(0.70710678F)).erf());
  }
};

struct GeluTanh {
  Numbers operator()(const Numbers& x) const {
    const Numbers inner = Numbers(0.79788456F) * (x + Numbers(0.044715F) * x * x * x);
    return x * Numbers(0.5F) * (Numbers(1.0F) + inner.tanh());
  }
};

// out = activation(gates) * values, rounded once; `out` may be `gates`.
template <typename scalar_t, typename Activation>
void gated(const scalar_t* gates, const scalar_t* values, int64_t count, scalar_t* out, const Activation& activation) {
  for (int64_t i = 0; i < count; i += kPair) {
    const int64_t left = count - i;
    Pair entries = load_pair(gates + i, left);
    const Pair factors = load_pair(values + i, left);
    for (int v = 0; v < 2; ++v) entries[v] = activation(entries[v]) * factors[v];
    store_pair(entries, out + i, std::min(left, kPair));
  }
}

inline bool is_activation(std::string_view name) { return name == "silu" || name == "gelu" || name == "gelu_tanh"; }

// With the activation of that name.
template <typename scalar_t>
void gated(const scalar_t* gates, const scalar_t* values, int64_t count, scalar_t* out, std::string_view activation) {
  if (activation == "silu") return gated(gates, values, count, out, Silu());
  if (activation == "gelu") return gated(gates, values, count, out, Gelu());
  gated(gates, values, count, out, GeluTanh());
}

// rows += more
template <typename scalar_t>
void add(scalar_t* rows, const scalar_t* more, int64_t count) {
  for (int64_t i = 0; i < count; i += kPair) {
    const int64_t left = count - i;
    Pair entries = load_pair(rows + i, left);
    const Pair others = load_pair(more + i, left);
    for (int v = 0; v < 2; ++v) entries[v] = entries[v] + others[v];
    store_pair(entries, rows + i, std::min(left, kPair));
  }
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
