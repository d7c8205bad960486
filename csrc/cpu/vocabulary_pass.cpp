#include "vocabulary_pass.h"

#include "online_softmax.h"
#include "strided_rows.h"
#include "vocabulary_products.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <memory>
#include <optional>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

std::optional<StridedRows> optional_rows(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<StridedRows>(tensor) : std::nullopt;
}

// What one thread makes of its part of the vocabulary.
template <typename acc_t>
class PartPass {
  using Vec = at::vec::Vectorized<acc_t>;

 public:
  PartPass(const PassInput& input, const VocabularyProducts<acc_t>& products, int64_t tile)
      : states(input.rows.size()),
        input_(input),
        products_(products),
        tile_(tile),
        n_(static_cast<int64_t>(input.rows.size())),
        blocks_(!input.values.defined() ? 0 : has_gradient() ? 2 : 1),
        width_(blocks_ ? input.values.size(1) : 0),
        inverse_tau_(1 / input.tau),
        z_(optional_rows(input.z)),
        soft_(optional_rows(input.soft_noise)),
        hard_(optional_rows(input.hard_noise)),
        dense_(optional_rows(input.gradient)),
        workspace_(products.workspace(tile)),
        weights_(blocks_ * kPanel * tile),
        x_(tile),
        y_(tile),
        slope_(tile),
        gradient_(tile),
        buffer_(tile),
        sums(blocks_ * n_ * width_) {}

  void add_tile(int64_t start, int64_t count) {
    products_.load(start, count, workspace_);
    for (int64_t first = 0; first < n_; first += kPanel) {
      const int64_t rows = std::min(kPanel, n_ - first);
      products_.compute(start, count, first / kPanel, tile_, workspace_);
      for (int64_t row = 0; row < rows; ++row) add_row(first + row, row, start, count);
      for (int64_t block = 0; block < blocks_; ++block) {
        products_.add_values(rows, count, weights(block, 0), tile_, workspace_, sum(block, first));
      }
    }
  }

  // Adds another part, whose entries come later in the vocabulary.
  void merge(PartPass& other) {
    for (int64_t i = 0; i < n_; ++i) {
      RowState& a = states[i];
      RowState& b = other.states[i];
      a.undefined |= b.undefined;
      if (b.best > a.best) {
        a.best = b.best;
        a.token = b.token;
      }
      if (!blocks_) a.max = std::max(a.max, b.max);
      if (b.sum == 0) continue;
      if (b.max > a.max) {
        rescale(i, raise_maximum(a, b.max, b.reference, inverse_tau_));
      } else {
        other.rescale(i, raise_maximum(b, a.max, a.reference, inverse_tau_));
      }
      a.sum += b.sum;
      a.gradient_sum += b.gradient_sum;
      for (int64_t block = 0; block < blocks_; ++block) {
        for (int64_t j = 0; j < width_; ++j) sum(block, i)[j] += other.sum(block, i)[j];
      }
    }
  }

 private:
  static constexpr acc_t kMinusInfinity = -std::numeric_limits<acc_t>::infinity();

  bool noisy() const { return soft_.has_value() || hard_.has_value(); }

  bool has_gradient() const { return input_.gradient.defined() || products_.has_gradient(); }

  bool capped() const { return input_.through_cap && input_.softcap != 0; }

  // Weights of a row of the panel: e (G - reference) in the first of two blocks, e in the last.
  acc_t* weights(int64_t block, int64_t row) { return weights_.data() + (block * kPanel + row) * tile_; }

  // What a row's weights have added up to.
  acc_t* sum(int64_t block, int64_t i) { return sums.data() + (block * n_ + i) * width_; }

  // Row i, which is `row` of its panel.
  void add_row(int64_t i, int64_t row, int64_t start, int64_t count) {
    const int64_t padded = round_up(count, Vec::size());
    RowState& state = states[i];
    acc_t max;
    acc_t best;
    read_logits(i, row, start, count, padded, max, best);
    // A maximum that is NaN or +inf fails this.
    if (!(best < std::numeric_limits<acc_t>::infinity() && max < std::numeric_limits<acc_t>::infinity())) {
      state.undefined = true;
    } else if (best > state.best) {
      const acc_t* y = noisy() ? y_.data() : x_.data();
      state.best = best;
      state.token = start + (std::find(y, y + count, best) - y);
    }
    if (!blocks_) {
      state.max = std::max<double>(state.max, max);
      return;
    }
    if (state.undefined || (max == kMinusInfinity && state.max == kMinusInfinity)) {
      for (int64_t block = 0; block < blocks_; ++block) std::fill_n(weights(block, row), padded, acc_t(0));
      return;
    }
    const acc_t* gradient = read_gradient(i, row, start, count);
    if (max > state.max) {
      double reference = state.reference;
      if (gradient) {
        const acc_t own = gradient[std::find(x_.data(), x_.data() + count, max) - x_.data()];
        if (std::isfinite(own)) reference = own;
      }
      rescale(i, raise_maximum(state, max, reference, inverse_tau_));
    }
    write_weights(state, row, padded, gradient);
  }

