// Attention of few queries, whose time is that of reading keys and values. A query's result is the same bits whatever
// columns are masked before, between and behind the ones it reads, and whatever other queries there are: its columns
// are gathered first, and everything is added up in their order.
#pragma once

#include "half_precision.h"
#include "operators.h"
#include "registers.h"
#include "token_rows.h"

#include <ATen/Parallel.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Products below which waking up a second thread takes longer than it helps.
constexpr int64_t kAttentionGrain = 131072;
// Columns whose products with a query are added up together.
constexpr int kAtOnce = 4;
// Pairs of vectors of a value that are added up in registers.
constexpr int kPairs = 4;

// The columns that each query reads, one list for each row of the mask.
class Columns {
 public:
  // `width`: how many there are.
  Columns(const OptionalTensor& mask, int64_t width) : width_(width) {
    if (!mask.has_value()) {
      starts_ = {0, width};
      for (int64_t column = 0; column < width; ++column) columns_.push_back(column);
      return;
    }
    const Tensor flags = mask->contiguous();
    const bool* flag = flags.const_data_ptr<bool>();
    const int64_t rows = flags.size(0) * flags.size(1) * flags.size(2);
    per_query_ = flags.size(2) > 1 ? 1 : 0;
    per_head_ = flags.size(1) > 1 ? flags.size(2) : 0;
    per_sequence_ = flags.size(0) > 1 ? flags.size(1) * flags.size(2) : 0;
    starts_.push_back(0);
    for (int64_t row = 0; row < rows; ++row, flag += width) {
      for (int64_t column = 0; column < width; ++column) {
        if (flag[column]) columns_.push_back(column);
      }
      starts_.push_back(static_cast<int64_t>(columns_.size()));
    }
  }

  int64_t width() const { return width_; }
  int64_t row(int64_t sequence, int64_t head, int64_t query) const {
    return sequence * per_sequence_ + head * per_head_ + query * per_query_;
  }
  const int64_t* of(int64_t row) const { return columns_.data() + starts_[row]; }
  int64_t count(int64_t row) const { return starts_[row + 1] - starts_[row]; }

 private:
  int64_t width_;
  // Of the mask's rows: 0 where one serves all.
  int64_t per_sequence_ = 0;
  int64_t per_head_ = 0;
  int64_t per_query_ = 0;
  std::vector<int64_t> columns_;
  std::vector<int64_t> starts_;
};

// One query and head. The keys and values of a column are `stride` numbers after those of the one before.
template <typename scalar_t>
struct Head {
  const scalar_t* keys;
  int64_t key_stride;
  const scalar_t* values;
  int64_t value_stride;

  // weights[i] = query . key of the i-th column.
  void scores(const float* query, int64_t size, const int64_t* columns, int64_t count, float* weights) const {
    int64_t i = 0;
    if (size % kPair == 0) {
      for (; i + kAtOnce <= count; i += kAtOnce) scores<kAtOnce, true>(query, size, columns + i, weights + i);
    }
    for (; i < count; ++i) scores<1, false>(query, size, columns + i, weights + i);
  }

  // `whole`: size is a multiple of kPair.
  template <int count, bool whole>
  void scores(const float* query, int64_t size, const int64_t* columns, float* weights) const {
    Numbers sums[2 * count];
    unrolled<2 * count>([&](auto i) { sums[i] = Numbers(0.0F); });
    for (int64_t d = 0; d < size; d += kPair) {
      const int64_t left = whole ? kPair : size - d;
      const Pair one = load_pair(query + d, left);
      unrolled<count>([&](auto c) {
        const Pair other = load_pair(keys + columns[c] * key_stride + d, left);
        sums[2 * c] = at::vec::fmadd(one[0], other[0], sums[2 * c]);
        sums[2 * c + 1] = at::vec::fmadd(one[1], other[1], sums[2 * c + 1]);
      });
    }
    float vectors[count * Numbers::size()];
    unrolled<count>([&](auto c) { (sums[2 * c] + sums[2 * c + 1]).store(vectors + c * Numbers::size()); });
    float totals[(count + 3) / 4 * 4];
    add_up<count>(vectors, totals);
    std::copy_n(totals, count, weights);
  }

