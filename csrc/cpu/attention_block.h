// What attention of many queries works on: a block of queries of one head, and scores, which lie column by column, with
// the queries in the lanes of vectors. Maxima and sums need no exchange between lanes.
#pragma once

#include "half_precision.h"
#include "operators.h"
#include "strided_matmul.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// What the features of a head are a multiple of, and the queries of a block are filled up to: whole vectors.
constexpr int64_t kUnit = 16;
// Queries of a block.
constexpr int64_t kBlock = 64;

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows (count, size) of float32: those that are there, or copies.
template <typename scalar_t>
class WideRows {
 public:
  WideRows(const scalar_t* from, int64_t stride, int64_t count, int64_t size) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      rows_ = {from, stride};
    } else {
      copies_.resize(count * size);
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t d = 0; d < size; d += kPair) {
          store_pair<float>(load_pair(from + row * stride + d, size - d), copies_.data() + row * size + d, size - d);
        }
      }
      rows_ = {copies_.data(), size};
    }
  }
  WideRows(WideRows&&) = delete;

  Right<const float> rows(int64_t first) const { return {rows_.data + first * rows_.stride, rows_.stride}; }
  Left left(int64_t first) const { return {rows_.data + first * rows_.stride, rows_.stride, 1}; }

 private:
  std::vector<float> copies_;
  Right<const float> rows_{};
};

// A block of rows, times a factor, and the same turned: (size, kBlock). Zeros behind the last row.
class Block {
 public:
  explicit Block(int64_t size) : size_(size), rows_(kBlock * size), turned_(kBlock * size) {}

  template <typename scalar_t>
  void load(const scalar_t* from, int64_t stride, int64_t count, float factor) {
    std::fill(rows_.begin() + count * size_, rows_.end(), 0.0F);
    for (int64_t row = 0; row < count; ++row) {
      float* to = rows_.data() + row * size_;
      for (int64_t d = 0; d < size_; d += kPair) {
        Pair pair = load_pair(from + row * stride + d, size_ - d);
        for (auto& vector : pair) vector = vector * Numbers(factor);
        store_pair(pair, to + d, size_ - d);
      }
    }
    for (int64_t d = 0; d < size_; ++d) {
      for (int64_t row = 0; row < kBlock; ++row) turned_[d * kBlock + row] = rows_[row * size_ + d];
    }
  }

  const float* row(int64_t i) const { return rows_.data() + i * size_; }
  Right<const float> rows() const { return {rows_.data(), size_}; }
  Right<const float> turned() const { return {turned_.data(), kBlock}; }

 private:
  int64_t size_;
  std::vector<float> rows_;
  std::vector<float> turned_;
};

