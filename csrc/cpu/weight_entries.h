// Entries of a weight of any dtype, as float32 in registers.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;
using Bits = at::vec::Vectorized<int32_t>;

// 8-bit integers, a vector of them. Where the vector has to be put together, in one place: the compiler would work on
// copies of it for minutes.
#if !defined(CPU_CAPABILITY_AVX512) && !defined(CPU_CAPABILITY_AVX2)
__attribute__((noinline))
#endif
inline Vec from_int8(const int8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  float entries[Vec::size()];
  for (int i = 0; i < Vec::size(); ++i) entries[i] = from[i];
  return Vec::loadu(entries);
#endif
}

// How entries become float32. Their order is the same in x and in the weight, and does not matter.
template <typename scalar_t>
struct Entries {
  static constexpr int kVectors = std::is_same_v<scalar_t, float> ? 1 : 2;
  static constexpr int64_t kCount = kVectors * Vec::size();

  static void load(const scalar_t* from, Vec* to) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      to[0] = Vec::loadu(from);
    } else if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      // Even entries, then odd ones: two instructions, where the order in memory would take five.
      const Bits pairs = Bits::loadu(from);
      to[0] = at::vec::cast<float>(pairs << Bits(16));
      to[1] = at::vec::cast<float>(pairs & Bits(static_cast<int32_t>(0xFFFF0000)));
    } else if constexpr (std::is_same_v<scalar_t, int8_t>) {
      to[0] = from_int8(from);
      to[1] = from_int8(from + Vec::size());
    } else {
      at::vec::load_to_float<scalar_t>(from, to[0], to[1]);
    }
  }
};

// `count` numbers in float32, in the order in which `Entries` has those of a weight.
template <typename scalar_t>
std::vector<float> converted(const scalar_t* from, int64_t count) {
  using E = Entries<scalar_t>;
  std::vector<float> out(count);
  for (int64_t i = 0; i < count; i += E::kCount) {
    Vec entries[E::kVectors];
    E::load(from + i, entries);
    for (int v = 0; v < E::kVectors; ++v) entries[v].store(out.data() + i + v * Vec::size());
  }
  return out;
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
