// Products of matrices in cache, by blocks of the result that stay in registers: float32, or bfloat16 summed in
// float32.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512)
namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// What is multiplied at a time lies in 32 bits: a number of float32, or a pair of bfloat16 numbers.
template <typename scalar_t>
constexpr int64_t kPerWord = 4 / int64_t(sizeof(scalar_t));

constexpr int64_t kLanes = 16;
constexpr int kMostVectors = 4;
// Rows of A that are multiplied together, so that 24 of the 32 registers hold sums, beside one for each vector of
// columns and one for A; with one vector, as many as keep the multiplier from waiting for its own results.
template <int vectors>
constexpr int kBlockRows = vectors == 4   ? 6
                           : vectors == 3 ? 8
                                          : 12;

template <typename scalar_t>
inline void add_products(__m512& sum, __m512i one, __m512i other) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(one), _mm512_castsi512_ps(other), sum);
  } else {
    // In assembly: these files are compiled for processors with AVX512 that do not have the instruction.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(one), "v"(other));
  }
}

// A (m, k), B (k, n) and C (m, n). Rows of A and C are `lda` and `ldc` numbers apart. B holds words: `ldb` of them are
// between one row and the next, or between two rows that lie together, number by number, and the next two.
template <typename scalar_t>
struct BlockProduct {
  const scalar_t* a;
  int64_t lda;
  const scalar_t* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t words;  // in a row of A
  bool add;       // to C

  // Rows [row, row + rows) and `vectors` vectors of columns from `column` on, the last one of those that `mask` names.
  // The loops are unrolled, so that the arrays are registers; in the middle of another function, they would not be.
  template <int rows, int vectors>
  __attribute__((noinline)) void block(int64_t row, int64_t column, __mmask16 mask) const {
    constexpr int64_t kPer = kPerWord<scalar_t>;
    const scalar_t* left = a + row * lda;
    const scalar_t* right = b + kPer * column;
    float* out = c + row * ldc + column;
    const auto lanes = [&](int j) { return j + 1 < vectors ? static_cast<__mmask16>(0xFFFF) : mask; };
    __m512 sums[rows][vectors];
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        sums[i][j] = _mm512_setzero_ps();
      }
    }
    for (int64_t k = 0; k < words; ++k) {
      // The next rows of A, which may lie in memory, a line of each at a time. As numbers: pointers behind a buffer
      // have no meaning.
      if (k % kLanes == 0) {
        const auto next = reinterpret_cast<uintptr_t>(left) + sizeof(scalar_t) * (rows * lda + kPer * k);
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i) {
          __builtin_prefetch(reinterpret_cast<const void*>(next + sizeof(scalar_t) * i * lda));
        }
      }
      __m512i columns[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        columns[j] = _mm512_maskz_loadu_epi32(lanes(j), right + kPer * (k * ldb + j * kLanes));
      }
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
        int32_t word;
        std::memcpy(&word, left + i * lda + kPer * k, sizeof(word));
        const __m512i factor = _mm512_set1_epi32(word);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) add_products<scalar_t>(sums[i][j], columns[j], factor);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        // Not from the first product on: long sums lose less in parts.
        if (add) sums[i][j] = _mm512_add_ps(sums[i][j], _mm512_maskz_loadu_ps(lanes(j), out + i * ldc + j * kLanes));
        // Stores of a part of a vector are slow, so only where it has to be one.
        if (lanes(j) == 0xFFFF) {
          _mm512_storeu_ps(out + i * ldc + j * kLanes, sums[i][j]);
        } else {
          _mm512_mask_storeu_ps(out + i * ldc + j * kLanes, lanes(j), sums[i][j]);
        }
      }
    }
  }

  // `count` rows, at most `rows`.
  template <int rows, int vectors>
  void last_block(int64_t count, int64_t row, int64_t column, __mmask16 mask) const {
    if constexpr (rows > 0) {
      if (count == rows) return block<rows, vectors>(row, column, mask);
      last_block<rows - 1, vectors>(count, row, column, mask);
    }
  }

  template <int vectors>
  void columns(int64_t m, int64_t column, __mmask16 mask) const {
    constexpr int kRows = kBlockRows<vectors>;
    int64_t row = 0;
    for (; row + kRows <= m; row += kRows) block<kRows, vectors>(row, column, mask);
    last_block<kRows - 1, vectors>(m - row, row, column, mask);
  }

  void run(int64_t m, int64_t n) const {
    const int64_t vectors = (n + kLanes - 1) / kLanes;
    for (int64_t first = 0; first < vectors;) {
      // Of about one size, so that none is too narrow to keep the multiplier busy.
      const int64_t left = vectors - first;
      const int64_t parts = (left + kMostVectors - 1) / kMostVectors;
      const int64_t count = (left + parts - 1) / parts;
      const bool last = first + count == vectors;
      const auto mask = static_cast<__mmask16>(last ? 0xFFFFU >> (vectors * kLanes - n) : 0xFFFFU);
      switch (count) {
        case 1: columns<1>(m, first * kLanes, mask); break;
        case 2: columns<2>(m, first * kLanes, mask); break;
        case 3: columns<3>(m, first * kLanes, mask); break;
        default: columns<4>(m, first * kLanes, mask);
      }
      first += count;
    }
  }
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
#endif
