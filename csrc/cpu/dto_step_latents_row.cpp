// One row of latents: the head is read once, and each tile of it stays in the first-level cache between the products
// that make its logits and the sums of its weighted rows.
#include "dto_step.h"
#include "matrix.h"
#include "vocabulary_pass.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

// Rows of the head whose logits fit into a vector; with more, the sums of each would not fit into the registers.
constexpr int64_t kTile = std::min<int64_t>(8, Vec::size());
constexpr int64_t kBlock = 32 * kTile;
// A tile is left out of the sums if none of its weights e and e |G| is larger than this part of all that were added so
// far, divided by the vocabulary: what is left out together is less than the rounding of float32 sums. Relative to the
// weights of the gradient, because Adam also follows gradients that are small throughout.
constexpr double kNegligible = 1e-6;

template <typename weight_t>
struct Chunk;

template <>
struct Chunk<float> {
  static constexpr int64_t kSize = Vec::size();
  std::array<Vec, 1> parts;
  explicit Chunk(const float* data) : parts{Vec::loadu(data)} {}
};

template <>
struct Chunk<c10::BFloat16> {
  static constexpr int64_t kSize = 2 * Vec::size();
  std::array<Vec, 2> parts;
  explicit Chunk(const c10::BFloat16* data) {
    std::tie(parts[0], parts[1]) = at::vec::convert_to_float(at::vec::Vectorized<c10::BFloat16>::loadu(data));
  }
};

float horizontal_sum(const Vec& vector) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, vector);
}

float horizontal_max(const Vec& vector) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, vector);
}

// The product of a row of the head and the hidden state. One row after the other is what memory is fastest at: several
// at a time, which would share the hidden state's registers, took twice as long.
template <typename weight_t>
float dot(const weight_t* weight, const float* hidden, int64_t d) {
  using Part = Chunk<weight_t>;
  Vec sum(0.f);
  int64_t j = 0;
  for (; j + Part::kSize <= d; j += Part::kSize) {
    const Part chunk(weight + j);
    for (size_t k = 0; k < chunk.parts.size(); ++k) {
      sum = at::vec::fmadd(chunk.parts[k], Vec::loadu(hidden + j + k * Vec::size()), sum);
    }
  }
  float tail = 0;
  for (; j < d; ++j) tail += static_cast<float>(weight[j]) * hidden[j];
  return horizontal_sum(sum) + tail;
}

// with_gradient += sum of products[r] * row r, plain += sum of weights[r] * row r; on the way, fetches the next tile.
template <int64_t rows, typename weight_t>
void add_rows(const weight_t* weight, int64_t stride, const float* products, const float* weights, int64_t d,
              float* with_gradient, float* plain) {
  using Part = Chunk<weight_t>;
  std::array<Vec, rows> p;
  std::array<Vec, rows> w;
#pragma GCC unroll 8
  for (int64_t row = 0; row < rows; ++row) {
    p[row] = Vec(products[row]);
    w[row] = Vec(weights[row]);
  }
  int64_t j = 0;
  for (; j + Part::kSize <= d; j += Part::kSize) {
    constexpr size_t kParts = Part::kSize / Vec::size();
    std::array<Vec, kParts> a;
    std::array<Vec, kParts> b;
    for (size_t k = 0; k < kParts; ++k) {
      a[k] = Vec::loadu(with_gradient + j + k * Vec::size());
      b[k] = Vec::loadu(plain + j + k * Vec::size());
    }
#pragma GCC unroll 8
    for (int64_t row = 0; row < rows; ++row) {
      const Part chunk(weight + row * stride + j);
      // In the order of memory, and into the second-level cache: two tiles do not fit into the first. As a number: a
      // pointer behind a buffer has no meaning.
      const int64_t next = rows * stride + rows * j + row * Part::kSize;
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(weight) + next * sizeof(weight_t)),
                         0, 2);
      for (size_t k = 0; k < kParts; ++k) {
        a[k] = at::vec::fmadd(p[row], chunk.parts[k], a[k]);
        b[k] = at::vec::fmadd(w[row], chunk.parts[k], b[k]);
      }
    }
    for (size_t k = 0; k < kParts; ++k) {
      a[k].store(with_gradient + j + k * Vec::size());
      b[k].store(plain + j + k * Vec::size());
    }
  }
  for (; j < d; ++j) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto value = static_cast<float>(weight[row * stride + j]);
      with_gradient[j] += products[row] * value;
      plain[j] += weights[row] * value;
    }
  }
}

