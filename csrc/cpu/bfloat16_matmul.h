// Products of bfloat16 matrices that are summed in float32, by the processor's own instructions.
#pragma once

#include "register_matmul.h"

#include <ATen/Context.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
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
// c (m, n) = a (m, k) b (k, n), or c += ..., for even k, where `has_bfloat16_matmul`. Rows are lda and ldc entries
// apart. Two rows of b lie together, entry by entry, and `ldb` such pairs apart.
inline void matmul_pairs(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                         int64_t ldb, float* c, int64_t ldc, bool add) {
  if (has_bfloat16_tiles()) return at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c);
  BlockProduct<at::BFloat16>{a, lda, b, ldb, c, ldc, k / 2, add}.run(m, n);
}

// Rounded to the nearest, where `has_bfloat16_matmul`; behind them zeros up to an even number of them.
inline void round_to_pairs(const float* from, int64_t count, at::BFloat16* to) {
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
}
#else
inline void matmul_pairs(int64_t, int64_t, int64_t, const at::BFloat16*, int64_t, const at::BFloat16*, int64_t, float*,
                         int64_t, bool) {
  TORCH_INTERNAL_ASSERT(false, "no products of pairs of bfloat16 in this instruction set");
}

inline void round_to_pairs(const float*, int64_t, at::BFloat16*) {
  TORCH_INTERNAL_ASSERT(false, "no products of pairs of bfloat16 in this instruction set");
}
#endif

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
