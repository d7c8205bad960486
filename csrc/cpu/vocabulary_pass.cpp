#include "vocabulary_pass.h"

#include "kept_logits.h"
#include "matrix.h"
#include "vocabulary_products.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <memory>
#include <optional>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

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
        kept_(optional_kept<acc_t>(input)),
        blocks_(input.values.defined() || kept_ ? 1 + has_gradient() : 0),
        width_(input.values.defined() && !kept_ ? input.values.size(1) : 0),
        inverse_tau_(1 / input.tau),
        z_(optional_matrix(input.z)),
        soft_(optional_matrix(input.soft_noise)),
        hard_(optional_matrix(input.hard_noise)),
        dense_(optional_matrix(input.gradient)),
        base_(optional_matrix(input.base)),
        values_(optional_matrix(input.values)),
        workspace_(products.workspace(tile)),
        weights_(width_ ? blocks_ * kPanel * tile : 0),
        x_(tile),
        y_(tile),
        slope_(tile),
        gradient_(tile),
        buffer_(std::max(tile, width_)),
        sums(blocks_ * n_ * width_) {}

  void add_tile(int64_t start, int64_t count) {
    products_.load(start, count, workspace_);
    for (int64_t first = 0; first < n_; first += kPanel) {
      const int64_t rows = std::min(kPanel, n_ - first);
      logits_ = kept_ ? kept_->block(start, first) : workspace_.logits.data();
      products_.compute(start, count, first / kPanel, tile_, workspace_, logits_);
      for (int64_t row = 0; base_ && row < rows; ++row) {
        foresee(*base_, first + row, start);
        add_base(first + row, row, start, count);
      }
      for (int64_t row = 0; row < rows; ++row) {
        for (const auto* matrix : {&z_, &soft_, &hard_, &dense_}) {
          if (*matrix) foresee(**matrix, first + row, start);
        }
        add_row(first + row, row, start, count);
      }
      for (int64_t block = 0; width_ && block < blocks_; ++block) {
        products_.add_values(rows, count, weights(block, 0), tile_, workspace_, sum(block, first));
      }
    }
  }

  int64_t width() const { return width_; }

  // Adds another part, whose entries come later in the vocabulary.
  void merge(PartPass& other) {
    for (int64_t i = 0; i < n_; ++i) {
      if (other.states[i].max > states[i].max) {
        raise_max(i, other.states[i].max, other.states[i].reference, states[i].token);
      } else {
        other.raise_max(i, states[i].max, states[i].reference, other.states[i].token);
      }
      states[i].add(other.states[i]);
    }
    for (size_t j = 0; j < sums.size(); ++j) sums[j] += other.sums[j];
  }

 private:
  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();

  bool noisy() const { return soft_.has_value() || hard_.has_value(); }

  bool has_gradient() const { return input_.gradient.defined() || products_.has_gradient(); }

  bool capped() const { return input_.through_cap && input_.softcap != 0; }

  // Weights of a row of the panel: e (G - reference) in the first of two blocks, e in the last.
  acc_t* weights(int64_t block, int64_t row) { return weights_.data() + (block * kPanel + row) * tile_; }

  // What a row's weights have added up to.
  acc_t* sum(int64_t block, int64_t i) { return sums.data() + (block * n_ + i) * width_; }

  // Fetches what is read soon after row i of the tile that begins at `start`.
  void foresee(const Matrix& matrix, int64_t i, int64_t start) const {
    const int64_t next = i + kRowsAhead;
    if (next < n_) {
      matrix.prefetch(input_.rows[next], start, tile_);
    } else if (next < 2 * n_) {
      matrix.prefetch(input_.rows[next - n_], start + tile_, tile_);
    }
  }

  // Row i, which is `row` of its panel.
  void add_row(int64_t i, int64_t row, int64_t start, int64_t count) {
    const int64_t padded = round_up(count, Vec::size());
    State& state = states[i];
    const int64_t likeliest = state.token;
    acc_t max;
    acc_t best;
    read_logits(i, row, start, count, padded, max, best);
    // A maximum that is NaN or +inf fails this.
    if (!(best < kInfinity && max < kInfinity)) {
      state.max = kInfinity;
    } else if (best > state.best) {
      const acc_t* y = noisy() ? y_.data() : x_.data();
      state.add_hard(best, start + (std::find(y, y + count, best) - y));
    }
    if (!blocks_) {
      state.max = std::max<double>(state.max, max);
      return;
    }
    if (state.max == kInfinity || (max == -kInfinity && state.max == -kInfinity)) {
      for (int64_t block = 0; width_ && block < blocks_; ++block) std::fill_n(weights(block, row), padded, acc_t(0));
      return;
    }
    const acc_t* gradient = read_gradient(i, row, start, count);
    if (max > state.max) {
      double reference = state.reference;
      if (gradient) {
        const acc_t own = gradient[std::find(x_.data(), x_.data() + count, max) - x_.data()];
        if (std::isfinite(own)) reference = own;
      }
      raise_max(i, max, reference, likeliest);
    }
    if (input_.apart && state.token >= start) x_[state.token - start] = -kInfinity;
    write_weights(state, row, padded, gradient);
  }

  void add_base(int64_t i, int64_t row, int64_t start, int64_t count) {
    const acc_t* base = base_->template read<acc_t>(input_.rows[i], start, count, acc_t(0), buffer_.data());
    acc_t* logits = logits_ + row * tile_;
    if (input_.base_alone) {
      std::copy_n(base, count, logits);
    } else {
      each_vector<Vec>(count, [&](int64_t j, int64_t lanes) {
        (Vec::loadu(logits + j, lanes) + Vec::loadu(base + j, lanes)).store(logits + j, lanes);
      });
    }
    HeadTransform{input_.scale, input_.softcap}.apply(logits, round_up(count, kPanelUnit));
  }

  // x = logit + soft noise into x_, y = logit + hard noise into y_ (or x_ where there is no noise), and their maxima.
  void read_logits(int64_t i, int64_t row, int64_t start, int64_t count, int64_t padded, acc_t& max, acc_t& best) {
    const int64_t at = input_.rows[i];
    const acc_t* z;
    if (z_) {
      z = z_->template read<acc_t>(at, start, count, -kInfinity, x_.data());
    } else {
      acc_t* logits = logits_ + row * tile_;
      std::fill(logits + count, logits + padded, -kInfinity);
      z = logits;
    }
    const acc_t* hard = hard_ ? hard_->template read<acc_t>(at, start, count, acc_t(0), y_.data()) : nullptr;
    const acc_t* soft = soft_ ? soft_->template read<acc_t>(at, start, count, acc_t(0), buffer_.data()) : nullptr;
    const Vec inverse_cap(static_cast<acc_t>(capped() ? 1 / input_.softcap : 0));
    Vec x_max(-kInfinity);
    Vec y_max(-kInfinity);
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      const Vec value = Vec::loadu(z + j);
      if (capped()) {
        const Vec ratio = value * inverse_cap;
        (Vec(acc_t(1)) - ratio * ratio).store(slope_.data() + j);
      }
      const Vec x = soft ? value + Vec::loadu(soft + j) : value;
      if (z != x_.data() || soft) x.store(x_.data() + j);
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

  void write_weights(State& state, int64_t row, int64_t padded, const acc_t* gradient) {
    const Vec max(static_cast<acc_t>(state.max));
    const Vec scale(static_cast<acc_t>(inverse_tau_ * Power<acc_t>::kUnits));
    const Vec reference(static_cast<acc_t>(state.reference));
    acc_t* plain = width_ ? weights(blocks_ - 1, row) : nullptr;
    acc_t* with_gradient = width_ ? weights(0, row) : nullptr;
    Vec sum(acc_t(0));
    Vec gradient_sum(acc_t(0));
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      const Vec e = power_or_zero<acc_t>((Vec::loadu(x_.data() + j) - max) * scale);
      const Vec slope = capped() ? Vec::loadu(slope_.data() + j) : Vec(acc_t(1));
      sum = sum + e;
      if (plain) (capped() ? e * slope : e).store(plain + j);
      if (!gradient) continue;
      const Vec product = weighted(e, Vec::loadu(gradient + j) - reference);
      gradient_sum = gradient_sum + product;
      if (plain) (capped() ? product * slope : product).store(with_gradient + j);
    }
    state.sum_exp += Lanes<acc_t>(sum).sum();
    if (gradient) state.sum_exp_grad += Lanes<acc_t>(gradient_sum).sum();
  }

  // `likeliest` is the entry that was at the maximum so far, -1 for none.
  void raise_max(int64_t i, double max, double reference, int64_t likeliest) {
    const Rescale by = states[i].raise_max(max, inverse_tau_, reference);
    acc_t* plain = sum(blocks_ - 1, i);
    acc_t* with_gradient = sum(0, i);
    for (int64_t j = 0; j < width_; ++j) {
      if (blocks_ == 2) {
        with_gradient[j] = static_cast<acc_t>(by.factor * (with_gradient[j] - by.shift * plain[j]));
      }
      plain[j] = static_cast<acc_t>(by.factor * plain[j]);
    }
    if (!input_.apart || likeliest < 0) return;
    states[i].sum_exp += by.factor;
    values_->copy(likeliest, 0, width_, buffer_.data());
    for (int64_t j = 0; j < width_; ++j) plain[j] += static_cast<acc_t>(by.factor) * buffer_[j];
  }

 public:
  std::vector<State> states;

 private:
  const PassInput& input_;
  const VocabularyProducts<acc_t>& products_;
  int64_t tile_;
  int64_t n_;
  std::optional<KeptLogits<acc_t>> kept_;
  int64_t blocks_;  // kinds of weights: none, e, or e (G - reference) before e
  int64_t width_;   // of what is summed with them, or 0
  double inverse_tau_;
  std::optional<Matrix> z_, soft_, hard_, dense_, base_, values_;
  typename VocabularyProducts<acc_t>::Workspace workspace_;
  acc_t* logits_ = nullptr;  // of the panel
  std::vector<acc_t> weights_, x_, y_, slope_, gradient_, buffer_;

 public:
  std::vector<acc_t> sums;  // (blocks * n, width)
};

}  // namespace