  // x = logit + soft noise into x_, y = logit + hard noise into y_ (or x_ where there is no noise), and their maxima.
  void read_logits(int64_t i, int64_t row, int64_t start, int64_t count, int64_t padded, acc_t& max, acc_t& best) {
    const int64_t at = input_.rows[i];
    const acc_t* z;
    if (z_) {
      z = z_->template read<acc_t>(at, start, count, kMinusInfinity, x_.data());
    } else {
      acc_t* logits = workspace_.logits.data() + row * tile_;
      std::fill(logits + count, logits + padded, kMinusInfinity);
      z = logits;
    }
    const acc_t* hard = hard_ ? hard_->template read<acc_t>(at, start, count, acc_t(0), y_.data()) : nullptr;
    const acc_t* soft = soft_ ? soft_->template read<acc_t>(at, start, count, acc_t(0), buffer_.data()) : nullptr;
    const Vec inverse_cap(static_cast<acc_t>(capped() ? 1 / input_.softcap : 0));
    Vec x_max(kMinusInfinity);
    Vec y_max(kMinusInfinity);
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      const Vec value = Vec::loadu(z + j);
      if (capped()) {
        const Vec ratio = value * inverse_cap;
        (Vec(acc_t(1)) - ratio * ratio).store(slope_.data() + j);
      }
      const Vec x = soft ? value + Vec::loadu(soft + j) : value;
      x.store(x_.data() + j);
      x_max = at::vec::maximum(x_max, x);
      if (!noisy()) continue;
      const Vec y = hard ? value + Vec::loadu(hard + j) : value;
      y.store(y_.data() + j);
      y_max = at::vec::maximum(y_max, y);
    }
    max = Lanes<acc_t>(x_max).max();
    best = noisy() ? Lanes<acc_t>(y_max).max() : max;
  }

  const acc_t* read_gradient(int64_t i, int64_t row, int64_t start, int64_t count) {
    if (dense_) return dense_->template read<acc_t>(input_.rows[i], start, count, acc_t(0), gradient_.data());
    return products_.has_gradient() ? workspace_.gradient.data() + row * tile_ : nullptr;
  }

  void write_weights(RowState& state, int64_t row, int64_t padded, const acc_t* gradient) {
    const Vec max(static_cast<acc_t>(state.max));
    const Vec scale(static_cast<acc_t>(inverse_tau_ * Power<acc_t>::kUnits));
    const Vec reference(static_cast<acc_t>(state.reference));
    acc_t* plain = weights(blocks_ - 1, row);
    acc_t* with_gradient = weights(0, row);
    Vec sum(acc_t(0));
    Vec gradient_sum(acc_t(0));
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      const Vec e = power_or_zero<acc_t>((Vec::loadu(x_.data() + j) - max) * scale);
      const Vec slope = capped() ? Vec::loadu(slope_.data() + j) : Vec(acc_t(1));
      sum = sum + e;
      (capped() ? e * slope : e).store(plain + j);
      if (!gradient) continue;
      const Vec product = weighted(e, Vec::loadu(gradient + j) - reference);
      gradient_sum = gradient_sum + product;
      (capped() ? product * slope : product).store(with_gradient + j);
    }
    state.sum += Lanes<acc_t>(sum).sum();
    state.gradient_sum += Lanes<acc_t>(gradient_sum).sum();
  }

  void rescale(int64_t i, Rescale by) {
    acc_t* plain = sum(blocks_ - 1, i);
    acc_t* with_gradient = sum(0, i);
    for (int64_t j = 0; j < width_; ++j) {
      if (blocks_ == 2) {
        with_gradient[j] = static_cast<acc_t>(by.factor * (with_gradient[j] - by.shift * plain[j]));
      }
      plain[j] = static_cast<acc_t>(by.factor * plain[j]);
    }
  }

 public:
  std::vector<RowState> states;

 private:
  const PassInput& input_;
  const VocabularyProducts<acc_t>& products_;
  int64_t tile_;
  int64_t n_;
  int64_t blocks_;  // weighted sums per row: none, one of e, or of e (G - reference) before e
  int64_t width_;
  double inverse_tau_;
  std::optional<StridedRows> z_, soft_, hard_, dense_;
  typename VocabularyProducts<acc_t>::Workspace workspace_;
  std::vector<acc_t> weights_, x_, y_, slope_, gradient_, buffer_;

 public:
  std::vector<acc_t> sums;  // (blocks * n, width)
};

}  // namespace