template <typename weight_t>
class RowPass {
 public:
  RowPass(const DtoProblem& problem, const LatentsRow& row, const std::vector<float>& hidden)
      : problem_(problem),
        row_(row),
        hidden_(hidden),
        d_(static_cast<int64_t>(hidden.size())),
        stride_(problem.weight.stride(0)),
        weight_(problem.weight.const_data_ptr<weight_t>()),
        inverse_tau_(1 / problem.tau),
        gradient_(problem.gradient),
        soft_(optional_matrix(problem.soft_noise)),
        hard_(optional_matrix(problem.hard_noise)),
        with_gradient(row.hidden_gradient ? d_ : 0),
        plain(with_gradient.size()) {
    if (row.hidden_gradient) start_at(row.token);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end && state.max < kInfinity; start += kBlock) {
      run_block(start, std::min(kBlock, end - start));
    }
    collect();
  }

  void merge(RowPass& other) {
    if (other.state.max > state.max) {
      raise_max(other.state.max, other.state.reference);
    } else {
      other.raise_max(state.max, state.reference);
    }
    state.add(other.state);
    for (size_t j = 0; j < plain.size(); ++j) {
      with_gradient[j] += other.with_gradient[j];
      plain[j] += other.plain[j];
    }
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // Makes the likely token the first maximum, wherever it stands: then hardly anything has to be rescaled, and small
  // weights are known to be small from the first tile on. Its own weight is added when its tile comes.
  void start_at(int64_t token) {
    float x = dot(weight_ + token * stride_, hidden_.data(), d_);
    if (problem_.softcap != 0) x = static_cast<float>(problem_.softcap * std::tanh(x / problem_.softcap));
    float noise = 0;
    if (soft_) soft_->copy(row_.row, token, 1, &noise);
    float reference = 0;
    gradient_.copy(row_.row, token, 1, &reference);
    if (std::isfinite(x + noise)) state.max = x + noise;
    if (std::isfinite(reference)) state.reference = reference;
  }

  void run_block(int64_t start, int64_t count) {
    std::array<float, kBlock> buffers[3];
    const float* soft = soft_ ? soft_->read(row_.row, start, count, 0.f, buffers[0].data()) : nullptr;
    const float* hard = hard_ ? hard_->read(row_.row, start, count, 0.f, buffers[1].data()) : nullptr;
    const float* gradient =
        row_.hidden_gradient ? gradient_.read(row_.row, start, count, 0.f, buffers[2].data()) : nullptr;
    collect();
    const double share = kNegligible / static_cast<double>(problem_.vocabulary);
    inverse_weight_limit_ = static_cast<float>(1 / (share * state.sum_exp));
    inverse_product_limit_ = static_cast<float>(1 / (share * horizontal_sum(magnitude_)));
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t rows = std::min(kTile, count - i);
      const weight_t* weight = weight_ + (start + i) * stride_;
      std::array<float, Vec::size()> z;
      z.fill(-kInfinity);
      for (int64_t row = 0; row < rows; ++row) z[row] = dot(weight + row * stride_, hidden_.data(), d_);
      add_tile(start + i, rows, weight, z, soft ? soft + i : nullptr, hard ? hard + i : nullptr,
               gradient ? gradient + i : nullptr);
      if (state.max == kInfinity) return;
    }
  }

  void add_tile(int64_t start, int64_t rows, const weight_t* weight, const std::array<float, Vec::size()>& z,
                const float* soft, const float* hard, const float* gradient) {
    Vec value = Vec::loadu(z.data());
    Vec cap(1.f);
    if (problem_.softcap != 0) {
      const Vec softcap(static_cast<float>(problem_.softcap));
      const Vec ratio = (value / softcap).tanh();
      value = Vec::blendv(softcap * ratio, value, value == Vec(-kInfinity));
      cap = Vec(1.f) - ratio * ratio;
    }
    const Vec y = hard ? value + Vec::loadu(hard, rows) : value;
    const float best = horizontal_max(y);
    if (!(best < kInfinity)) {
      state.max = kInfinity;
      return;
    }
    if (best > state.best) {
      const Lanes<float> lanes(y);
      state.add_hard(best, start + (std::find(lanes.values, lanes.values + rows, best) - lanes.values));
    }

    const Vec x = soft ? value + Vec::loadu(soft, rows) : value;
    const float max = soft ? horizontal_max(x) : hard ? horizontal_max(value) : best;
    if (!(max < kInfinity)) state.max = kInfinity;
    if (!gradient) {
      state.max = std::max<double>(state.max, max);
      return;
    }
    if (max > state.max) {
      const Lanes<float> lanes(x);
      const float reference = gradient[std::find(lanes.values, lanes.values + rows, max) - lanes.values];
      raise_max(max, std::isfinite(reference) ? reference : state.reference);
    }
    if (std::isinf(state.max)) return;
    const Vec e = ((x - Vec(static_cast<float>(state.max))) * Vec(static_cast<float>(inverse_tau_))).exp();
    const Vec product = weighted(e, Vec::loadu(gradient, rows) - Vec(static_cast<float>(state.reference)));
    const Vec magnitude = product.abs();
    sum_ = sum_ + e;
    gradient_sum_ = gradient_sum_ + product;
    magnitude_ = magnitude_ + magnitude;
    // Not "> 1", which would be false for the NaN that the first tile makes of 0 / 0.
    const Vec share = at::vec::maximum(e * Vec(inverse_weight_limit_), magnitude * Vec(inverse_product_limit_));
    if (horizontal_max(share) <= 1) return;

    const Lanes<float> products(product * cap);
    const Lanes<float> weights(e * cap);
    if (rows == kTile) {
      add_rows<kTile>(weight, stride_, products.values, weights.values, d_, with_gradient.data(), plain.data());
    } else {
      for (int64_t row = 0; row < rows; ++row) {
        add_rows<1>(weight + row * stride_, stride_, products.values + row, weights.values + row, d_,
                    with_gradient.data(), plain.data());
      }
    }
  }

  void raise_max(double max, double reference) {
    collect();
    const Rescale by = state.raise_max(max, inverse_tau_, reference);
    magnitude_ = Vec(0.f);
    for (size_t j = 0; j < plain.size(); ++j) {
      with_gradient[j] = static_cast<float>(by.factor * (with_gradient[j] - by.shift * plain[j]));
      plain[j] = static_cast<float>(by.factor * plain[j]);
    }
  }

  // Moves the sums from vectors to the state.
  void collect() {
    state.sum_exp += horizontal_sum(sum_);
    state.sum_exp_grad += horizontal_sum(gradient_sum_);
    sum_ = Vec(0.f);
    gradient_sum_ = Vec(0.f);
  }

  const DtoProblem& problem_;
  const LatentsRow& row_;
  const std::vector<float>& hidden_;
  int64_t d_;
  int64_t stride_;
  const weight_t* weight_;
  double inverse_tau_;
  Matrix gradient_;
  std::optional<Matrix> soft_, hard_;
  Vec sum_{0.f};
  Vec gradient_sum_{0.f};
  Vec magnitude_{0.f};  // of the products e |G - reference|
  float inverse_weight_limit_ = kInfinity;
  float inverse_product_limit_ = kInfinity;

 public:
  State state;
  std::vector<float> with_gradient;  // sum of e (G - reference) * head row
  std::vector<float> plain;          // sum of e * head row
};

