#include "online_softmax.h"
#include "operators.h"
#include "strided_rows.h"
#include "vocabulary_pass.h"
#include "vocabulary_table.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 512;
// Rows that go through both passes while their G is warm.
constexpr int64_t kRowsTogether = 16;

// Where the largest logit of a row is, or 0 if none is above -inf.
template <typename acc_t>
int64_t argmax(const StridedRows& z, int64_t row, int64_t vocabulary) {
  using Vec = at::vec::Vectorized<acc_t>;
  acc_t buffer[kBlock];
  acc_t largest = -std::numeric_limits<acc_t>::infinity();
  int64_t at = 0;
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t count = std::min(kBlock, vocabulary - begin);
    const acc_t* logits = z.read(row, begin, count, -std::numeric_limits<acc_t>::infinity(), buffer);
    Vec max = Vec::loadu(logits);
    for (int64_t i = Vec::size(); i < count; i += Vec::size()) max = at::vec::maximum(max, Vec::loadu(logits + i));
    const acc_t top = Lanes<acc_t>(max).max();
    if (top > largest) {
      largest = top;
      at = begin + (std::find(logits, logits + count, top) - logits);
    }
  }
  return at;
}

// G of one row becomes dz: the second pass needs <p, G>, which the first makes from G and z.
template <typename acc_t>
void finish_row(const StridedRows& z, int64_t row, int64_t vocabulary, double lse, double tau, acc_t* dz) {
  using Vec = at::vec::Vectorized<acc_t>;
  // Of the likeliest entry: differences from it keep their digits where it holds nearly all of the weight.
  const int64_t likeliest = argmax<acc_t>(z, row, vocabulary);
  acc_t largest;
  z.copy(row, likeliest, 1, &largest);
  if (!std::isfinite(largest)) largest = 0;
  const Vec reference(std::isfinite(dz[likeliest]) ? dz[likeliest] : acc_t(0));
  // exp(z / tau - lse) by way of the maximum: z / tau alone may be large and lose the digits that matter.
  const Vec max(largest);
  const Vec scale(static_cast<acc_t>(Power<acc_t>::kUnits / tau));
  const double normalisation = std::exp(largest / tau - lse);
  const Vec factor(static_cast<acc_t>(normalisation / tau));
  acc_t buffer[kBlock];
  double expected = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const Vec mean(static_cast<acc_t>(expected * normalisation));
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
      const int64_t count = std::min(kBlock, vocabulary - begin);
      const acc_t* logits = z.read(row, begin, count, -std::numeric_limits<acc_t>::infinity(), buffer);
      Vec sum(acc_t(0));
      for (int64_t i = 0; i < count; i += Vec::size()) {
        const int64_t lanes = std::min<int64_t>(Vec::size(), count - i);
        const Vec e = power_or_zero<acc_t>((Vec::loadu(logits + i) - max) * scale);
        const Vec difference = Vec::loadu(dz + begin + i, lanes) - reference;
        if (pass == 0) {
          sum = sum + weighted(e, difference);
        } else {
          (weighted(e, difference - mean) * factor).store(dz + begin + i, lanes);
        }
      }
      if (pass == 0) expected += Lanes<acc_t>(sum).sum();
    }
  }
}

template <typename acc_t>
Tensor backward(const Tensor& z, const Tensor& lse, at::TensorList vectors, at::TensorList tables, double tau) {
  const int64_t rows = z.size(0);
  const int64_t vocabulary = z.size(1);
  const auto dtype = c10::CppTypeToScalarType<acc_t>::value;
  Tensor dz = at::empty({rows, vocabulary}, z.options().dtype(dtype));
  std::vector<GradientTerm> terms;
  for (size_t i = 0; i < tables.size(); ++i) terms.push_back({rounded_beside(tables[i], vectors[i], z.scalar_type()), tables[i]});
  write_gradient<acc_t>(vocabulary, terms, dz);
  const Tensor log_sums = lse.to(at::kDouble).contiguous();
  const StridedRows logits(z);
  at::parallel_for(0, rows, std::max<int64_t>(1, kRowsTogether * 1024 / vocabulary), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      finish_row<acc_t>(logits, row, vocabulary, log_sums.const_data_ptr<double>()[row], tau,
                        dz.mutable_data_ptr<acc_t>() + row * vocabulary);
    }
  });
  return dz;
}

}  // namespace

Tensor relaxed_backward(const Tensor& z, const Tensor& lse, at::TensorList vectors, at::TensorList tables, double tau) {
  TORCH_CHECK(z.dim() == 2 && z.size(1) > 0, "relaxed_backward: z must be (N, V) with V >= 1, got ", z.sizes());
  TORCH_CHECK(lse.dim() == 1 && lse.size(0) == z.size(0), "relaxed_backward: lse must have shape (", z.size(0),
              "), got ", lse.sizes());
  TORCH_CHECK(vectors.size() == tables.size() && !tables.empty(), "relaxed_backward: vectors and tables must be as ",
              "many and at least one, got ", vectors.size(), " and ", tables.size());
  TORCH_CHECK_VALUE(tau > 0 && std::isnormal(static_cast<float>(1 / tau)),
                    "relaxed_backward: tau must be positive, got ", tau);
  for (size_t i = 0; i < tables.size(); ++i) {
    TORCH_CHECK(tables[i].dim() == 2 && tables[i].size(0) == z.size(1) && vectors[i].dim() == 2 &&
                    vectors[i].size(0) == z.size(0) && vectors[i].size(1) == tables[i].size(1),
                "relaxed_backward: vectors and tables must be (N, d_k) and (V, d_k), got ", vectors[i].sizes(), " and ",
                tables[i].sizes());
  }
  return z.scalar_type() == at::kDouble ? backward<double>(z, lse, vectors, tables, tau)
                                        : backward<float>(z, lse, vectors, tables, tau);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