Rescale raise_maximum(RowState& state, double max, double reference, double inverse_tau) {
  // An empty state has nothing to bring along, and its maximum may be -inf.
  const Rescale by{state.sum > 0 ? std::exp((state.max - max) * inverse_tau) : 0, reference - state.reference};
  state.gradient_sum = by.factor * (state.gradient_sum - by.shift * state.sum);
  state.sum *= by.factor;
  state.max = max;
  state.reference = reference;
  return by;
}

template <typename acc_t>
PassOutput vocabulary_pass(const PassInput& input) {
  const auto n = static_cast<int64_t>(input.rows.size());
  const auto source = (input.z.defined() ? input.z : input.hidden).scalar_type();
  const VocabularyProducts<acc_t> products(input.hidden, input.weight, {input.scale, input.softcap}, input.terms,
                                           input.values, source);
  const Split split(input.vocabulary, products.width());
  std::vector<std::unique_ptr<PartPass<acc_t>>> passes(split.parts);
  split.run([&](int64_t part, int64_t first, int64_t last) {
    passes[part] = std::make_unique<PartPass<acc_t>>(input, products, split.tile);
    for (int64_t i = first; i < last; ++i) passes[part]->add_tile(split.begin(i), split.size(i));
  });
  PartPass<acc_t>& total = *passes[0];
  for (int64_t part = 1; part < split.parts; ++part) total.merge(*passes[part]);

  PassOutput output;
  output.states = std::move(total.states);
  // Nothing but -inf, maybe by the soft noise alone, has no softmax.
  for (RowState& state : output.states) state.undefined |= std::isinf(state.max);
  if (!input.values.defined()) return output;
  const int64_t columns = input.values.size(1);
  const auto options = at::dtype(c10::CppTypeToScalarType<acc_t>::value);
  const bool has_gradient = input.gradient.defined() || !input.terms.empty();
  const acc_t* sums = total.sums.data();
  if (has_gradient) {
    output.weighted = at::empty({n, columns}, options);
    std::copy_n(sums, n * columns, output.weighted.template mutable_data_ptr<acc_t>());
    sums += n * columns;
  }
  output.mixture = at::empty({n, columns}, options);
  std::copy_n(sums, n * columns, output.mixture.template mutable_data_ptr<acc_t>());
  return output;
}

template <typename acc_t>
at::Tensor hidden_gradient(const PassOutput& output, double tau) {
  const int64_t columns = output.weighted.size(1);
  at::Tensor result = at::empty_like(output.weighted);
  const acc_t* weighted = output.weighted.const_data_ptr<acc_t>();
  const acc_t* mixture = output.mixture.const_data_ptr<acc_t>();
  acc_t* out = result.mutable_data_ptr<acc_t>();
  for (size_t i = 0; i < output.states.size(); ++i) {
    const RowState& state = output.states[i];
    const double mean = state.gradient_sum / state.sum;
    const double factor = state.undefined ? std::numeric_limits<double>::quiet_NaN() : 1 / (state.sum * tau);
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = static_cast<int64_t>(i) * columns + j;
      out[at] = static_cast<acc_t>((weighted[at] - mean * mixture[at]) * factor);
    }
  }
  return result;
}

template <typename acc_t>
void write_gradient(int64_t vocabulary, const std::vector<GradientTerm>& terms, const at::Tensor& out) {
  const int64_t n = out.size(0);
  if (n == 0) return;
  const VocabularyProducts<acc_t> products({}, {}, {}, terms, {}, at::kFloat);
  const Split split(vocabulary, products.width());
  acc_t* data = out.mutable_data_ptr<acc_t>();
  split.run([&](int64_t, int64_t first, int64_t last) {
    auto workspace = products.workspace(split.tile);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = split.begin(tile);
      const int64_t size = split.size(tile);
      products.load(begin, size, workspace);
      for (int64_t row = 0; row < n; ++row) {
        if (row % kPanel == 0) products.compute(begin, size, row / kPanel, split.tile, workspace);
        std::copy_n(workspace.gradient.data() + row % kPanel * split.tile, size, data + row * out.stride(0) + begin);
      }
    }
  });
}

template PassOutput vocabulary_pass<float>(const PassInput&);
template PassOutput vocabulary_pass<double>(const PassInput&);
template at::Tensor hidden_gradient<float>(const PassOutput&, double);
template at::Tensor hidden_gradient<double>(const PassOutput&, double);
template void write_gradient<float>(int64_t, const std::vector<GradientTerm>&, const at::Tensor&);
template void write_gradient<double>(int64_t, const std::vector<GradientTerm>&, const at::Tensor&);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
