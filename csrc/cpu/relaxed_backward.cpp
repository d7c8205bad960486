#include "../checks.h"
#include "online_softmax.h"
#include "operators.h"
#include "strided_rows.h"
#include "vocabulary_pass.h"
#include "vocabulary_table.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 512;
// Rows that go through both passes while their G is warm.
constexpr int64_t kRowsTogether = 16;

template <typename acc_t>
struct Largest {
  acc_t logit;
  int64_t at;  // the lowest index of equals
};

// Of a row; NaN where it holds one.
template <typename acc_t>
Largest<acc_t> largest_of(const StridedRows& z, int64_t row, int64_t vocabulary) {
  using Vec = at::vec::Vectorized<acc_t>;
  acc_t buffer[kBlock];
  Largest<acc_t> largest{-std::numeric_limits<acc_t>::infinity(), 0};
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t count = std::min(kBlock, vocabulary - begin);
    const acc_t* logits = z.read(row, begin, count, -std::numeric_limits<acc_t>::infinity(), buffer);
    Vec max = Vec::loadu(logits);
    for (int64_t i = Vec::size(); i < count; i += Vec::size()) max = at::vec::maximum(max, Vec::loadu(logits + i));
    const acc_t top = Lanes<acc_t>(max).max();
    if (std::isnan(top)) return {top, 0};
    if (top > largest.logit) largest = {top, begin + (std::find(logits, logits + count, top) - logits)};
  }
  return largest;
}

// G of one row becomes dz: the second pass needs <p, G>, which the first makes from G and z.
template <typename acc_t>
void finish_row(const StridedRows& z, int64_t row, int64_t vocabulary, double tau, acc_t* dz) {
  using Vec = at::vec::Vectorized<acc_t>;
  const Largest<acc_t> largest = largest_of<acc_t>(z, row, vocabulary);
  // Of the likeliest entry: differences from it keep their digits where it holds nearly all of the weight.
  const Vec reference(std::isfinite(dz[largest.at]) ? dz[largest.at] : acc_t(0));
  // exp((z - max) / tau) and its own sum: a log-sum-exp of large logits is rounded too far to normalise with.
  const Vec max(largest.logit);
  const Vec scale(static_cast<acc_t>(Power<acc_t>::kUnits / tau));
  acc_t buffer[kBlock];
  double total = 0;
  double expected = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const double mean = pass == 0 ? 0 : expected / total;
    // A row of logits without a softmax, or of a G that has no mean.
    if (!std::isfinite(largest.logit) || !std::isfinite(mean)) {
      std::fill_n(dz, vocabulary, std::numeric_limits<acc_t>::quiet_NaN());
      return;
    }
    const Vec mean_difference(static_cast<acc_t>(mean));
    const Vec factor(static_cast<acc_t>(pass == 0 ? 0 : 1 / (total * tau)));
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
      const int64_t count = std::min(kBlock, vocabulary - begin);
      const acc_t* logits = z.read(row, begin, count, -std::numeric_limits<acc_t>::infinity(), buffer);
      Vec sum(acc_t(0));
      Vec weighted_sum(acc_t(0));
      for (int64_t i = 0; i < count; i += Vec::size()) {
        const int64_t lanes = std::min<int64_t>(Vec::size(), count - i);
        const Vec e = power_or_zero<acc_t>((Vec::loadu(logits + i) - max) * scale);
        const Vec difference = Vec::loadu(dz + begin + i, lanes) - reference;
        if (pass == 0) {
          sum = sum + e;
          weighted_sum = weighted_sum + weighted(e, difference);
        } else {
          (weighted(e, difference - mean_difference) * factor).store(dz + begin + i, lanes);
        }
      }
      if (pass == 0) {
        total += Lanes<acc_t>(sum).sum();
        expected += Lanes<acc_t>(weighted_sum).sum();
      }
    }
  }
}

template <typename acc_t>
Tensor backward(const Tensor& z, at::TensorList vectors, at::TensorList tables, double tau) {
  const int64_t rows = z.size(0);
  const int64_t vocabulary = z.size(1);
  const auto dtype = c10::CppTypeToScalarType<acc_t>::value;
  Tensor dz = at::empty({rows, vocabulary}, z.options().dtype(dtype));
  std::vector<GradientTerm> terms;
  for (size_t i = 0; i < tables.size(); ++i) {
    terms.push_back({rounded_beside(tables[i], vectors[i], z.scalar_type()), tables[i]});
  }
  write_gradient<acc_t>(vocabulary, terms, dz);
  const StridedRows logits(z);
  at::parallel_for(0, rows, std::max<int64_t>(1, kRowsTogether * 1024 / vocabulary), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      finish_row<acc_t>(logits, row, vocabulary, tau, dz.mutable_data_ptr<acc_t>() + row * vocabulary);
    }
  });
  return dz;
}

}  // namespace

Tensor relaxed_backward(const Tensor& z, at::TensorList vectors, at::TensorList tables, double tau) {
  const Check check("relaxed_backward");
  check.logits(z);
  check.vectors_and_tables(vectors, tables, z.size(0), z.size(1));
  check.inverse_of(tau);
  return z.scalar_type() == at::kDouble ? backward<double>(z, vectors, tables, tau)
                                        : backward<float>(z, vectors, tables, tau);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
