// A vocabulary table (V, d) and tiles of it, as they are multiplied: as they lie, converted, or in pairs for bfloat16.
#pragma once

#include "bfloat16_matmul.h"
#include "matrix.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// A tile of a table as acc_t with elements side by side: the table itself where it is that already, else a copy.
template <typename acc_t>
class TableTile {
 public:
  void load(const Matrix& table, int64_t begin, int64_t size) {
    if (table.dtype == c10::CppTypeToScalarType<acc_t>::value && table.dense()) {
      data_ = table.address<acc_t>(begin);
      stride_ = table.row_stride;
      return;
    }
    stride_ = table.columns;
    buffer_.resize(size * stride_);
    data_ = buffer_.data();
    for (int64_t i = 0; i < size; ++i) table.copy(begin + i, 0, stride_, buffer_.data() + i * stride_);
  }

  const acc_t* data() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  std::vector<acc_t> buffer_;
  const acc_t* data_ = nullptr;
  int64_t stride_ = 0;
};

// Whether factors of a table's products are rounded to bfloat16 where the logits were made from `source`: beside a
// bfloat16 table and logits that were bfloat16 already, their further bits are noise that costs half of the speed.
inline bool rounds_factors(at::ScalarType source, const Matrix& table) {
  return source == at::kBFloat16 && table.dtype == at::kBFloat16 && table.dense() && has_bfloat16_matmul();
}

// Vectors (N, d) as they are multiplied with a table (V, d).
inline at::Tensor rounded_beside(const at::Tensor& table, const at::Tensor& vectors, at::ScalarType source) {
  return rounds_factors(source, Matrix(table)) ? vectors.to(at::kBFloat16) : vectors;
}

// (N,) zeros, NaN for rows of `vectors` (N, d) that hold NaN or an infinity.
inline at::Tensor zero_or_nan(const at::Tensor& vectors) { return vectors.mul(0).sum(1); }

// A tile of a bfloat16 table for which `rounds_factors` holds. Two entries lie together, element by element, as the
// hardware multiplies them with two weights.
class PairedTile {
 public:
  void load(const Matrix& table, int64_t begin, int64_t size) {
    size_ = size;
    width_ = table.columns;
    pairs_.resize((size + 1) / 2 * width_);
    for (int64_t i = 0; i < size; i += 2) {
      table.prefetch(begin + i + kAhead, 0, width_);
      table.prefetch(begin + i + kAhead + 1, 0, width_);
      const auto* first = table.address<uint16_t>(begin + i);
      uint32_t* pairs = pairs_.data() + i / 2 * width_;
      if (i + 1 == size) {
        std::copy_n(first, width_, pairs);  // beside an entry of zeros
        continue;
      }
      const auto* second = table.address<uint16_t>(begin + i + 1);
      for (int64_t j = 0; j < width_; ++j) pairs[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
    }
  }

  // sums (rows, width) += weights (rows, size) times the tile, for an even `size`.
  void add_product(int64_t rows, const at::BFloat16* weights, int64_t stride, float* sums) const {
    matmul_pairs(rows, width_, size_, weights, stride, reinterpret_cast<const at::BFloat16*>(pairs_.data()), width_,
                 sums, width_, true);
  }

  // The same with weights that are rounded once, for any `size`.
  void add_product(int64_t rows, const float* weights, int64_t stride, float* sums) {
    const int64_t even = (size_ + 1) / 2 * 2;
    rounded_.resize(rows * even);
    for (int64_t row = 0; row < rows; ++row)
      round_to_pairs(weights + row * stride, size_, rounded_.data() + row * even);
    matmul_pairs(rows, width_, even, rounded_.data(), even, reinterpret_cast<const at::BFloat16*>(pairs_.data()),
                 width_, sums, width_, true);
  }

 private:
  // Entries between those that are read and those that are fetched from memory.
  static constexpr int64_t kAhead = 8;

  int64_t size_ = 0;
  int64_t width_ = 0;
  std::vector<uint32_t> pairs_;
  std::vector<at::BFloat16> rounded_;
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