template <typename weight_t>
int64_t run_pass(const DtoProblem& problem, const LatentsRow& row) {
  const int64_t d = problem.weight.size(1);
  std::vector<float> hidden(row.hidden, row.hidden + d);
  for (float& value : hidden) value *= static_cast<float>(problem.scale);

  const int64_t blocks = (problem.vocabulary + kBlock - 1) / kBlock;
  const int64_t parts = std::min<int64_t>(blocks, at::get_num_threads());
  std::vector<std::unique_ptr<RowPass<weight_t>>> passes(parts);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      passes[part] = std::make_unique<RowPass<weight_t>>(problem, row, hidden);
      passes[part]->run(blocks * part / parts * kBlock,
                        std::min(blocks * (part + 1) / parts * kBlock, problem.vocabulary));
    }
  });
  RowPass<weight_t>& total = *passes[0];
  for (int64_t part = 1; part < parts; ++part) total.merge(*passes[part]);
  if (!total.state.defined()) return -1;
  if (row.hidden_gradient) {
    const double mean = total.state.sum_exp_grad / total.state.sum_exp;
    const double factor = problem.scale / (total.state.sum_exp * problem.tau);
    for (int64_t j = 0; j < d; ++j) {
      row.hidden_gradient[j] = static_cast<float>((total.with_gradient[j] - mean * total.plain[j]) * factor);
    }
  }
  return total.state.token;
}

}  // namespace

bool latents_row_fits(const DtoProblem& problem) {
  const auto dtype = problem.weight.scalar_type();
  return problem.gradient.defined() && (dtype == at::kFloat || dtype == at::kBFloat16) &&
         Matrix(problem.weight).column_stride == 1;
}

int64_t latents_row_pass(const DtoProblem& problem, const LatentsRow& row) {
  return problem.weight.scalar_type() == at::kFloat ? run_pass<float>(problem, row)
                                                    : run_pass<c10::BFloat16>(problem, row);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
