// Products of row vectors with vocabulary tables, one tile of the vocabulary at a time.
#pragma once

#include "strided_rows.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

// A summand of the gradient over the vocabulary: vectors (n, d_k) times table^T (V, d_k). `softcap` caps the product.
struct GradientTerm {
  at::Tensor vectors;
  at::Tensor table;
  double softcap = 0;
  double factor = 1;  // on the capped product; fold it into the vectors where there is no cap
};

// The products that one pass over the vocabulary needs: n rows of logits and of the gradient. Each table is read once:
// vectors for the same table share a matmul, and where nothing is capped between them they are added up before it.
template <typename acc_t>
class VocabularyProducts {
 public:
  // `hidden` (n, d) times weight^T are the logits, capped by `softcap`; undefined where the logits are given.
  VocabularyProducts(int64_t rows, const at::Tensor& hidden, const at::Tensor& weight,
                     const std::vector<GradientTerm>& terms);

  // Buffers of one thread, and what its last tile holds.
  struct Workspace {
    std::vector<std::vector<acc_t>> tables;
    std::vector<std::vector<acc_t>> outputs;
    std::vector<const acc_t*> table_data;
    std::vector<int64_t> table_stride;
  };

  Workspace workspace(int64_t tile) const;

  // Products with vocabulary entries [begin, begin + count), count <= tile.
  void compute(int64_t begin, int64_t count, int64_t tile, Workspace& workspace) const;

  // The logits of a row before the cap, `tile` of them.
  acc_t* logits(Workspace& workspace, int64_t row, int64_t tile) const;

  // Adds up the gradient of a row into out[0, count), count a whole number of vectors; false if there is none.
  bool gradient(Workspace& workspace, int64_t row, int64_t tile, int64_t count, acc_t* out) const;

  // Where `table` is one of the tables read: its place, or -1.
  int64_t find(const at::Tensor& table) const;

  bool has_gradient() const { return !parts_.empty(); }

  // Widest row of all tables.
  int64_t width() const;

 private:
  struct Product {
    at::Tensor table;
    std::vector<at::Tensor> blocks;  // (n, d_k) each, until `stacked` joins them
    at::Tensor stacked;
  };
  struct Part {
    int64_t product;
    int64_t block;
    double softcap;
    double factor;
  };

  int64_t find_or_add(const at::Tensor& table);

  int64_t rows_;
  std::vector<Product> products_;
  std::vector<Part> parts_;
  int64_t logits_product_ = -1;
};

// A tile of vocabulary entries whose table rows, `width` acc_t each, stay in the second-level cache.
template <typename acc_t>
int64_t tile_size(int64_t width, int64_t rows);

// out (rows, n) = or += left (rows, k) right^T with right (n, k), or left right with right (k, n): matrices with unit
// column stride.
template <typename acc_t>
void multiply(const acc_t* left, int64_t left_stride, const acc_t* right, int64_t right_stride, bool right_transposed,
              int64_t rows, int64_t columns, int64_t inner, bool accumulate, acc_t* out, int64_t out_stride);

// `table` rows [begin, begin + count) as acc_t: in place or in `buffer`; `stride` is set.
template <typename acc_t>
const acc_t* read_table(const at::Tensor& table, int64_t begin, int64_t count, std::vector<acc_t>& buffer,
                        int64_t& stride);

// Whether two tensors are the same numbers at the same place.
inline bool same_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         a.strides() == b.strides();
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
