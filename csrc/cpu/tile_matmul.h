// Products of a few hundred rows with a vocabulary table, a tile of the table at a time, so that nothing of the size of
// rows x vocabulary has to be stored. A tile of products has one line per vocabulary entry and one column per row: the
// table, which is large, is read as it lies, and the rows, which are few, are transposed once.
#pragma once

#include "vocabulary_table.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Rows per panel. A tile of products of one panel stays in the first-level cache.
constexpr int64_t kPanel = 64;
// Rows that are multiplied at a time: so many, transposed, stay in the first-level cache too.
constexpr int64_t kStrip = 32;
// Panels are filled up with rows of zeros to a multiple of this: matmul kernels are generated per shape, so few shapes.
constexpr int64_t kPanelUnit = 16;
// Most entries of a vocabulary that make a tile, and most elements of a table in one: a tile and the panels of rows
// share the second-level cache, which is of 512 KiB where there is no AVX512.
constexpr int64_t kMostEntries = 256;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kTileElements = int64_t(1) << 17;
#else
constexpr int64_t kTileElements = int64_t(1) << 16;
#endif
// Rows that are worked on in one pass over a table; it bounds the memory of the accumulators that each thread has.
constexpr int64_t kRowsPerPass = 512;

// work(first row, rows) for all rows, as many at a time as go into one pass.
template <typename Work>
void each_pass(int64_t rows, const Work& work) {
  for (int64_t row = 0; row < rows; row += kRowsPerPass) work(row, std::min(kRowsPerPass, rows - row));
}

// c (m, n) = a (m, k) b (k, n), or c += ..., all row-major.
template <typename acc_t>
void matmul(int64_t m, int64_t n, int64_t k, const acc_t* a, int64_t lda, const acc_t* b, int64_t ldb, acc_t* c,
            int64_t ldc, bool add) {
  if constexpr (std::is_same_v<acc_t, float>) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c);
    return;
  }
  constexpr auto kDtype = c10::CppTypeToScalarType<acc_t>::value;
  // These tensors are nobody's leaves: no autograd, no view tracking, in whatever thread this runs.
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto wrap = [](const acc_t* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<acc_t*>(data), {rows, columns}, {stride, 1}, kDtype);
  };
  at::Tensor out = wrap(c, m, n, ldc);
  if (add) {
    at::addmm_out(out, out, wrap(a, m, k, lda), wrap(b, k, n, ldb));
  } else {
    at::mm_out(out, wrap(a, m, k, lda), wrap(b, k, n, ldb));
  }
}

// products (size, columns) -> transposed (columns, size), lines `stride` apart; columns is a multiple of kPanelUnit.
template <typename acc_t>
void transpose_tile(const acc_t* products, int64_t size, int64_t columns, acc_t* transposed, int64_t stride) {
  int64_t v = 0;
  if constexpr (std::is_same_v<acc_t, float>) {
    for (; v + kPanelUnit <= size; v += kPanelUnit) {
      for (int64_t column = 0; column < columns; column += kPanelUnit) {
        at::vec::transpose_mxn<float, kPanelUnit, kPanelUnit>(products + v * columns + column, columns,
                                                              transposed + column * stride + v, stride);
      }
    }
  }
  for (; v < size; ++v) {
    for (int64_t column = 0; column < columns; ++column) {
      transposed[column * stride + v] = products[v * columns + column];
    }
  }
}

// Rows (N, d), transposed panel by panel, ready to be multiplied with tiles of one table.
template <typename acc_t>
class Rows {
 public:
  Rows(const at::Tensor& rows, const Matrix& table)
      : width_(table.columns),
        rows_(rows.size(0)),
        bfloat16_(rows.scalar_type() == at::kBFloat16 && table.dtype == at::kBFloat16 && width_ % 2 == 0 &&
                  table.dense() && std::is_same_v<acc_t, float> && has_bfloat16_matmul()) {
    at::Tensor lines = rows;
    if (bfloat16_) {
      // Two elements that are multiplied together lie together: as 32-bit words, that is a transposition too.
      lines = at::empty(rows.sizes(), rows.options()).copy_(rows).view(at::kInt);
    } else if (rows.scalar_type() != kDtype) {
      lines = rows.to(kDtype);
    }
    packed_ = at::zeros({padded_rows() * lines.size(1)}, lines.options());
    for (int64_t first = 0; first < rows_; first += strip()) {
      const int64_t count = std::min(strip(), rows_ - first);
      const int64_t padded = std::min(strip(), padded_rows() - first);
      packed_.narrow(0, first * lines.size(1), padded * lines.size(1))
          .view({lines.size(1), padded})
          .narrow(1, 0, count)
          .copy_(lines.narrow(0, first, count).t());
    }
  }

