#include "../checks.h"
#include "half_precision.h"
#include "operators.h"
#include "token_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <tuple>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Numbers below which waking up a second thread takes longer than it helps.
constexpr int64_t kGrain = 32768;

// x (B, heads, S, D), which lies in memory however it likes but for a head's features.
template <typename scalar_t>
void turn_all(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out) {
  const int64_t heads = x.size(1);
  const int64_t length = x.size(2);
  const int64_t size = x.size(3);
  const auto* from = x.const_data_ptr<scalar_t>();
  auto* to = out.mutable_data_ptr<scalar_t>();
  const auto* cosines = cos.const_data_ptr<scalar_t>();
  const auto* sines = sin.const_data_ptr<scalar_t>();
  const int64_t shared = cos.size(0) == 1 ? 0 : length * size;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
  at::parallel_for(0, x.size(0) * heads * length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t s = row % length;
      const int64_t h = row / length % heads;
      const int64_t b = row / length / heads;
      const int64_t angles = b * shared + s * size;
      turn(from + b * x.stride(0) + h * x.stride(1) + s * x.stride(2), cosines + angles, sines + angles, size / 2,
           to + b * out.stride(0) + h * out.stride(1) + s * out.stride(2));
    }
  });
}

}  // namespace

TwoTensors rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  const Check check("rotary");
  check.floats(q, "q", {"B", "heads", "S", "D"});
  check.floats(k, "k", {q.size(0), "heads", q.size(2), q.size(3)});
  check.floats(cos, "cos", {cos.dim() > 0 && cos.size(0) == 1 ? 1 : q.size(0), q.size(2), q.size(3)});
  check.floats(sin, "sin", {cos.size(0), q.size(2), q.size(3)});
  TORCH_CHECK_VALUE(q.size(3) % 2 == 0, "rotary: q must have an even number of features, got ", q.size(3));
  for (const Tensor* other : {&k, &cos, &sin}) {
    TORCH_CHECK_TYPE(other->scalar_type() == q.scalar_type(), "rotary: q, k, cos and sin must have one dtype, got ",
                     dtype_name(q), " and ", dtype_name(*other));
  }
  const auto lined = [](const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const Tensor queries = lined(q);
  const Tensor keys = lined(k);
  TwoTensors out{at::empty_like(queries), at::empty_like(keys)};
  const Tensor cosines = cos.contiguous();
  const Tensor sines = sin.contiguous();
  for_dtype("rotary", "q", q, [&](auto number) {
    turn_all<decltype(number)>(queries, cosines, sines, std::get<0>(out));
    turn_all<decltype(number)>(keys, cosines, sines, std::get<1>(out));
  });
  return out;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
