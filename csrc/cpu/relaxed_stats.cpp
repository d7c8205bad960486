#include "../checks.h"
#include "online_softmax.h"
#include "operators.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <type_traits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Sums that a lane of the vectors is added to in turn.
constexpr int kSums = 4;
// A row is cut into parts of fixed length whatever the number of rows or threads, and the parts are merged from left
// to right in double: a row's statistics are the same bits alone and in a batch. The length is 256 additions to each
// sum: what a float32 bears of one value that is added again and again.
constexpr int64_t kPart = 256 * kSums * at::vec::Vectorized<float>::size();
// Vectors that wait in registers while it is seen whether one of them raises the maximum.
constexpr int kVectors = 8;
// A row is read once, from memory: so far ahead, the hardware's own prefetching, which stops at a page, is too late.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kLineBytes = 64;

template <typename acc_t>
constexpr int64_t kBlock = kVectors * at::vec::Vectorized<acc_t>::size();

template <typename scalar_t, typename Vec>
void load_block(const scalar_t* z, std::array<Vec, kVectors>& x) {
  if constexpr (std::is_same_v<scalar_t, typename Vec::value_type>) {
    for (int k = 0; k < kVectors; ++k) x[k] = Vec::loadu(z + k * Vec::size());
  } else {
    for (int k = 0; k < kVectors; k += 2) at::vec::load_to_float<scalar_t>(z + k * Vec::size(), x[k], x[k + 1]);
  }
}

// Adds up one part of a row, block by block.
template <typename scalar_t>
class Reducer {
  using acc_t = at::opmath_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;

 public:
  explicit Reducer(double inverse_tau)
      : inverse_tau_(inverse_tau), scale_(static_cast<acc_t>(inverse_tau * Power<acc_t>::kUnits)) {}

  void add_block(const scalar_t* z, int64_t offset) {
    std::array<Vec, kVectors> x;
    for (int64_t line = 0; line < kBlock<acc_t> * int64_t(sizeof(scalar_t)); line += kLineBytes) {
      // As a number: a pointer so far behind a buffer has no meaning.
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(z) + kPrefetchBytes + line));
    }
    load_block(z, x);
    // clamp_min is the bare instruction. It may drop a NaN, which the sum below will show.
    const Vec max =
        at::vec::clamp_min(at::vec::clamp_min(at::vec::clamp_min(x[0], x[1]), at::vec::clamp_min(x[2], x[3])),
                           at::vec::clamp_min(at::vec::clamp_min(x[4], x[5]), at::vec::clamp_min(x[6], x[7])));
    // As seldom as the logarithm of the row's length, where the order is random.
    if ((max > max_).zero_mask() != kNoLane) raise_max(max, offset);
    const Vec lowest(Power<acc_t>::kLowest);
    for (int k = 0; k < kVectors; ++k) {
      const Vec y = at::vec::clamp_min((x[k] - subtract_) * scale_, lowest);
      const Vec e = Power<acc_t>::of(y);
      sum_[k % kSums] = sum_[k % kSums] + e;
      weighted_[k % kSums] = at::vec::fmadd(e, y, weighted_[k % kSums]);
    }
  }

  // The last entries of the part, less than a block of them.
  void add_tail(const scalar_t* z, int64_t size, int64_t offset) {
    std::array<scalar_t, kBlock<acc_t>> padded;
    padded.fill(-std::numeric_limits<scalar_t>::infinity());
    std::copy(z, z + size, padded.begin());
    add_block(padded.data(), offset);
  }

  // The block that holds the maximum begins here, if any entry is above -inf.
  int64_t max_offset() const { return max_offset_; }

  State state() const {
    State state;
    state.max = scalar_max_;
    const auto plus = [](const Vec& a, const Vec& b) { return a + b; };
    const auto total = [&](const std::array<Vec, kSums>& sums) {
      return at::vec::vec_reduce_all<acc_t>(plus, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    };
    state.sum_exp = total(sum_);
    state.sum_exp_logit = total(weighted_) / Power<acc_t>::kUnits;
    return state;
  }

 private:
  static constexpr int kNoLane = Vec::size() == 32 ? -1 : (1 << Vec::size()) - 1;

  static std::array<Vec, kSums> zeros() {
    const Vec zero(acc_t(0));
    return {zero, zero, zero, zero};
  }

  void raise_max(const Vec& block_max, int64_t offset) {
    const auto larger = [](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); };
    const acc_t value = at::vec::vec_reduce_all<acc_t>(larger, at::vec::clamp_min(max_, block_max));
    if (max_offset_ >= 0) {
      const double shift = (static_cast<double>(scalar_max_) - value) * inverse_tau_;
      const acc_t factor = static_cast<acc_t>(std::exp(shift));
      const Vec units(factor > 0 ? static_cast<acc_t>(shift * Power<acc_t>::kUnits) : acc_t(0));
      for (int k = 0; k < kSums; ++k) {
        weighted_[k] = (weighted_[k] + units * sum_[k]) * Vec(factor);
        sum_[k] = sum_[k] * Vec(factor);
      }
    }
    scalar_max_ = value;
    max_offset_ = offset;
    max_ = Vec(value);
    subtract_ = max_;
  }

  double inverse_tau_;
  Vec scale_;
  Vec max_{-std::numeric_limits<acc_t>::infinity()};
  Vec subtract_{acc_t(0)};  // the maximum, or 0 while there is none: -inf - -inf would be NaN
  std::array<Vec, kSums> sum_ = zeros();
  std::array<Vec, kSums> weighted_ = zeros();
  acc_t scalar_max_ = -std::numeric_limits<acc_t>::infinity();
  int64_t max_offset_ = -1;
};

