#include "linear_blocks.h"

#include "../checks.h"
#include "bfloat16_matmul.h"
#include "vocabulary_table.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
// Rows of the weight in a tile, a multiple of the rows of every block of registers: with a panel of rows of x, it and
// the product stay in the second-level cache.
constexpr int64_t kEntries = 96;
// Rows of the weight that the derivative works on at a time, so that their part of its columns stays there too.
constexpr int64_t kChunk = 256;
// Words of a panel of x that all entries of a tile are multiplied with at a time, for the same reason, and because each
// part of a sum is rounded for itself.
constexpr int64_t kMostWords = 512;
// Words of x that a thread turns at least.
constexpr int64_t kGrain = 4096;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows (M, K), turned panel by panel: words of K one after the other, with the same word of all rows of a panel side by
// side. Panels are filled up with zeros to a whole number of vectors.
template <typename scalar_t>
class Panels {
 public:
  const int64_t rows;
  const int64_t words;  // of a row; a multiple of kLanes
  const int64_t vectors;
  const int64_t panels;

  explicit Panels(const Tensor& x)
      : rows(x.size(0)),
        words(x.size(1) / kPerWord<scalar_t>),
        vectors(ceil_divide(rows, kLanes)),
        panels(ceil_divide(vectors, kMostVectors)) {
    const int64_t size = vectors * kLanes * words;
    words_ = rows % kLanes == 0 ? at::empty({size}, at::kFloat) : at::zeros({size}, at::kFloat);
    const auto* from = reinterpret_cast<const float*>(x.const_data_ptr<scalar_t>());
    const int64_t stride = x.stride(0) / kPerWord<scalar_t>;
    float* to = words_.mutable_data_ptr<float>();
    at::parallel_for(0, ceil_divide(words, kLanes), std::max<int64_t>(1, kGrain / (rows * kLanes)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t word = begin * kLanes; word < end * kLanes; word += kLanes) {
                         for (int64_t i = 0; i < panels; ++i) {
                           turn(from + word, stride, to + first_row(i) * words + word * columns(i), i);
                         }
                       }
                     });
  }

  int64_t first_row(int64_t panel) const { return vectors * panel / panels * kLanes; }
  int64_t columns(int64_t panel) const { return first_row(panel + 1) - first_row(panel); }
  const scalar_t* panel(int64_t i) const {
    return reinterpret_cast<const scalar_t*>(words_.const_data_ptr<float>() + first_row(i) * words);
  }

 private:
  // A vector of words of one panel.
  void turn(const float* from, int64_t stride, float* to, int64_t panel) const {
    const int64_t end = std::min(first_row(panel + 1), rows);
    int64_t row = first_row(panel);
    for (int64_t column = 0; row + kLanes <= end; row += kLanes, column += kLanes) {
      at::vec::transpose_mxn<float, kLanes, kLanes>(from + row * stride, stride, to + column, columns(panel));
    }
    for (; row < end; ++row) {
      for (int64_t word = 0; word < kLanes; ++word) {
        std::memcpy(to + word * columns(panel) + row - first_row(panel), from + row * stride + word, sizeof(float));
      }
    }
  }

  Tensor words_;
};

// The products of one tile of the weight with one panel, turned back, plus a bias. Of `entries`, as many as fill
// vectors are turned.
template <typename out_t>
void write_rows(const float* products, int64_t entries, int64_t columns, int64_t rows, const float* bias, float* turned,
                out_t* out, int64_t stride) {
  using Vec = at::vec::Vectorized<float>;
  for (int64_t i = 0; i < entries; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      at::vec::transpose_mxn<float, kLanes, kLanes>(products + i * columns + j, columns, turned + j * kEntries + i,
                                                    kEntries);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* line = turned + row * kEntries;
    if (bias != nullptr) {
      each_vector<Vec>(entries, [&](int64_t j, int64_t lanes) {
        (Vec::loadu(line + j, lanes) + Vec::loadu(bias + j, lanes)).store(line + j, lanes);
      });
    }
    at::vec::convert(line, out + row * stride, entries);
  }
}

