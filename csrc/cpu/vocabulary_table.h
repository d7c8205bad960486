// A vocabulary table (V, d) and tiles of it, as they are multiplied: as they lie, converted, or in pairs for bfloat16.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Whether bfloat16 products that accumulate in float32 run on the hardware's own instructions.
inline bool has_bfloat16_matmul() {
#if defined(CPU_CAPABILITY_AVX512) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
  static const bool works = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    try {
      // Only trying tells whether this torch was built with it.
      constexpr int64_t kColumns = 16;
      const std::vector<at::BFloat16> ones(2 * kColumns, at::BFloat16(1));
      std::vector<float> product(kColumns);
      at::native::cpublas::brgemm(1, kColumns, 2, 2, kColumns, kColumns, false, ones.data(), ones.data(),
                                  product.data());
      at::native::cpublas::brgemm_release();
      return product[0] == 2;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return works && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

// Some processors hold the state of the last matmul in a thread's registers.
inline void release_matmul() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  at::native::cpublas::brgemm_release();
#endif
}

// A vocabulary table (V, d) of any float dtype and strides.
struct Table {
  explicit Table(const at::Tensor& tensor)
      : data(tensor.const_data_ptr()),
        dtype(tensor.scalar_type()),
        entries(tensor.size(0)),
        width(tensor.size(1)),
        entry_stride(tensor.stride(0)),
        element_stride(tensor.size(1) == 1 ? 1 : tensor.stride(1)) {}

  template <typename scalar_t>
  const scalar_t* entry(int64_t index) const {
    return static_cast<const scalar_t*>(data) + index * entry_stride;
  }

  // The same numbers at the same place.
  bool operator==(const Table& other) const {
    return data == other.data && dtype == other.dtype && entries == other.entries && width == other.width &&
           entry_stride == other.entry_stride && element_stride == other.element_stride;
  }

  // Whether its tiles are matrices as they lie; not where entries overlap, as those of an expanded tensor do.
  bool dense() const { return element_stride == 1 && entry_stride >= width; }

  const void* data;
  at::ScalarType dtype;
  int64_t entries;
  int64_t width;
  int64_t entry_stride;
  int64_t element_stride;
};

template <typename scalar_t, typename acc_t>
void convert_line(const scalar_t* source, int64_t stride, int64_t size, acc_t* target) {
  int64_t i = 0;
  if constexpr (std::is_same_v<acc_t, float> && c10::is_reduced_floating_point_v<scalar_t>) {
    using Vec = at::vec::Vectorized<float>;
    Vec low;
    Vec high;
    for (; stride == 1 && i + 2 * Vec::size() <= size; i += 2 * Vec::size()) {
      at::vec::load_to_float<scalar_t>(source + i, low, high);
      low.store(target + i);
      high.store(target + i + Vec::size());
    }
  }
  for (; i < size; ++i) target[i] = static_cast<acc_t>(source[i * stride]);
}

// A tile of a table as acc_t with elements side by side: the table itself where it is that already, else a copy.
template <typename acc_t>
class TableTile {
 public:
  void load(const Table& table, int64_t begin, int64_t size) {
    if (table.dtype == c10::CppTypeToScalarType<acc_t>::value && table.dense()) {
      data_ = table.entry<acc_t>(begin);
      stride_ = table.entry_stride;
      return;
    }
    buffer_.resize(size * table.width);
    data_ = buffer_.data();
    stride_ = table.width;
    switch (table.dtype) {
      case at::kBFloat16: return convert<at::BFloat16>(table, begin, size);
      case at::kHalf: return convert<at::Half>(table, begin, size);
      case at::kFloat: return convert<float>(table, begin, size);
      case at::kDouble: return convert<double>(table, begin, size);
      default: TORCH_CHECK_TYPE(false, "tables must be of a float dtype, got ", table.dtype);
    }
  }

  const acc_t* data() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  template <typename scalar_t>
  void convert(const Table& table, int64_t begin, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      convert_line(table.entry<scalar_t>(begin + i), table.element_stride, table.width,
                   buffer_.data() + i * table.width);
    }
  }

  std::vector<acc_t> buffer_;
  const acc_t* data_ = nullptr;
  int64_t stride_ = 0;
};

// Whether factors of a table's products are rounded to bfloat16 where the logits were made from `source`: beside a
// bfloat16 table and logits that were bfloat16 already, their further bits are noise that costs half of the speed.
inline bool rounds_factors(at::ScalarType source, const Table& table) {
  return source == at::kBFloat16 && table.dtype == at::kBFloat16 && table.dense() && has_bfloat16_matmul();
}

// Vectors (N, d) as they are multiplied with a table (V, d).
inline at::Tensor rounded_beside(const at::Tensor& table, const at::Tensor& vectors, at::ScalarType source) {
  return rounds_factors(source, Table(table)) ? vectors.to(at::kBFloat16) : vectors;
}

// (N,) zeros, NaN for rows of `vectors` (N, d) that hold NaN or an infinity.
inline at::Tensor zero_or_nan(const at::Tensor& vectors) { return vectors.mul(0).sum(1); }

// A tile of a bfloat16 table for which `rounds_factors` holds. Two entries lie together, element by element, as the
// hardware multiplies them with two weights.
class PairedTile {
 public:
  void load(const Table& table, int64_t begin, int64_t size) {
    size_ = size;
    width_ = table.width;
    pairs_.resize((size + 1) / 2 * width_);
    for (int64_t i = 0; i < size; i += 2) {
      const auto* first = table.entry<uint16_t>(begin + i);
      uint32_t* pairs = pairs_.data() + i / 2 * width_;
      if (i + 1 == size) {
        std::copy_n(first, width_, pairs);  // beside an entry of zeros
        continue;
      }
      const auto* second = table.entry<uint16_t>(begin + i + 1);
      for (int64_t j = 0; j < width_; ++j) pairs[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
    }
  }

  // sums (rows, width) += weights (rows, size) times the tile. The weights lie `stride` apart and are rounded once.
  void add_product(int64_t rows, const float* weights, int64_t stride, float* sums) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
    const int64_t even = (size_ + 1) / 2 * 2;
    rounded_.resize(rows * even);
    for (int64_t row = 0; row < rows; ++row) {
      at::BFloat16* line = rounded_.data() + row * even;
      at::vec::convert(weights + row * stride, line, size_);
      if (size_ < even) line[size_] = 0;
    }
    at::native::cpublas::brgemm(rows, width_, even, even, width_, width_, true, rounded_.data(),
                                reinterpret_cast<const at::BFloat16*>(pairs_.data()), sums);
#endif
  }

 private:
  int64_t size_ = 0;
  int64_t width_ = 0;
  std::vector<uint32_t> pairs_;
  std::vector<at::BFloat16> rounded_;
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
