// The products that a pass over the vocabulary needs, turned so that those of one row lie side by side.
#pragma once

#include "tile_matmul.h"
#include "vocabulary_pass.h"

#include <ATen/ops/add.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Rows between one that is read and one that is fetched from memory, where each has few lines in a tile.
constexpr int64_t kRowsAhead = 4;

// Logits and gradient of n rows, a panel of rows and a tile of the vocabulary at a time. Each table is read once,
// however many products or sums are taken with it.
template <typename acc_t>
class VocabularyProducts {
 public:
  // Tensors that are not needed are undefined: `hidden` and `weight` where the logits are given, and `values`, with
  // which weights are multiplied. `source` is the dtype that those are made from.
  VocabularyProducts(const at::Tensor& hidden, const at::Tensor& weight, const HeadTransform& transform,
                     const std::vector<GradientTerm>& terms, const at::Tensor& values, at::ScalarType source)
      : transform_(transform) {
    if (hidden.defined()) logits_ = add_operand(hidden, weight);
    for (const GradientTerm& term : added_up(terms)) {
      if (term.softcap == 0 && term.factor == 1) {
        plain_.push_back(add_operand(term.vectors, term.table));
      } else {
        scaled_.push_back({add_operand(term.vectors, term.table), term.softcap, term.factor});
      }
    }
    if (values.defined()) {
      values_ = find_or_add(values);
      rounds_ = std::is_same_v<acc_t, float> && rounds_factors(source, tables_[values_]);
      if (!rounds_) converted_[values_] = true;
    }
  }

  // Buffers of one thread, and what is in them.
  struct Workspace {
    std::vector<TableTile<acc_t>> tables;
    PairedTile values;
    std::vector<acc_t> products;  // (tile, columns of the panel)
    std::vector<acc_t> sum;
    std::vector<acc_t> logits;  // (kPanel, tile)
    std::vector<acc_t> gradient;
  };

  Workspace workspace(int64_t tile) const {
    Workspace workspace;
    workspace.tables.resize(tables_.size());
    for (auto* buffer : {&workspace.products, &workspace.sum, &workspace.logits, &workspace.gradient}) {
      buffer->resize(kPanel * tile);
    }
    return workspace;
  }

  // Makes vocabulary entries [begin, begin + size) those that `compute` takes.
  void load(int64_t begin, int64_t size, Workspace& workspace) const {
    for (size_t i = 0; i < tables_.size(); ++i) {
      if (converted_[i]) workspace.tables[i].load(tables_[i], begin, size);
    }
    if (rounds_) workspace.values.load(tables_[values_], begin, size);
  }

  // Logits and gradient of a panel of rows, `tile` apart from row to row; the logits of as many rows as the panel is
  // filled up to.
  void compute(int64_t begin, int64_t size, int64_t panel, int64_t tile, Workspace& workspace, acc_t* logits) const {
    if (logits_) {
      const int64_t columns = logits_->rows.columns(panel);
      multiply(*logits_, begin, size, panel, false, workspace, workspace.products);
      transform_.apply(workspace.products.data(), size * columns);
      transpose_tile(workspace.products.data(), size, columns, logits, tile);
    }
    if (!has_gradient()) return;
    bool add = false;
    for (const Operand& operand : plain_) {
      multiply(operand, begin, size, panel, add, workspace, workspace.sum);
      add = true;
    }
    for (const Scaled& scaled : scaled_) {
      multiply(scaled.operand, begin, size, panel, false, workspace, workspace.products);
      const int64_t count = size * scaled.operand.rows.columns(panel);
      HeadTransform{1, scaled.softcap}.apply(workspace.products.data(), count);
      const auto factor = static_cast<acc_t>(scaled.factor);
      for (int64_t i = 0; i < count; ++i) {
        workspace.sum[i] = (add ? workspace.sum[i] : acc_t(0)) + factor * workspace.products[i];
      }
      add = true;
    }
    const int64_t columns = (plain_.empty() ? scaled_[0].operand : plain_[0]).rows.columns(panel);
    transpose_tile(workspace.sum.data(), size, columns, workspace.gradient.data(), tile);
  }

  // sums (rows, k) += weights (rows, size), `stride` apart, times the tile (size, k) of `values`.
  void add_values(int64_t rows, int64_t size, const acc_t* weights, int64_t stride, Workspace& workspace,
                  acc_t* sums) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (rounds_) return workspace.values.add_product(rows, weights, stride, sums);
    }
    const TableTile<acc_t>& values = workspace.tables[values_];
    const int64_t width = tables_[values_].columns;
    matmul<acc_t>(rows, width, size, weights, stride, values.data(), values.stride(), sums, width, true);
  }

  bool has_gradient() const { return !plain_.empty() || !scaled_.empty(); }

  // Elements that are read per vocabulary entry.
  int64_t width() const {
    int64_t width = 0;
    for (const Matrix& table : tables_) width += table.columns;
    return width;
  }

 private:
  struct Operand {
    size_t table;
    Rows<acc_t> rows;
  };
  struct Scaled {
    Operand operand;
    double softcap;
    double factor;
  };

  // Terms of one table without a cap or factor are one product of the sum of their vectors, if no sum is rounded.
  static std::vector<GradientTerm> added_up(const std::vector<GradientTerm>& terms) {
    constexpr auto kDtype = c10::CppTypeToScalarType<acc_t>::value;
    std::vector<GradientTerm> sums;
    for (const GradientTerm& term : terms) {
      const auto same = std::find_if(sums.begin(), sums.end(), [&](const GradientTerm& sum) {
        return sum.softcap == 0 && term.softcap == 0 && sum.factor == 1 && term.factor == 1 &&
               Matrix(sum.table) == Matrix(term.table) && sum.vectors.scalar_type() == kDtype &&
               term.vectors.scalar_type() == kDtype;
      });
      if (same == sums.end()) {
        sums.push_back(term);
      } else {
        same->vectors = same->vectors.add(term.vectors);
      }
    }
    return sums;
  }

  Operand add_operand(const at::Tensor& vectors, const at::Tensor& tensor) {
    const size_t table = find_or_add(tensor);
    Operand operand{table, Rows<acc_t>(vectors, tables_[table])};
    if (!operand.rows.bfloat16()) converted_[table] = true;
    return operand;
  }

  size_t find_or_add(const at::Tensor& tensor) {
    const Matrix table(tensor);
    const auto found = std::find(tables_.begin(), tables_.end(), table);
    if (found != tables_.end()) return found - tables_.begin();
    tables_.push_back(table);
    converted_.push_back(false);
    return tables_.size() - 1;
  }

  void multiply(const Operand& operand, int64_t begin, int64_t size, int64_t panel, bool add,
                const Workspace& workspace, std::vector<acc_t>& out) const {
    operand.rows.multiply(tables_[operand.table], workspace.tables[operand.table], begin, size, panel, out.data(), add);
  }

  HeadTransform transform_;
  std::vector<Matrix> tables_;
  std::vector<bool> converted_;  // whether a table's tile is needed as acc_t
  std::optional<Operand> logits_;
  std::vector<Operand> plain_;
  std::vector<Scaled> scaled_;
  size_t values_ = 0;
  bool rounds_ = false;  // weights, beside `values`
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
