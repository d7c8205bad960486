// Reading a two-dimensional float tensor of any dtype and strides as rows of acc_t.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

template <typename source_t, typename acc_t>
void convert_strided(const source_t* source, int64_t stride, int64_t count, acc_t* out) {
  if constexpr (std::is_same_v<acc_t, float> &&
                (std::is_same_v<source_t, c10::BFloat16> || std::is_same_v<source_t, c10::Half>)) {
    if (stride == 1) {
      at::vec::convert(source, out, count);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<acc_t>(source[i * stride]);
}

class StridedRows {
 public:
  explicit StridedRows(const at::Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(tensor.scalar_type()),
        item_(tensor.element_size()),
        row_stride_(tensor.stride(0)),
        column_stride_(tensor.stride(1)) {}

  // Whether a row is an array of acc_t as it lies in memory.
  template <typename acc_t>
  bool direct() const {
    return dtype_ == c10::CppTypeToScalarType<acc_t>::value && column_stride_ == 1;
  }

  int64_t row_stride() const { return row_stride_; }

  template <typename acc_t>
  const acc_t* address(int64_t row, int64_t column) const {
    return reinterpret_cast<const acc_t*>(data_ + (row * row_stride_ + column * column_stride_) * item_);
  }

  template <typename acc_t>
  void copy(int64_t row, int64_t begin, int64_t count, acc_t* out) const {
    switch (dtype_) {
      case at::kFloat:
        return convert_strided(address<float>(row, begin), column_stride_, count, out);
      case at::kDouble:
        return convert_strided(address<double>(row, begin), column_stride_, count, out);
      case at::kBFloat16:
        return convert_strided(address<c10::BFloat16>(row, begin), column_stride_, count, out);
      default:
        return convert_strided(address<c10::Half>(row, begin), column_stride_, count, out);
    }
  }

  // Entries [begin, begin + count) of a row, behind them `filler` up to a whole number of vectors. In place where
  // nothing has to be converted or filled, else in `buffer`.
  template <typename acc_t>
  const acc_t* read(int64_t row, int64_t begin, int64_t count, acc_t filler, acc_t* buffer) const {
    const int64_t padded = round_up(count, at::vec::Vectorized<acc_t>::size());
    if (padded == count && direct<acc_t>()) return address<acc_t>(row, begin);
    copy(row, begin, count, buffer);
    std::fill(buffer + count, buffer + padded, filler);
    return buffer;
  }

 private:
  const char* data_;
  at::ScalarType dtype_;
  int64_t item_;
  int64_t row_stride_;
  int64_t column_stride_;
};

// The entries of a vector, one by one.
template <typename acc_t>
struct Lanes {
  acc_t values[at::vec::Vectorized<acc_t>::size()];

  explicit Lanes(const at::vec::Vectorized<acc_t>& vector) { vector.store(values); }

  double sum() const {
    double total = 0;
    for (const acc_t value : values) total += value;
    return total;
  }

  // NaN if one of them is.
  acc_t max() const {
    acc_t largest = values[0];
    for (const acc_t value : values) largest = value > largest || value != value ? value : largest;
    return largest;
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