  // out = sum of weights[i] * value of the i-th column, times `factor`.
  void mix(const float* weights, float factor, int64_t size, const int64_t* columns, int64_t count,
           scalar_t* out) const {
    for (int64_t d = 0; d < size; d += kPairs * kPair) {
      Pair sums[kPairs];
      for (auto& sum : sums) sum = {Numbers(0.0F), Numbers(0.0F)};
      for (int64_t i = 0; i < count; ++i) {
        const scalar_t* value = values + columns[i] * value_stride + d;
        const Numbers weight(weights[i]);
        for (int p = 0; p < kPairs; ++p) {
          const int64_t left = size - d - p * kPair;
          if (left <= 0) break;
          const Pair entries = load_pair(value + p * kPair, left);
          for (int v = 0; v < 2; ++v) sums[p][v] = at::vec::fmadd(weight, entries[v], sums[p][v]);
        }
      }
      for (int p = 0; p < kPairs; ++p) {
        const int64_t left = size - d - p * kPair;
        if (left <= 0) break;
        for (auto& vector : sums[p]) vector = vector * Numbers(factor);
        store_pair(sums[p], out + d + p * kPair, left);
      }
    }
  }
};

// weights = exp(weights - their maximum); returns their sum.
float exponentials(float* weights, int64_t count) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, weights[i]);  // drops a NaN, which stays in the sum
  Numbers sum(0.0F);
  for (int64_t i = 0; i < count; i += Numbers::size()) {
    const int64_t left = std::min<int64_t>(count - i, Numbers::size());
    const Numbers power = (Numbers::loadu(weights + i, left) - Numbers(largest)).exp();
    power.store(weights + i, left);
    sum = sum + (left == Numbers::size() ? power : Numbers::set(Numbers(0.0F), power, left));
  }
  return at::vec::vec_reduce_all<float>([](const Numbers& one, const Numbers& other) { return one + other; }, sum);
}

// Queries (B, heads, S, D), keys (B, key heads, T, D) and values (B, key heads, T, E); the last dimension of each lies
// in a row.
template <typename scalar_t>
struct Attention {
  const scalar_t* q;
  c10::IntArrayRef q_strides;
  const scalar_t* k;
  c10::IntArrayRef k_strides;
  const scalar_t* v;
  c10::IntArrayRef v_strides;
  int64_t batch;
  int64_t heads;
  int64_t key_heads;
  int64_t queries;
  int64_t size;        // D
  int64_t value_size;  // E
  float scale;

  // out (B, S, heads, E)
  void run(const Columns& columns, scalar_t* out) const {
    const int64_t sharing = heads / key_heads;  // query heads that share keys
    const int64_t work = std::max<int64_t>(1, columns.width() * (size + value_size));
    const int64_t grain = std::max<int64_t>(1, kAttentionGrain / work);
    at::parallel_for(0, batch * heads * queries, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> weights(columns.width() + Numbers::size());
      std::vector<float> query(size);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t s = row % queries;
        const int64_t h = row / queries % heads;
        const int64_t b = row / queries / heads;
        const scalar_t* from = q + b * q_strides[0] + h * q_strides[1] + s * q_strides[2];
        for (int64_t d = 0; d < size; ++d) query[d] = static_cast<float>(from[d]) * scale;
        const int64_t group = h / sharing;
        const Head<scalar_t> head{k + b * k_strides[0] + group * k_strides[1], k_strides[2],
                                  v + b * v_strides[0] + group * v_strides[1], v_strides[2]};
        const int64_t own = columns.row(b, h, s);
        const int64_t* read = columns.of(own);
        const int64_t count = columns.count(own);
        head.scores(query.data(), size, read, count, weights.data());
        const float sum = exponentials(weights.data(), count);
        head.mix(weights.data(), count > 0 ? 1 / sum : 0.0F, value_size, read, count,
                 out + ((b * queries + s) * heads + h) * value_size);
      }
    });
  }
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
