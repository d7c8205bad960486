#include "operators.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace nabla_fast::cpu {
namespace {

// A row is cut into parts of fixed length whatever the number of rows or threads, and the parts are merged from left
// to right: a row's statistics are the same bits alone and in a batch.
constexpr int64_t kPart = 8192;
// A block is read twice, for its maximum and for its sums; the second reading comes from the first-level cache.
constexpr int64_t kBlock = 1024;

// exp() of this is zero. Exponents are clamped to it, so that an entry of -inf adds 0 * finite = 0 to the entropy and
// not 0 * -inf = NaN.
template <typename acc_t>
constexpr acc_t kVanishing = std::is_same_v<acc_t, double> ? acc_t(-800) : acc_t(-110);

// Of the entries seen so far, with x = (z - max) / tau. The sums are double: a vocabulary's worth of float32 additions
// would cost digits, and there is one addition per block.
struct State {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;             // sum of exp(x)
  double weighted = 0;        // sum of exp(x) * x
  int64_t token = -1;         // lowest index of the maximum
  bool undefined = false;     // NaN or +inf seen: a maximum would drop the first and exp() choke on the second

  // Makes `value` the maximum: x moves by `shift`, exp(x) by the factor exp(shift).
  void raise_max(double value, int64_t index, double inverse_tau) {
    if (sum > 0) {
      const double shift = (max - value) * inverse_tau;
      const double factor = std::exp(shift);
      weighted = factor > 0 ? factor * (weighted + shift * sum) : 0;
      sum *= factor;
    }
    max = value;
    token = index;
  }

  void merge_right(State other, double inverse_tau) {
    undefined |= other.undefined;
    if (other.token < 0) return;
    if (other.max > max) {
      raise_max(other.max, other.token, inverse_tau);
    } else {
      other.raise_max(max, other.token, inverse_tau);
    }
    sum += other.sum;
    weighted += other.weighted;
  }
};

// Adds `size` entries, the first of which is entry `offset` of its row.
template <typename acc_t>
void add_block(State& state, const acc_t* z, int64_t size, int64_t offset, double inverse_tau) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();

  acc_t block_max = -kInfinity;
  bool undefined = false;
  for (int64_t i = 0; i < size; ++i) {
    undefined |= !(z[i] < kInfinity);
    block_max = z[i] > block_max ? z[i] : block_max;
  }
  state.undefined |= undefined;
  if (state.undefined || block_max == -kInfinity) return;
  if (block_max > state.max) {
    state.raise_max(block_max, offset + (std::find(z, z + size, block_max) - z), inverse_tau);
  }

  const Vec max(static_cast<acc_t>(state.max));
  const Vec scale(static_cast<acc_t>(inverse_tau));
  const Vec vanishing(kVanishing<acc_t>);
  Vec sum(acc_t(0));
  Vec weighted(acc_t(0));
  const auto add = [&](const Vec& entries) {
    const Vec x = at::vec::maximum((entries - max) * scale, vanishing);
    const Vec e = x.exp();
    sum = sum + e;
    weighted = weighted + e * x;
  };
  int64_t i = 0;
  for (; i + Vec::size() <= size; i += Vec::size()) add(Vec::loadu(z + i));
  if (i < size) {
    // The lanes behind the row's end must add nothing.
    std::array<acc_t, Vec::size()> tail;
    tail.fill(-kInfinity);
    std::copy(z + i, z + size, tail.begin());
    add(Vec::loadu(tail.data()));
  }
  std::array<acc_t, Vec::size()> lanes;
  sum.store(lanes.data());
  for (const acc_t lane : lanes) state.sum += lane;
  weighted.store(lanes.data());
  for (const acc_t lane : lanes) state.weighted += lane;
}

