// Arrays that are registers, and the sums of their entries.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <type_traits>
#include <utility>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

template <int... index, typename Work>
void unrolled(std::integer_sequence<int, index...>, const Work& work) {
  (work(std::integral_constant<int, index>{}), ...);
}

// work(0), ..., work(count - 1) with constants, so that arrays they index are registers.
template <int count, typename Work>
void unrolled(const Work& work) {
  unrolled(std::make_integer_sequence<int, count>{}, work);
}

// totals[i] = the sum of the i-th vector of `vectors`, each in the same order, however many there are. Four at a time
// share what moves their numbers about.
template <int count>
inline __attribute__((always_inline)) void add_up(const float* vectors, float* totals) {
#if defined(CPU_CAPABILITY_AVX512)
  // Per 128 bits: entries 0 and 2 of either, 1 and 3 of either.
  const auto pairs = [&](int one, int other) {
    const __m512 a = _mm512_loadu_ps(vectors + 16 * std::min(one, count - 1));
    const __m512 b = _mm512_loadu_ps(vectors + 16 * std::min(other, count - 1));
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  for (int i = 0; i < count; i += 4) {
    const __m512d first = pairs(i, i + 1);
    const __m512d second = pairs(i + 2, i + 3);
    const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    _mm_storeu_ps(totals + i, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
#else
  using Vec = at::vec::Vectorized<float>;
  for (int i = 0; i < count; ++i) {
    totals[i] = at::vec::vec_reduce_all<float>([](const Vec& one, const Vec& other) { return one + other; },
                                               Vec::loadu(vectors + i * Vec::size()));
  }
#endif
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
