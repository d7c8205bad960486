// Products of bfloat16 matrices that are summed in float32, by the processor's own instructions.
#pragma once

#include <ATen/Context.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512)
#include <cpuid.h>
#endif

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Whether the processor adds products of pairs of bfloat16 numbers to float32 numbers in one instruction.
inline bool has_bfloat16_matmul() {
#if defined(CPU_CAPABILITY_AVX512)
  static const bool works = __builtin_cpu_supports("avx512bf16");
  return works;
#else
  return false;
#endif
}

// Whether it multiplies whole tiles (AMX), which is what PyTorch's own product is for.
inline bool has_bfloat16_tiles() {
#if defined(CPU_CAPABILITY_AVX512)
  static const bool works = [] {
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    constexpr unsigned kAmxBfloat16 = 1U << 22;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kAmxBfloat16)) return false;
    try {
      // Only trying tells whether this torch was built with it.
      constexpr int64_t kColumns = 16;
      const std::vector<at::BFloat16> ones(2 * kColumns, at::BFloat16(1));
      std::vector<float> product(kColumns);
      at::native::cpublas::brgemm(1, kColumns, 2, 2, kColumns, kColumns, false, ones.data(), ones.data(),
                                  product.data());
      at::native::cpublas::brgemm_release();
      return product[0] == 2;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return works && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

#if defined(CPU_CAPABILITY_AVX512)
// Rows of A that are multiplied together, so that 24 of the 32 registers hold sums, beside one for each vector of
// columns and one for A; with one vector, as many as keep the multiplier from waiting for its own results.
template <int vectors>
constexpr int kPairRows = vectors == 4   ? 6
                          : vectors == 3 ? 8
                                         : 12;
constexpr int kMostPairVectors = 4;

// In assembly: these files are compiled for processors with AVX512 that do not have the instruction.
inline void add_pairs(__m512& sum, __m512i one, __m512i other) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(one), "v"(other));
}

// C [+]= A B of `rows` rows and `vectors` vectors of columns, the last one of those that `mask` names. The loops are
// unrolled, so that the arrays are registers.
template <int rows, int vectors>
void pairs_block(int64_t pairs, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
                 int64_t ldc, __mmask16 mask, bool add) {
  constexpr int64_t kLanes = 16;
  const auto lanes = [&](int j) { return j + 1 < vectors ? static_cast<__mmask16>(0xFFFF) : mask; };
  __m512 sums[rows][vectors];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      sums[i][j] = add ? _mm512_maskz_loadu_ps(lanes(j), c + i * ldc + j * kLanes) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < pairs; ++k) {
    // The next rows of A, which may lie in memory, a line of each at a time. As numbers: pointers behind a buffer have
    // no meaning.
    if (k % kLanes == 0) {
      const auto next = reinterpret_cast<uintptr_t>(a) + 2 * (rows * lda + 2 * k);
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) __builtin_prefetch(reinterpret_cast<const void*>(next + 2 * i * lda));
    }
    __m512i columns[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      columns[j] = _mm512_maskz_loadu_epi32(lanes(j), b + 2 * (k * ldb + j * kLanes));
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda + 2 * k, sizeof(pair));
      const __m512i row = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) add_pairs(sums[i][j], columns[j], row);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* out = c + i * ldc + j * kLanes;
      // Stores of a part of a vector are slow, so only where it has to be one.
      if (lanes(j) == 0xFFFF) {
        _mm512_storeu_ps(out, sums[i][j]);
      } else {
        _mm512_mask_storeu_ps(out, lanes(j), sums[i][j]);
      }
    }
  }
}

// The rows that are left over, fewer than `rows`.
template <int rows, int vectors>
void last_pairs_block(int64_t count, int64_t pairs, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                      int64_t ldb, float* c, int64_t ldc, __mmask16 mask, bool add) {
  if constexpr (rows > 0) {
    if (count == rows) return pairs_block<rows, vectors>(pairs, a, lda, b, ldb, c, ldc, mask, add);
    last_pairs_block<rows - 1, vectors>(count, pairs, a, lda, b, ldb, c, ldc, mask, add);
  }
}

template <int vectors>
void pairs_columns(int64_t m, int64_t pairs, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb,
                   float* c, int64_t ldc, __mmask16 mask, bool add) {
  constexpr int kRows = kPairRows<vectors>;
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) {
    pairs_block<kRows, vectors>(pairs, a + i * lda, lda, b, ldb, c + i * ldc, ldc, mask, add);
  }
  last_pairs_block<kRows - 1, vectors>(m - i, pairs, a + i * lda, lda, b, ldb, c + i * ldc, ldc, mask, add);
}
#endif

// c (m, n) = a (m, k) b (k, n), or c += ..., for even k, where `has_bfloat16_matmul`. Rows are lda and ldc entries
// apart. Two rows of b lie together, entry by entry, and `ldb` such pairs apart.
inline void matmul_pairs(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                         int64_t ldb, float* c, int64_t ldc, bool add) {
#if defined(CPU_CAPABILITY_AVX512)
  if (has_bfloat16_tiles()) return at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c);
  constexpr int64_t kLanes = 16;
  for (int64_t first = 0; first < n; first += kMostPairVectors * kLanes) {
    const int64_t columns = std::min(kMostPairVectors * kLanes, n - first);
    const auto mask = static_cast<__mmask16>(0xFFFFU >> ((kLanes - columns % kLanes) % kLanes));
    const auto run = [&](auto work) { work(m, k / 2, a, lda, b + 2 * first, ldb, c + first, ldc, mask, add); };
    switch ((columns + kLanes - 1) / kLanes) {
      case 1: run(pairs_columns<1>); break;
      case 2: run(pairs_columns<2>); break;
      case 3: run(pairs_columns<3>); break;
      default: run(pairs_columns<4>);
    }
  }
#else
  TORCH_INTERNAL_ASSERT(false, "no products of pairs of bfloat16 in this instruction set");
#endif
}

// Rounded to the nearest, where `has_bfloat16_matmul`; behind them zeros up to an even number of them.
inline void round_to_pairs(const float* from, int64_t count, at::BFloat16* to) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int64_t kLanes = 16;
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const auto lanes = [&](int64_t first) {
      return static_cast<__mmask16>(0xFFFFU >> (kLanes - std::clamp<int64_t>(count - first, 0, kLanes)));
    };
    const __m512 low = _mm512_maskz_loadu_ps(lanes(i), from + i);
    const __m512 high = _mm512_maskz_loadu_ps(lanes(i + kLanes), from + i + kLanes);
    __m512i rounded;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(rounded) : "v"(high), "v"(low));
    const int64_t size = std::min<int64_t>(2 * kLanes, (count - i + 1) / 2 * 2);
    if (size == 2 * kLanes) {
      _mm512_storeu_si512(to + i, rounded);
    } else {
      _mm512_mask_storeu_epi16(to + i, (__mmask32(1) << size) - 1, rounded);
    }
  }
#else
  TORCH_INTERNAL_ASSERT(false, "no products of pairs of bfloat16 in this instruction set");
#endif
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
