// Numbers of float32, bfloat16 or float16, as float32 in registers and back.
#pragma once

#include "../checks.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Two vectors: what one vector of half-precision numbers holds.
using Pair = std::array<at::vec::Vectorized<float>, 2>;
constexpr int64_t kPair = 2 * at::vec::Vectorized<float>::size();

// The first `count` numbers, at most kPair; the others are zeros.
template <typename scalar_t>
Pair load_pair(const scalar_t* from, int64_t count) {
  using Vec = at::vec::Vectorized<float>;
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (count >= kPair) return {Vec::loadu(from), Vec::loadu(from + Vec::size())};
    const int64_t first = std::min<int64_t>(count, Vec::size());
    return {Vec::loadu(from, first), count > first ? Vec::loadu(from + first, count - first) : Vec(0.0F)};
  } else {
    using Half = at::vec::Vectorized<scalar_t>;
    const auto [one, other] =
        at::vec::convert_to_float<scalar_t>(count >= kPair ? Half::loadu(from) : Half::loadu(from, count));
    return {one, other};
  }
}

template <typename scalar_t>
void store_pair(const Pair& pair, scalar_t* to, int64_t count) {
  using Vec = at::vec::Vectorized<float>;
  if constexpr (std::is_same_v<scalar_t, float>) {
    const int64_t first = std::min<int64_t>(count, Vec::size());
    pair[0].store(to, first);
    if (count > first) pair[1].store(to + first, std::min<int64_t>(count - first, Vec::size()));
  } else {
    at::vec::convert_from_float<scalar_t>(pair[0], pair[1]).store(to, std::min(count, kPair));
  }
}

// run(a number of the dtype), for float32, bfloat16 and float16.
template <typename Run>
void for_dtype(const char* name, const char* argument, const at::Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return run(0.0F);
    case at::kBFloat16: return run(at::BFloat16());
    case at::kHalf: return run(at::Half());
    default:
      TORCH_CHECK_TYPE(false, name, ": ", argument, " must be float32, bfloat16 or float16, got ", dtype_name(tensor));
  }
}

inline float sum_of(const Pair& pair) {
  using Vec = at::vec::Vectorized<float>;
  return at::vec::vec_reduce_all<float>([](const Vec& one, const Vec& other) { return one + other; },
                                        pair[0] + pair[1]);
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
