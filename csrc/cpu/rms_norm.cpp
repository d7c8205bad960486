#include "../checks.h"
#include "half_precision.h"
#include "operators.h"
#include "token_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

// Numbers below which waking up a second thread takes longer than it helps.
constexpr int64_t kGrain = 32768;

// The gradient of `normalise`: with f the factor, and g the gradient times weight, f (g - x f^2 mean(g x)).
template <typename scalar_t>
void differentiate(const scalar_t* grad, const scalar_t* x, const scalar_t* weight, int64_t size, float epsilon,
                   float offset, scalar_t* out) {
  Pair squares{Vec(0.0F), Vec(0.0F)};
  Pair products = squares;
  const auto scaled = [&](int64_t i) {
    Pair entries = load_pair(grad + i, size - i);
    if (weight != nullptr) {
      const Pair scale = load_pair(weight + i, size - i);
      for (int v = 0; v < 2; ++v) entries[v] = entries[v] * (scale[v] + Vec(offset));
    }
    return entries;
  };
  for (int64_t i = 0; i < size; i += kPair) {
    const Pair entries = load_pair(x + i, size - i);
    const Pair slopes = scaled(i);
    for (int v = 0; v < 2; ++v) {
      squares[v] = at::vec::fmadd(entries[v], entries[v], squares[v]);
      products[v] = at::vec::fmadd(slopes[v], entries[v], products[v]);
    }
  }
  const auto count = static_cast<float>(size);
  const float factor = 1 / std::sqrt(sum_of(squares) / count + epsilon);
  const Vec along(-factor * factor * sum_of(products) / count);
  for (int64_t i = 0; i < size; i += kPair) {
    const Pair entries = load_pair(x + i, size - i);
    Pair slopes = scaled(i);
    for (int v = 0; v < 2; ++v) slopes[v] = at::vec::fmadd(entries[v], along, slopes[v]) * Vec(factor);
    store_pair(slopes, out + i, size - i);
  }
}

// Rows of x (..., d), a weight (d,) if there is one.
struct Rows {
  Rows(const Check& check, const char* name, const Tensor& x, const OptionalTensor& weight) {
    check.memory(x, "x");
    TORCH_CHECK_VALUE(x.dim() >= 1, name, ": x must have the shape (..., d), got a number");
    size = x.size(-1);
    if (weight.has_value()) {
      check.floats(*weight, "weight", {size});
      TORCH_CHECK_TYPE(weight->scalar_type() == x.scalar_type(), name, ": weight must have the dtype of x, ",
                       dtype_name(x), ", got ", dtype_name(*weight));
      scale = weight->contiguous();
    }
    entries = x.contiguous();
    count = size > 0 ? x.numel() / size : 0;
  }

  template <typename scalar_t>
  const scalar_t* weights() const {
    return scale.defined() ? scale.const_data_ptr<scalar_t>() : nullptr;
  }

  // work(where a row begins), by several threads.
  template <typename Work>
  void each(const Work& work) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * size; i < end * size; i += size) work(i);
    });
  }

  Tensor entries;
  Tensor scale;
  int64_t size = 0;
  int64_t count = 0;
};

}  // namespace

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double epsilon, bool offset) {
  const Rows rows(Check("rms_norm"), "rms_norm", x, weight);
  Tensor out = at::empty_like(rows.entries);
  for_dtype("rms_norm", "x", x, [&](auto number) {
    using scalar_t = decltype(number);
    const auto* from = rows.entries.const_data_ptr<scalar_t>();
    const auto* by = rows.weights<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    rows.each([&](int64_t i) {
      normalise(from + i, by, rows.size, static_cast<float>(epsilon), offset ? 1.0F : 0.0F, to + i);
    });
  });
  return out;
}

Tensor rms_norm_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& weight, double epsilon,
                         bool offset) {
  const Check check("rms_norm_backward");
  const Rows rows(check, "rms_norm_backward", x, weight);
  check.memory(grad, "grad");
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "rms_norm_backward: grad must have the shape of x, ", x.sizes(),
                    ", got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "rms_norm_backward: grad must have the dtype of x, ",
                   dtype_name(x), ", got ", dtype_name(grad));
  const Tensor slopes = grad.contiguous();
  Tensor out = at::empty_like(rows.entries);
  for_dtype("rms_norm_backward", "x", x, [&](auto number) {
    using scalar_t = decltype(number);
    const auto* along = slopes.const_data_ptr<scalar_t>();
    const auto* from = rows.entries.const_data_ptr<scalar_t>();
    const auto* by = rows.weights<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    rows.each([&](int64_t i) {
      differentiate(along + i, from + i, by, rows.size, static_cast<float>(epsilon), offset ? 1.0F : 0.0F, to + i);
    });
  });
  return out;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