// The state of `size` entries in a row, the first of which is entry `first` of its row.
template <typename scalar_t>
State reduce_part(const scalar_t* z, int64_t size, int64_t first, double inverse_tau) {
  using acc_t = at::opmath_type<scalar_t>;
  constexpr int64_t block = kBlock<acc_t>;
  Reducer<scalar_t> reducer(inverse_tau);
  int64_t offset = 0;
  for (; offset + block <= size; offset += block) reducer.add_block(z + offset, offset);
  if (offset < size) reducer.add_tail(z + offset, size - offset, offset);
  State state = reducer.state();
  if (reducer.max_offset() >= 0) {
    const auto max = static_cast<acc_t>(state.max);
    const scalar_t* begin = z + reducer.max_offset();
    const scalar_t* end = std::min(begin + block, z + size);
    const scalar_t* position = std::find_if(begin, end, [&](scalar_t value) { return acc_t(value) == max; });
    state.add_hard(state.max, first + (position - z));
  }
  return state;
}

template <typename scalar_t>
std::vector<State> reduce_rows(const at::Tensor& z, double inverse_tau) {
  const int64_t rows = z.size(0);
  const int64_t columns = z.size(1);
  const int64_t row_stride = z.stride(0);
  const int64_t column_stride = z.stride(1);
  const int64_t parts = (columns + kPart - 1) / kPart;
  const auto* data = z.const_data_ptr<scalar_t>();

  std::vector<State> states(rows * parts);
  const int64_t grain = std::max<int64_t>(1, kPart / columns);
  at::parallel_for(0, rows * parts, grain, [&](int64_t task_begin, int64_t task_end) {
    std::vector<scalar_t> gathered(column_stride == 1 ? 0 : std::min(kPart, columns));
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t first = task % parts * kPart;
      const int64_t size = std::min(kPart, columns - first);
      const scalar_t* part = data + task / parts * row_stride + first * column_stride;
      if (column_stride != 1) {
        for (int64_t i = 0; i < size; ++i) gathered[i] = part[i * column_stride];
        part = gathered.data();
      }
      states[task] = reduce_part(part, size, first, inverse_tau);
    }
  });

  std::vector<State> merged(rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t part = 0; part < parts; ++part) merged[row].merge(states[row * parts + part], inverse_tau);
  }
  return merged;
}

}  // namespace

Statistics relaxed_stats(const at::Tensor& z, double tau, std::optional<double> entropy_threshold,
                         std::optional<double> confidence_threshold) {
  const Check check("relaxed_stats");
  check.logits(z);
  const double inverse_tau = check.inverse_of(tau);
  Statistics statistics;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, z.scalar_type(), "relaxed_stats", [&] {
    statistics =
        relaxed_statistics<at::opmath_type<scalar_t>>(reduce_rows<scalar_t>(z, inverse_tau), z.size(0), inverse_tau,
                                                      {entropy_threshold, confidence_threshold}, z.options());
  });
  return statistics;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
