#include "vocabulary_products.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Of a table's tile, in bytes: half of a usual second-level cache.
constexpr int64_t kTileBytes = 1 << 19;

template <typename acc_t>
at::Tensor matrix(const acc_t* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<acc_t*>(data), {rows, columns}, {stride, 1},
                       at::dtype(c10::CppTypeToScalarType<acc_t>::value));
}

}  // namespace

template <typename acc_t>
int64_t tile_size(int64_t width, int64_t rows) {
  // Few rows make a matmul that is bound by memory, where longer tiles cost nothing; many want their logits cached too.
  const int64_t entry = static_cast<int64_t>(sizeof(acc_t)) * std::max<int64_t>(width + rows, 1);
  return std::clamp<int64_t>(kTileBytes / entry / 64 * 64, 64, 2048);
}

template <typename acc_t>
void multiply(const acc_t* left, int64_t left_stride, const acc_t* right, int64_t right_stride, bool right_transposed,
              int64_t rows, int64_t columns, int64_t inner, bool accumulate, acc_t* out, int64_t out_stride) {
  // These tensors are nobody's leaves: no autograd, no view tracking, in whatever thread this runs.
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor target = matrix(out, rows, columns, out_stride);
  const at::Tensor a = matrix(left, rows, inner, left_stride);
  const at::Tensor b = right_transposed ? matrix(right, columns, inner, right_stride).t()
                                        : matrix(right, inner, columns, right_stride);
  if (accumulate) {
    at::addmm_out(target, target, a, b);
  } else {
    at::mm_out(target, a, b);
  }
}

template <typename acc_t>
const acc_t* read_table(const at::Tensor& table, int64_t begin, int64_t count, std::vector<acc_t>& buffer,
                        int64_t& stride) {
  const StridedRows rows(table);
  const int64_t width = table.size(1);
  if (rows.direct<acc_t>() && rows.row_stride() >= std::max<int64_t>(width, 1)) {
    stride = rows.row_stride();
    return rows.address<acc_t>(begin, 0);
  }
  stride = width;
  buffer.resize(std::max<size_t>(buffer.size(), count * width));
  for (int64_t i = 0; i < count; ++i) rows.copy(begin + i, 0, width, buffer.data() + i * width);
  return buffer.data();
}

template <typename acc_t>
VocabularyProducts<acc_t>::VocabularyProducts(int64_t rows, const at::Tensor& hidden, const at::Tensor& weight,
                                              const std::vector<GradientTerm>& terms)
    : rows_(rows) {
  if (hidden.defined()) {
    logits_product_ = find_or_add(weight);
    products_[logits_product_].blocks.push_back(hidden);
  }
  for (const GradientTerm& term : terms) {
    const int64_t product = find_or_add(term.table);
    auto& blocks = products_[product].blocks;
    if (term.softcap == 0) {
      const auto plain = std::find_if(parts_.begin(), parts_.end(), [&](const Part& part) {
        return part.product == product && part.softcap == 0;
      });
      if (plain != parts_.end()) {
        blocks[plain->block] = blocks[plain->block].add(term.vectors);
        continue;
      }
    }
    parts_.push_back({product, static_cast<int64_t>(blocks.size()), term.softcap, term.factor});
    blocks.push_back(term.vectors);
  }
  for (Product& product : products_) product.stacked = at::cat(product.blocks).contiguous();
}

template <typename acc_t>
int64_t VocabularyProducts<acc_t>::find(const at::Tensor& table) const {
  for (size_t i = 0; i < products_.size(); ++i) {
    if (same_storage(products_[i].table, table)) return static_cast<int64_t>(i);
  }
  return -1;
}

template <typename acc_t>
int64_t VocabularyProducts<acc_t>::find_or_add(const at::Tensor& table) {
  const int64_t found = find(table);
  if (found >= 0) return found;
  products_.push_back({table, {}, {}});
  return static_cast<int64_t>(products_.size()) - 1;
}

template <typename acc_t>
int64_t VocabularyProducts<acc_t>::width() const {
  int64_t widest = 1;
  for (const Product& product : products_) widest = std::max(widest, product.table.size(1));
  return widest;
}

template <typename acc_t>
typename VocabularyProducts<acc_t>::Workspace VocabularyProducts<acc_t>::workspace(int64_t tile) const {
  Workspace workspace;
  workspace.tables.resize(products_.size());
  for (const Product& product : products_) workspace.outputs.emplace_back(product.stacked.size(0) * tile);
  workspace.table_data.resize(products_.size());
  workspace.table_stride.resize(products_.size());
  return workspace;
}

template <typename acc_t>
void VocabularyProducts<acc_t>::compute(int64_t begin, int64_t count, int64_t tile, Workspace& workspace) const {
  for (size_t i = 0; i < products_.size(); ++i) {
    const at::Tensor& stacked = products_[i].stacked;
    const int64_t width = stacked.size(1);
    workspace.table_data[i] =
        read_table<acc_t>(products_[i].table, begin, count, workspace.tables[i], workspace.table_stride[i]);
    multiply(stacked.const_data_ptr<acc_t>(), width, workspace.table_data[i], workspace.table_stride[i], true,
             stacked.size(0), count, width, false, workspace.outputs[i].data(), tile);
  }
}

template <typename acc_t>
acc_t* VocabularyProducts<acc_t>::logits(Workspace& workspace, int64_t row, int64_t tile) const {
  return workspace.outputs[logits_product_].data() + row * tile;
}

template <typename acc_t>
bool VocabularyProducts<acc_t>::gradient(Workspace& workspace, int64_t row, int64_t tile, int64_t count,
                                         acc_t* out) const {
  using Vec = at::vec::Vectorized<acc_t>;
  bool first = true;
  for (const Part& part : parts_) {
    const acc_t* product = workspace.outputs[part.product].data() + (part.block * rows_ + row) * tile;
    const Vec cap(static_cast<acc_t>(part.softcap));
    const Vec factor(static_cast<acc_t>(part.factor * part.softcap));
    for (int64_t i = 0; i < count; i += Vec::size()) {
      Vec value = Vec::loadu(product + i);
      if (part.softcap != 0) value = factor * (value / cap).tanh();
      (first ? value : value + Vec::loadu(out + i)).store(out + i);
    }
    first = false;
  }
  return !first;
}

template class VocabularyProducts<float>;
template class VocabularyProducts<double>;
template int64_t tile_size<float>(int64_t, int64_t);
template int64_t tile_size<double>(int64_t, int64_t);
template void multiply<float>(const float*, int64_t, const float*, int64_t, bool, int64_t, int64_t, int64_t, bool,
                              float*, int64_t);
template void multiply<double>(const double*, int64_t, const double*, int64_t, bool, int64_t, int64_t, int64_t, bool,
                               double*, int64_t);
template const float* read_table<float>(const at::Tensor&, int64_t, int64_t, std::vector<float>&, int64_t&);
template const double* read_table<double>(const at::Tensor&, int64_t, int64_t, std::vector<double>&, int64_t&);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
