#include "../checks.h"
#include "operators.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Below this many tokens a second thread costs more than it saves.
constexpr int64_t kTokensPerTask = 1 << 15;

}  // namespace

std::tuple<at::Tensor, at::Tensor> token_diff(const at::Tensor& old_tokens, const at::Tensor& new_tokens) {
  const Check check("token_diff");
  check.integers(old_tokens, "old", {"B", "m"});
  check.integers(new_tokens, "new", {old_tokens.size(0), old_tokens.size(1)});
  const int64_t rows = old_tokens.size(0);
  const int64_t length = old_tokens.size(1);
  at::Tensor first = at::empty({rows}, old_tokens.options());
  at::Tensor count = at::empty({rows}, old_tokens.options());
  const auto before = old_tokens.accessor<int64_t, 2>();
  const auto after = new_tokens.accessor<int64_t, 2>();
  auto* first_out = first.mutable_data_ptr<int64_t>();
  auto* count_out = count.mutable_data_ptr<int64_t>();

  const int64_t grain = std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, length));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto a = before[row];
      const auto b = after[row];
      int64_t position = 0;
      while (position < length && a[position] == b[position]) ++position;
      first_out[row] = position;
      int64_t changed = 0;
      for (; position < length; ++position) changed += a[position] != b[position];
      count_out[row] = changed;
    }
  });
  return {first, count};
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
