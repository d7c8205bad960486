#include "../checks.h"
#include "matrix.h"
#include "operators.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

template <typename acc_t>
Tensor table_rows(const Tensor& table, const Tensor& token) {
  const int64_t rows = token.size(0);
  const int64_t width = table.size(1);
  Tensor out = at::empty({rows, width}, token.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  const Matrix source(table);
  const int64_t* tokens = token.const_data_ptr<int64_t>();
  acc_t* data = out.mutable_data_ptr<acc_t>();
  for (int64_t i = 0; i < rows; ++i) {
    if (tokens[i] < 0) {
      // A row without an argmax has no embedding.
      std::fill_n(data + i * width, width, std::numeric_limits<acc_t>::quiet_NaN());
    } else {
      source.copy(tokens[i], 0, width, data + i * width);
    }
  }
  return out;
}

HardEmbeddings embeddings(const Statistics& statistics, at::TensorList tables) {
  const auto& [max_prob, lse, entropy, token, mask] = statistics;
  std::vector<Tensor> result;
  for (const Tensor& table : tables) {
    result.push_back(lse.scalar_type() == at::kDouble ? table_rows<double>(table, token)
                                                      : table_rows<float>(table, token));
  }
  return {result, token};
}

}  // namespace

HardEmbeddings straight_through_embedding(const Tensor& z, at::TensorList tables, double tau) {
  const Check check("straight_through_embedding");
  check.logits(z);
  check.tables(tables, z.size(1));
  return embeddings(relaxed_stats(z, tau, {}, {}), tables);
}

HardEmbeddings linear_straight_through_embedding(const Tensor& h, const Tensor& weight, double scale, double softcap,
                                                 at::TensorList tables, double tau) {
  const Check check("linear_straight_through_embedding");
  check.product(h, "h", weight, "weight");
  check.tables(tables, weight.size(0));
  return embeddings(linear_relaxed_stats(h, weight, scale, softcap, tau, {}, {}), tables);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