template <typename scalar_t, typename out_t>
void multiply(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out) {
  const Panels<scalar_t> panels(x);
  const int64_t size = weight.size(0);
  // Smaller tiles where there are more threads than those would be.
  const int64_t each = ceil_divide(ceil_divide(size, at::get_num_threads()), kLanes) * kLanes;
  const int64_t tile = std::clamp(each, kLanes, kEntries);
  const auto* entries = weight.const_data_ptr<scalar_t>();
  const float* offsets = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  auto* result = out.mutable_data_ptr<out_t>();
  at::parallel_for(0, ceil_divide(size, tile), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> products(kEntries * kMostVectors * kLanes);
    std::vector<float> turned(products.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t entry = i * tile;
      const int64_t count = std::min(tile, size - entry);
      for (int64_t panel = 0; panel < panels.panels; ++panel) {
        const int64_t row = panels.first_row(panel);
        const int64_t columns = panels.columns(panel);
        for (int64_t word = 0; word < panels.words; word += kMostWords) {
          const int64_t first = word * kPerWord<scalar_t>;
          BlockProduct<scalar_t>{entries + entry * weight.stride(0) + first,
                                 weight.stride(0),
                                 panels.panel(panel) + first * columns,
                                 columns,
                                 products.data(),
                                 columns,
                                 std::min(kMostWords, panels.words - word),
                                 word > 0}
              .run(count, columns);
        }
        write_rows(products.data(), count, columns, std::min(columns, panels.rows - row),
                   offsets == nullptr ? nullptr : offsets + entry, turned.data(), result + row * out.stride(0) + entry,
                   out.stride(0));
      }
    }
  });
}

void backward(const Tensor& grad, const Tensor& weight, const Tensor& out) {
  const int64_t columns = weight.size(1);
  at::parallel_for(0, ceil_divide(columns, kLanes), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes;
    const int64_t count = std::min(end * kLanes, columns) - first;
    const Matrix own(weight.narrow(1, first, count));
    std::vector<float> sums(grad.size(0) * count);
    PairedTile pairs;
    for (int64_t entry = 0; entry < weight.size(0); entry += kChunk) {
      pairs.load(own, entry, std::min(kChunk, weight.size(0) - entry));
      pairs.add_product(grad.size(0), grad.const_data_ptr<at::BFloat16>() + entry, grad.stride(0), sums.data());
    }
    auto* to = out.mutable_data_ptr<at::BFloat16>() + first;
    for (int64_t row = 0; row < grad.size(0); ++row) {
      at::vec::convert(sums.data() + row * count, to + row * out.stride(0), count);
    }
  });
}
#endif

}  // namespace

bool multiplies_blocks([[maybe_unused]] at::ScalarType dtype, [[maybe_unused]] int64_t size) {
#if defined(CPU_CAPABILITY_AVX512)
  if (dtype == at::kFloat) return true;
  return dtype == at::kBFloat16 && size % 2 == 0 && has_bfloat16_matmul() && !has_bfloat16_tiles();
#else
  return false;
#endif
}

void linear_blocks([[maybe_unused]] const Tensor& x, [[maybe_unused]] const Tensor& weight,
                   [[maybe_unused]] const Tensor& bias, [[maybe_unused]] const Tensor& out) {
#if defined(CPU_CAPABILITY_AVX512)
  const bool wide = out.scalar_type() == at::kFloat;
  if (x.scalar_type() == at::kFloat) {
    multiply<float, float>(x, weight, bias, out);
  } else if (wide) {
    multiply<at::BFloat16, float>(x, weight, bias, out);
  } else {
    multiply<at::BFloat16, at::BFloat16>(x, weight, bias, out);
  }
#else
  TORCH_INTERNAL_ASSERT(false, "no products of blocks in this instruction set");
#endif
}

Tensor linear_backward(const Tensor& grad, const Tensor& weight) {
  const Check check("linear_backward");
  check.memory(grad, "grad");
  check.floats(weight, "weight", {"N", "K"});
  TORCH_CHECK_VALUE(grad.dim() >= 1 && grad.size(-1) == weight.size(0),
                    "linear_backward: grad must have the shape (..., ", weight.size(0), "), got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == weight.scalar_type(), "linear_backward: grad must be ", dtype_name(weight),
                   " as weight is, got ", dtype_name(grad));
  std::vector<int64_t> shape = grad.sizes().vec();
  const int64_t count = c10::multiply_integers(shape.begin(), shape.end() - 1);
  const Tensor rows = grad.reshape({count, weight.size(0)});
  shape.back() = weight.size(1);
#if defined(CPU_CAPABILITY_AVX512)
  if (weight.scalar_type() == at::kBFloat16 && multiplies_blocks(at::kBFloat16, weight.size(0)) && rows.numel() > 0 &&
      Matrix(weight).dense()) {
    Tensor out = at::empty({rows.size(0), weight.size(1)}, rows.options());
    backward(rows.contiguous(), weight, out);
    return out.view(shape);
  }
#endif
  return at::mm(rows, weight).view(shape);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
