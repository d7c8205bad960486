// Matrices of any float dtype and strides, read as rows of acc_t.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// out[i] = source[i * stride] for i < count.
template <typename source_t, typename acc_t>
void convert_strided(const source_t* source, int64_t stride, int64_t count, acc_t* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<acc_t, float> && c10::is_reduced_floating_point_v<source_t>) {
    using Vec = at::vec::Vectorized<float>;
    Vec low;
    Vec high;
    for (; stride == 1 && i + 2 * Vec::size() <= count; i += 2 * Vec::size()) {
      at::vec::load_to_float<source_t>(source + i, low, high);
      low.store(out + i);
      high.store(out + i + Vec::size());
    }
  }
  for (; i < count; ++i) out[i] = static_cast<acc_t>(source[i * stride]);
}

// A tensor (rows, columns) of any float dtype and strides, say a vocabulary table (V, d) or logits (N, V).
struct Matrix {
  explicit Matrix(const at::Tensor& tensor)
      : data(tensor.const_data_ptr()),
        dtype(tensor.scalar_type()),
        rows(tensor.size(0)),
        columns(tensor.size(1)),
        row_stride(tensor.stride(0)),
        column_stride(columns == 1 ? 1 : tensor.stride(1)) {}

  // The same numbers at the same place.
  bool operator==(const Matrix& other) const {
    return data == other.data && dtype == other.dtype && rows == other.rows && columns == other.columns &&
           row_stride == other.row_stride && column_stride == other.column_stride;
  }

  // Whether it is row-major as it lies; not where rows overlap, as those of an expanded tensor do.
  bool dense() const { return column_stride == 1 && row_stride >= columns; }

  template <typename scalar_t>
  const scalar_t* address(int64_t row, int64_t column = 0) const {
    return static_cast<const scalar_t*>(data) + row * row_stride + column * column_stride;
  }

  // Entries [begin, begin + count) of a row.
  template <typename acc_t>
  void copy(int64_t row, int64_t begin, int64_t count, acc_t* out) const {
    switch (dtype) {
      case at::kFloat: return convert_strided(address<float>(row, begin), column_stride, count, out);
      case at::kDouble: return convert_strided(address<double>(row, begin), column_stride, count, out);
      case at::kBFloat16: return convert_strided(address<at::BFloat16>(row, begin), column_stride, count, out);
      default: return convert_strided(address<at::Half>(row, begin), column_stride, count, out);
    }
  }

  // Entries [begin, begin + count) of a row, behind them `filler` up to a whole number of vectors. In place where
  // nothing has to be converted or filled, else in `buffer`.
  template <typename acc_t>
  const acc_t* read(int64_t row, int64_t begin, int64_t count, acc_t filler, acc_t* buffer) const {
    const int64_t padded = round_up(count, at::vec::Vectorized<acc_t>::size());
    if (padded == count && column_stride == 1 && dtype == c10::CppTypeToScalarType<acc_t>::value) {
      return address<acc_t>(row, begin);
    }
    copy(row, begin, count, buffer);
    std::fill(buffer + count, buffer + padded, filler);
    return buffer;
  }

  // Entries [begin, begin + count) of a row, or those there are, into the second-level cache: a tile of many rows takes
  // a few lines of each, which no hardware foresees.
  void prefetch(int64_t row, int64_t begin, int64_t count) const {
    if (column_stride != 1 || row >= rows || begin >= columns) return;
    const auto size = static_cast<int64_t>(c10::elementSize(dtype));
    const char* first = static_cast<const char*>(data) + (row * row_stride + begin) * size;
    for (int64_t i = 0; i < std::min(count, columns - begin) * size; i += 64) __builtin_prefetch(first + i, 0, 2);
  }

  const void* data;
  at::ScalarType dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

inline std::optional<Matrix> optional_matrix(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<Matrix>(tensor) : std::nullopt;
}

// Of a lambda that is called twice: what it captures then stays in registers, where a call would read it again behind
// every store.
#define NABLA_FAST_INLINE __attribute__((always_inline))

// work(index, lanes) for `count` entries, a vector of them at a time, the last one maybe in part.
template <typename Vec, typename Work>
NABLA_FAST_INLINE inline void each_vector(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + Vec::size() <= count; i += Vec::size()) work(i, static_cast<int64_t>(Vec::size()));
  if (i < count) work(i, count - i);
}

// The entries of a vector, one by one. Sums and maxima are made of halves, which the compiler has instructions for.
template <typename acc_t>
struct Lanes {
  static constexpr int64_t kCount = at::vec::Vectorized<acc_t>::size();

  acc_t values[kCount];

  explicit Lanes(const at::vec::Vectorized<acc_t>& vector) { vector.store(values); }

  double sum() const {
    double sums[kCount];
    for (int64_t i = 0; i < kCount; ++i) sums[i] = values[i];
#pragma GCC unroll 4
    for (int64_t half = kCount / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }

  // NaN if one of them is.
  acc_t max() const {
    acc_t largest[kCount];
    std::copy_n(values, kCount, largest);
#pragma GCC unroll 4
    for (int64_t half = kCount / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) {
        const acc_t other = largest[i + half];
        largest[i] = other > largest[i] || other != other ? other : largest[i];
      }
    }
    return largest[0];
  }
};

// A weight of zero takes no part, whatever it would be multiplied by: a banned token may have an infinite gradient.
template <typename acc_t>
at::vec::Vectorized<acc_t> weighted(const at::vec::Vectorized<acc_t>& weight, const at::vec::Vectorized<acc_t>& value) {
  using Vec = at::vec::Vectorized<acc_t>;
  const Vec zero(acc_t(0));
  return Vec::blendv(weight * value, zero, weight == zero);
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
