#include "../checks.h"
#include "matrix.h"
#include "online_softmax.h"
#include "operators.h"
#include "tile_matmul.h"
#include "vocabulary_pass.h"

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
Largest<acc_t> largest_of(const Matrix& z, int64_t row, int64_t vocabulary) {
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
void finish_row(const Matrix& z, int64_t row, int64_t vocabulary, double tau, acc_t* dz) {
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
      each_vector<Vec>(count, [&](int64_t i, int64_t lanes) {
        const Vec e = power_or_zero<acc_t>((Vec::loadu(logits + i) - max) * scale);
        const Vec difference = Vec::loadu(dz + begin + i, lanes) - reference;
        if (pass == 0) {
          sum = sum + e;
          weighted_sum = weighted_sum + weighted(e, difference);
        } else {
          (weighted(e, difference - mean_difference) * factor).store(dz + begin + i, lanes);
        }
      });
      if (pass == 0) {
        total += Lanes<acc_t>(sum).sum();
        expected += Lanes<acc_t>(weighted_sum).sum();
      }
    }
  }
}

// G of rows [first, first + count) as terms, for weights that were made from `source`.
std::vector<GradientTerm> gradient_terms(at::TensorList vectors, at::TensorList tables, at::ScalarType source,
                                         int64_t first, int64_t count) {
  std::vector<GradientTerm> terms;
  for (size_t i = 0; i < tables.size(); ++i) {
    terms.push_back({rounded_beside(tables[i], vectors[i].narrow(0, first, count), source), tables[i]});
  }
  return terms;
}

template <typename acc_t>
Tensor backward(const Tensor& z, at::TensorList vectors, at::TensorList tables, double tau) {
  const int64_t rows = z.size(0);
  const int64_t vocabulary = z.size(1);
  const auto dtype = c10::CppTypeToScalarType<acc_t>::value;
  Tensor dz = at::empty({rows, vocabulary}, z.options().dtype(dtype));
  write_gradient<acc_t>(vocabulary, gradient_terms(vectors, tables, z.scalar_type(), 0, rows), row_numbers(0, rows),
                        dz);
  const Matrix logits(z);
  at::parallel_for(0, rows, std::max<int64_t>(1, kRowsTogether * 1024 / vocabulary), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      finish_row<acc_t>(logits, row, vocabulary, tau, dz.mutable_data_ptr<acc_t>() + row * vocabulary);
    }
  });
  return dz;
}

template <typename acc_t>
Tensor linear_backward(PassInput input, const Tensor& h, at::TensorList vectors, at::TensorList tables) {
  Tensor dh = at::empty(h.sizes(), h.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  each_pass(h.size(0), [&](int64_t first, int64_t count) {
    input.rows = row_numbers(first, first + count);
    input.hidden = h.narrow(0, first, count);
    input.terms = gradient_terms(vectors, tables, h.scalar_type(), first, count);
    dh.narrow(0, first, count).copy_(hidden_gradient<acc_t>(vocabulary_pass<acc_t>(input), input.tau));
  });
  return dh.mul_(input.scale);
}

}  // namespace

Tensor relaxed_backward(const Tensor& z, at::TensorList vectors, at::TensorList tables, double tau) {
  const Check check("relaxed_backward");
  check.logits(z);
  check.vectors_and_tables(vectors, tables, z.size(0), z.size(1));
  check.inverse_of(tau);
  return any_double({z}) ? backward<double>(z, vectors, tables, tau) : backward<float>(z, vectors, tables, tau);
}

Tensor linear_relaxed_backward(const Tensor& h, const Tensor& weight, double scale, double softcap,
                               at::TensorList vectors, at::TensorList tables, double tau) {
  const Check check("linear_relaxed_backward");
  check.product(h, "h", weight, "weight");
  check.vectors_and_tables(vectors, tables, h.size(0), weight.size(0));
  check.inverse_of(tau);
  PassInput input(weight, scale, softcap, tau);
  input.values = weight;
  input.through_cap = true;
  return any_double({h, weight}) ? linear_backward<double>(input, h, vectors, tables)
                                 : linear_backward<float>(input, h, vectors, tables);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
