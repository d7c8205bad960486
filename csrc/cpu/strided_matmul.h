// Products of float32 matrices in cache, of which the left one lies in any strides.
#pragma once

#include "registers.h"

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <utility>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Numbers = at::vec::Vectorized<float>;

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
#else
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
#endif

// A (m, k): entry (i, j) is data[i * row + j * column].
struct Left {
  const float* data;
  int64_t row;
  int64_t column;
};

// B or C (., n): rows are `stride` numbers apart.
template <typename number_t>
struct Right {
  number_t* data;
  int64_t stride;
};

template <int rows, int vectors>
__attribute__((noinline)) void multiply_tile(int64_t k, const Left& a, const Right<const float>& b,
                                             const Right<float>& c, bool add) {
  Numbers sums[rows * vectors];
  unrolled<rows * vectors>([&](auto i) { sums[i] = Numbers(0.0F); });
  for (int64_t j = 0; j < k; ++j) {
    const float* line = b.data + j * b.stride;
    Numbers entries[vectors];
    unrolled<vectors>([&](auto v) { entries[v] = Numbers::loadu(line + v * Numbers::size()); });
    unrolled<rows>([&](auto i) {
      const Numbers factor(a.data[i * a.row + j * a.column]);
      unrolled<vectors>(
          [&](auto v) { sums[i * vectors + v] = at::vec::fmadd(factor, entries[v], sums[i * vectors + v]); });
    });
  }
  unrolled<rows>([&](auto i) {
    unrolled<vectors>([&](auto v) {
      float* to = c.data + i * c.stride + v * Numbers::size();
      (add ? sums[i * vectors + v] + Numbers::loadu(to) : sums[i * vectors + v]).store(to);
    });
  });
}

template <int vectors>
void multiply_columns(int64_t m, int64_t k, const Left& a, const Right<const float>& b, const Right<float>& c,
                      bool add) {
  const auto from = [&](int64_t row) {
    return std::pair{Left{a.data + row * a.row, a.row, a.column}, Right<float>{c.data + row * c.stride, c.stride}};
  };
  int64_t row = 0;
  for (; row + kTileRows <= m; row += kTileRows) {
    const auto [left, out] = from(row);
    multiply_tile<kTileRows, vectors>(k, left, b, out, add);
  }
  const auto rest = from(row);
  unrolled<kTileRows - 1>([&](auto before) {
    if (m - row == before + 1) multiply_tile<before + 1, vectors>(k, rest.first, b, rest.second, add);
  });
}

// C (m, n) = A (m, k) B (k, n), or C += ...; n is a multiple of 16.
inline void multiply(int64_t m, int64_t n, int64_t k, const Left& a, const Right<const float>& b, const Right<float>& c,
                     bool add) {
  constexpr int64_t kWidth = kTileVectors * Numbers::size();
  int64_t column = 0;
  const auto b_from = [&] { return Right<const float>{b.data + column, b.stride}; };
  const auto c_from = [&] { return Right<float>{c.data + column, c.stride}; };
  for (; column + kWidth <= n; column += kWidth) multiply_columns<kTileVectors>(m, k, a, b_from(), c_from(), add);
  for (; column < n; column += Numbers::size()) multiply_columns<1>(m, k, a, b_from(), c_from(), add);
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