  int64_t panels() const { return (rows_ + kPanel - 1) / kPanel; }
  int64_t columns(int64_t panel) const { return std::min(kPanel, padded_rows() - panel * kPanel); }
  int64_t padded_rows() const { return (rows_ + kPanelUnit - 1) / kPanelUnit * kPanelUnit; }
  int64_t rows() const { return rows_; }
  // Whether the products are taken from the table itself, not from a TableTile.
  bool bfloat16() const { return bfloat16_; }

  // out (size, columns(panel)) = the products of table entries [begin, begin + size) with one panel, or += them.
  void multiply(const Matrix& table, const TableTile<acc_t>& tile, int64_t begin, int64_t size, int64_t panel,
                acc_t* out, bool add) const {
    for (int64_t first = 0; first < columns(panel); first += strip()) {
      multiply_strip(table, tile, begin, size, panel * kPanel + first, std::min(strip(), columns(panel) - first),
                     out + first, columns(panel), add);
    }
  }

 private:
  static constexpr auto kDtype = c10::CppTypeToScalarType<acc_t>::value;

  // bfloat16 takes half of the room, and products of four vectors of columns are the fastest there.
  int64_t strip() const { return bfloat16_ ? kPanel : kStrip; }

  // Rows [row, row + n), which lie packed together.
  void multiply_strip(const Matrix& table, const TableTile<acc_t>& tile, int64_t begin, int64_t size, int64_t row,
                      int64_t n, acc_t* out, int64_t out_stride, bool add) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (bfloat16_) {
        const auto* packed = static_cast<const at::BFloat16*>(packed_.const_data_ptr()) + row * width_;
        matmul_pairs(size, n, width_, table.address<at::BFloat16>(begin), table.row_stride, packed, n, out, out_stride,
                     add);
        return;
      }
    }
    matmul<acc_t>(size, n, width_, tile.data(), tile.stride(), packed_.const_data_ptr<acc_t>() + row * width_, n, out,
                  out_stride, add);
  }

  int64_t width_;
  int64_t rows_;
  bool bfloat16_;
  at::Tensor packed_;
};

// logits = softcap * tanh(scale * product / softcap), in place.
struct HeadTransform {
  double scale;
  double softcap;  // 0: none

  template <typename acc_t>
  void apply(acc_t* products, int64_t size) const {
    using Vec = at::vec::Vectorized<acc_t>;
    if (scale == 1 && softcap == 0) return;
    const Vec factor(static_cast<acc_t>(scale));
    const Vec cap(static_cast<acc_t>(softcap));
    // `size` is a multiple of kPanelUnit.
    for (int64_t i = 0; i < size; i += Vec::size()) {
      Vec z = Vec::loadu(products + i) * factor;
      if (softcap != 0) z = (z / cap).tanh() * cap;
      z.store(products + i);
    }
  }

  // d(logit) / d(product) / scale
  template <typename acc_t>
  acc_t slope(acc_t logit) const {
    if (softcap == 0) return 1;
    const acc_t t = logit / static_cast<acc_t>(softcap);
    return 1 - t * t;
  }
};

// How a vocabulary is cut: one contiguous part per thread, each part into tiles.
struct Split {
  // `width` is the number of elements that are read per vocabulary entry.
  Split(int64_t entries, int64_t width)
      : entries(entries),
        tile(std::clamp<int64_t>(kTileElements / std::max<int64_t>(1, width) / kPanelUnit * kPanelUnit, kPanelUnit,
                                 kMostEntries)),
        tiles((entries + tile - 1) / tile),
        parts(std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tiles))) {}

  // work(part, first tile, last tile) for all parts, on the threads there are.
  template <typename Work>
  void run(const Work& work) const {
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) work(part, first_tile(part), first_tile(part + 1));
      // Some processors hold the state of the last matmul in a thread's registers.
      at::native::cpublas::brgemm_release();
    });
  }

  int64_t first_tile(int64_t part) const { return tiles * part / parts; }
  int64_t part_size(int64_t part) const {
    return std::min(begin(first_tile(part + 1)), entries) - begin(first_tile(part));
  }
  int64_t begin(int64_t index) const { return index * tile; }
  int64_t size(int64_t index) const { return std::min(tile, entries - index * tile); }

  int64_t entries;
  int64_t tile;
  int64_t tiles;
  int64_t parts;
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
