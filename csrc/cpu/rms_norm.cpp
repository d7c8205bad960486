#include "../checks.h"
#include "half_precision.h"
#include "operators.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

// Numbers below which waking up a second thread takes longer than it helps.
constexpr int64_t kGrain = 32768;

// One row; every one is computed alike, whatever is beside it.
template <typename scalar_t>
void normalise(const scalar_t* x, const scalar_t* weight, int64_t size, float epsilon, float offset, scalar_t* out) {
  Pair squares{Vec(0.0F), Vec(0.0F)};
  for (int64_t i = 0; i < size; i += kPair) {
    const Pair entries = load_pair(x + i, size - i);
    for (int v = 0; v < 2; ++v) squares[v] = at::vec::fmadd(entries[v], entries[v], squares[v]);
  }
  const Vec factor(1 / std::sqrt(sum_of(squares) / static_cast<float>(size) + epsilon));
  for (int64_t i = 0; i < size; i += kPair) {
    Pair entries = load_pair(x + i, size - i);
    for (auto& vector : entries) vector = vector * factor;
    if (weight != nullptr) {
      const Pair scale = load_pair(weight + i, size - i);
      for (int v = 0; v < 2; ++v) entries[v] = entries[v] * (scale[v] + Vec(offset));
    }
    store_pair(entries, out + i, size - i);
  }
}

}  // namespace

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double epsilon, bool offset) {
  const Check check("rms_norm");
  check.memory(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1, "rms_norm: x must have the shape (..., d), got a number");
  const int64_t size = x.size(-1);
  if (weight.has_value()) {
    check.floats(*weight, "weight", {size});
    TORCH_CHECK_TYPE(weight->scalar_type() == x.scalar_type(), "rms_norm: weight must have the dtype of x, ",
                     dtype_name(x), ", got ", dtype_name(*weight));
  }
  const Tensor rows = x.contiguous();
  const Tensor scale = weight.has_value() ? weight->contiguous() : Tensor();
  Tensor out = at::empty_like(rows);
  const int64_t count = size > 0 ? x.numel() / size : 0;
  for_dtype("rms_norm", "x", x, [&](auto number) {
    using scalar_t = decltype(number);
    const auto* from = rows.const_data_ptr<scalar_t>();
    const auto* by = scale.defined() ? scale.const_data_ptr<scalar_t>() : nullptr;
    auto* to = out.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * size; i < end * size; i += size) {
        normalise(from + i, by, size, static_cast<float>(epsilon), offset ? 1.0F : 0.0F, to + i);
      }
    });
  });
  return out;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
