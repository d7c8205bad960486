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

void check_tables(const char* name, at::TensorList tables, int64_t vocabulary) {
  const Check check(name);
  for (size_t i = 0; i < tables.size(); ++i) {
    check.table(tables[i], "tables", vocabulary, "d_k", static_cast<int64_t>(i));
  }
}

HardEmbeddings embeddings(const FiveTensors& statistics, at::TensorList tables) {
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
  constexpr const char* kName = "straight_through_embedding";
  Check(kName).logits(z);
  check_tables(kName, tables, z.size(1));
  return embeddings(relaxed_stats(z, tau, {}, {}), tables);
}

HardEmbeddings linear_straight_through_embedding(const Tensor& h, const Tensor& weight, double scale, double softcap,
                                                 at::TensorList tables, double tau) {
  constexpr const char* kName = "linear_straight_through_embedding";
  Check(kName).product(h, "h", weight, "weight");
  check_tables(kName, tables, weight.size(0));
  return embeddings(linear_relaxed_stats(h, weight, scale, softcap, tau, {}, {}), tables);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