// What is added to scores, in their order: 0 where a query reads a column, -infinity elsewhere; and for each block the
// columns that any of its queries reads.
class Additions {
 public:
  Additions(const OptionalTensor& mask, int64_t queries, int64_t columns)
      : columns_(columns), blocks_(ceil_divide(queries, kBlock)) {
    if (!mask.has_value()) return;
    const Tensor flags = mask->expand({mask->size(0), mask->size(1), queries, columns});
    heads_ = mask->size(1);
    per_sequence_ = mask->size(0) > 1 ? heads_ : 0;
    per_head_ = heads_ > 1 ? 1 : 0;
    const int64_t pieces = mask->size(0) * heads_ * blocks_;
    numbers_ = at::empty({pieces, columns, kBlock}, at::kFloat);
    ranges_.resize(pieces);
    least_.assign(pieces * kBlock, std::numeric_limits<float>::lowest());
    const bool* all = flags.const_data_ptr<bool>();
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece % blocks_ * kBlock;
        const int64_t set = piece / blocks_;
        const bool* own =
            all + set / heads_ * flags.stride(0) + set % heads_ * flags.stride(1) + first * flags.stride(2);
        fill(own, flags.stride(2), flags.stride(3), std::min(kBlock, queries - first), piece);
      }
    });
  }

  int64_t blocks() const { return blocks_; }
  // Of a block of queries: null, or (columns, kBlock), from a column on.
  const float* of(int64_t sequence, int64_t head, int64_t block, int64_t column) const {
    if (!numbers_.defined()) return nullptr;
    return numbers_.const_data_ptr<float>() + (piece(sequence, head, block) * columns_ + column) * kBlock;
  }
  // Of a block of queries: where the search for their largest scores begins. Above -infinity for those that read no
  // column, so that their exponentials are zeros; for others, those of -infinity alone are NaN, as in a softmax.
  const float* least(int64_t sequence, int64_t head, int64_t block) const {
    return numbers_.defined() ? least_.data() + piece(sequence, head, block) * kBlock : nullptr;
  }
  std::pair<int64_t, int64_t> range(int64_t sequence, int64_t head, int64_t block) const {
    return numbers_.defined() ? ranges_[piece(sequence, head, block)] : std::pair<int64_t, int64_t>{0, columns_};
  }

 private:
  int64_t piece(int64_t sequence, int64_t head, int64_t block) const {
    return (sequence * per_sequence_ + head * per_head_) * blocks_ + block;
  }

  void fill(const bool* flags, int64_t row_stride, int64_t column_stride, int64_t count, int64_t piece) {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    float* to = numbers_.mutable_data_ptr<float>() + piece * columns_ * kBlock;
    int64_t first = columns_;
    int64_t last = 0;
    for (int64_t column = 0; column < columns_; ++column, to += kBlock) {
      bool any = false;
      for (int64_t row = 0; row < count; ++row) {
        const bool reads = flags[row * row_stride + column * column_stride];
        to[row] = reads ? 0.0F : kNever;
        if (reads) least_[piece * kBlock + row] = kNever;
        any = any || reads;
      }
      std::fill(to + count, to + kBlock, kNever);
      if (!any) continue;
      first = std::min(first, column);
      last = column + 1;
    }
    ranges_[piece] = {std::min(first, last), last};
  }

  int64_t columns_;
  int64_t blocks_;
  int64_t heads_ = 1;
  // 0 where one serves all.
  int64_t per_sequence_ = 0;
  int64_t per_head_ = 0;
  Tensor numbers_;
  std::vector<float> least_;
  std::vector<std::pair<int64_t, int64_t>> ranges_;
};

// work(vector) for the vectors of a line of a block of `width` queries.
template <typename Work>
void each_lane(int64_t width, const Work& work) {
  for (int64_t lane = 0; lane < width; lane += Numbers::size()) work(lane);
}

// The largest score of each query, and the sum of exp(score - largest), which take the place of `scores` (count,
// kBlock). A query that reads no column has the sum 0.
inline void exponentials(float* scores, const float* additions, const float* least, int64_t count, int64_t width,
                         float* largest, float* sums) {
  each_lane(width, [&](int64_t lane) {
    Numbers most = least == nullptr ? Numbers(-std::numeric_limits<float>::infinity()) : Numbers::loadu(least + lane);
    for (int64_t i = lane; i < count * kBlock; i += kBlock) {
      auto score = Numbers::loadu(scores + i);
      if (additions != nullptr) score = score + Numbers::loadu(additions + i);
      score.store(scores + i);
      most = at::vec::maximum(most, score);
    }
    Numbers sum(0.0F);
    for (int64_t i = lane; i < count * kBlock; i += kBlock) {
      const Numbers power = (Numbers::loadu(scores + i) - most).exp();
      power.store(scores + i);
      sum = sum + power;
    }
    most.store(largest + lane);
    sum.store(sums + lane);
  });
}

// scores (count, kBlock) → probabilities, given the logarithm of the sum of each query's exponentials.
inline void probabilities(float* scores, const float* additions, int64_t count, int64_t width, const float* log_sums) {
  each_lane(width, [&](int64_t lane) {
    const auto log_sum = Numbers::loadu(log_sums + lane);
    for (int64_t i = lane; i < count * kBlock; i += kBlock) {
      auto score = Numbers::loadu(scores + i);
      if (additions != nullptr) score = score + Numbers::loadu(additions + i);
      (score - log_sum).exp().store(scores + i);
    }
  });
}

// slopes = probabilities * (slopes - means), of both (count, kBlock)
inline void times_deviation(float* slopes, const float* chances, int64_t count, int64_t width, const float* means) {
  each_lane(width, [&](int64_t lane) {
    const auto mean = Numbers::loadu(means + lane);
    for (int64_t i = lane; i < count * kBlock; i += kBlock) {
      (Numbers::loadu(chances + i) * (Numbers::loadu(slopes + i) - mean)).store(slopes + i);
    }
  });
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