// The state of entries [begin, end) of one row of any element type and stride.
template <typename scalar_t>
State reduce_part(const scalar_t* row, int64_t stride, int64_t begin, int64_t end, double inverse_tau) {
  using acc_t = at::opmath_type<scalar_t>;
  State state;
  std::array<acc_t, kBlock> buffer;
  for (int64_t offset = begin; offset < end; offset += kBlock) {
    const int64_t size = std::min(kBlock, end - offset);
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (stride == 1) {
        add_block<acc_t>(state, row + offset, size, offset, inverse_tau);
        continue;
      }
    }
    for (int64_t i = 0; i < size; ++i) buffer[i] = static_cast<acc_t>(row[(offset + i) * stride]);
    add_block<acc_t>(state, buffer.data(), size, offset, inverse_tau);
  }
  return state;
}

template <typename scalar_t>
std::vector<State> reduce_rows(const at::Tensor& logits, double inverse_tau) {
  const int64_t rows = logits.size(0);
  const int64_t columns = logits.size(1);
  const int64_t row_stride = logits.stride(0);
  const int64_t column_stride = logits.stride(1);
  const int64_t parts = (columns + kPart - 1) / kPart;
  const auto* data = logits.const_data_ptr<scalar_t>();

  std::vector<State> states(rows * parts);
  const int64_t grain = std::max<int64_t>(1, kPart / columns);
  at::parallel_for(0, rows * parts, grain, [&](int64_t task_begin, int64_t task_end) {
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t begin = task % parts * kPart;
      states[task] = reduce_part(data + task / parts * row_stride, column_stride, begin,
                                 std::min(begin + kPart, columns), inverse_tau);
    }
  });

  std::vector<State> merged(rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t part = 0; part < parts; ++part) merged[row].merge_right(states[row * parts + part], inverse_tau);
  }
  return merged;
}

template <typename acc_t>
void write_row(const State& state, double inverse_tau, acc_t* max_prob, acc_t* lse, acc_t* entropy, int64_t* token) {
  if (state.undefined || state.token < 0) {
    *max_prob = *lse = *entropy = std::numeric_limits<acc_t>::quiet_NaN();
    *token = -1;
    return;
  }
  const double log_sum = std::log(state.sum);
  *max_prob = static_cast<acc_t>(1 / state.sum);
  *lse = static_cast<acc_t>(state.max * inverse_tau + log_sum);
  // Never below zero, rounding or not: the maximum adds exactly 1 to the sum, and nothing adds to weighted.
  *entropy = static_cast<acc_t>(log_sum - state.weighted / state.sum);
  *token = state.token;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relaxed_stats(const at::Tensor& logits, double tau) {
  TORCH_CHECK(logits.dim() == 2, "relaxed_stats: z must have shape (N, V), got ", logits.sizes());
  TORCH_CHECK(logits.size(1) > 0, "relaxed_stats: z must have at least one column, got ", logits.sizes());
  const double inverse_tau = 1 / tau;
  // Not a normal float: 1 / tau is zero or infinite where float32 rows are scaled by it.
  TORCH_CHECK_VALUE(tau > 0 && std::isnormal(static_cast<float>(inverse_tau)),
                    "relaxed_stats: tau must be positive, with 1 / tau in float32's range, got ", tau);

  const int64_t rows = logits.size(0);
  const auto dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor max_prob = at::empty({rows}, logits.options().dtype(dtype));
  at::Tensor lse = at::empty({rows}, logits.options().dtype(dtype));
  at::Tensor entropy = at::empty({rows}, logits.options().dtype(dtype));
  at::Tensor token = at::empty({rows}, logits.options().dtype(at::kLong));

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "relaxed_stats", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const std::vector<State> states = reduce_rows<scalar_t>(logits, inverse_tau);
    for (int64_t row = 0; row < rows; ++row) {
      write_row<acc_t>(states[row], inverse_tau, max_prob.mutable_data_ptr<acc_t>() + row,
                       lse.mutable_data_ptr<acc_t>() + row, entropy.mutable_data_ptr<acc_t>() + row,
                       token.mutable_data_ptr<int64_t>() + row);
    }
  });
  return {max_prob, lse, entropy, token};
}

}  // namespace nabla_fast::cpu