template <typename acc_t>
PassOutput<acc_t> vocabulary_pass(const PassInput& input) {
  const auto source = (input.z.defined() ? input.z : input.hidden).scalar_type();
  const HeadTransform transform =
      input.base.defined() ? HeadTransform{1, 0} : HeadTransform{input.scale, input.softcap};
  const VocabularyProducts<acc_t> products(input.base_alone ? at::Tensor() : input.hidden, input.weight, transform,
                                           input.terms, input.kept.defined() ? at::Tensor() : input.values, source);
  // What is kept is cut as the products with `weight` are.
  const Split split(input.vocabulary(), input.kept.defined() ? input.weight.size(1) : products.width());
  std::vector<std::unique_ptr<PartPass<acc_t>>> passes(split.parts);
  split.run([&](int64_t part, int64_t first, int64_t last) {
    passes[part] = std::make_unique<PartPass<acc_t>>(input, products, split.tile);
    for (int64_t i = first; i < last; ++i) passes[part]->add_tile(split.begin(i), split.size(i));
  });
  PartPass<acc_t>& total = *passes[0];
  for (int64_t part = 1; part < split.parts; ++part) total.merge(*passes[part]);
  return {std::move(total.states), total.width(), std::move(total.sums)};
}

template <typename acc_t>
at::Tensor hidden_gradient(const PassOutput<acc_t>& output, double tau) {
  const auto n = static_cast<int64_t>(output.states.size());
  at::Tensor result = at::empty({n, output.width}, at::dtype(c10::CppTypeToScalarType<acc_t>::value));
  const acc_t* with_gradient = output.sums.data();
  const acc_t* plain = with_gradient + n * output.width;
  acc_t* out = result.mutable_data_ptr<acc_t>();
  for (int64_t i = 0; i < n; ++i) {
    const State& state = output.states[i];
    const double mean = state.sum_exp_grad / state.sum_exp;
    const double factor = state.defined() ? 1 / (state.sum_exp * tau) : std::numeric_limits<double>::quiet_NaN();
    for (int64_t at = i * output.width; at < (i + 1) * output.width; ++at) {
      out[at] = static_cast<acc_t>((with_gradient[at] - mean * plain[at]) * factor);
    }
  }
  return result;
}

template <typename acc_t>
void write_gradient(int64_t vocabulary, const std::vector<GradientTerm>& terms, const std::vector<int64_t>& rows,
                    const at::Tensor& out) {
  const auto n = static_cast<int64_t>(rows.size());
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
        if (row % kPanel == 0) products.compute(begin, size, row / kPanel, split.tile, workspace, nullptr);
        std::copy_n(workspace.gradient.data() + row % kPanel * split.tile, size,
                    data + rows[row] * out.stride(0) + begin);
      }
    }
  });
}

template PassOutput<float> vocabulary_pass<float>(const PassInput&);
template PassOutput<double> vocabulary_pass<double>(const PassInput&);
template at::Tensor hidden_gradient<float>(const PassOutput<float>&, double);
template at::Tensor hidden_gradient<double>(const PassOutput<double>&, double);
template void write_gradient<float>(int64_t, const std::vector<GradientTerm>&, const std::vector<int64_t>&,
                                    const at::Tensor&);
template void write_gradient<double>(int64_t, const std::vector<GradientTerm>&, const std::vector<int64_t>&,
                                     const at::Tensor&);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
