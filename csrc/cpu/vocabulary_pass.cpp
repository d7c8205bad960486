#include "vocabulary_pass.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <memory>
#include <optional>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Multiplications that are worth a thread of their own.
constexpr int64_t kWorkPerThread = 1 << 18;

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
        values_product_(blocks_ ? products.find(input.values) : -1),
        inverse_tau_(1 / input.tau),
        z_(optional_rows(input.z)),
        soft_(optional_rows(input.soft_noise)),
        hard_(optional_rows(input.hard_noise)),
        dense_(optional_rows(input.gradient)),
        workspace_(products.workspace(tile)),
        weights_(blocks_ * n_ * tile),
        x_(tile),
        y_(tile),
        cap_(tile),
        gradient_(tile),
        buffer_(tile),
        sums(blocks_ * n_ * width_) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += tile_) {
      const int64_t count = std::min(tile_, end - start);
      products_.compute(start, count, tile_, workspace_);
      for (int64_t i = 0; i < n_; ++i) add_row(i, start, count);
      if (blocks_) accumulate(start, count);
    }
  }

 private:
  static constexpr acc_t kMinusInfinity = -std::numeric_limits<acc_t>::infinity();

  bool noisy() const { return soft_.has_value() || hard_.has_value(); }

  bool has_gradient() const { return input_.gradient.defined() || products_.has_gradient(); }

  void add_row(int64_t i, int64_t start, int64_t count) {
    const int64_t padded = round_up(count, Vec::size());
    RowState& state = states[i];
    acc_t max;
    acc_t best;
    read_logits(i, start, count, padded, max, best);
    // A maximum that is NaN or +inf fails this.
    if (!(best < std::numeric_limits<acc_t>::infinity() && max < std::numeric_limits<acc_t>::infinity())) {
      state.undefined = true;
    } else if (best > state.best) {
      const acc_t* y = noisy() ? y_.data() : x_.data();
      state.best = best;
      state.token = start + (std::find(y, y + count, best) - y);
    }
    if (!blocks_) return;
    if (state.undefined || (max == kMinusInfinity && state.max == kMinusInfinity)) {
      for (int64_t block = 0; block < blocks_; ++block) {
        std::fill_n(weights_.data() + (block * n_ + i) * tile_, padded, acc_t(0));
      }
      return;
    }
    const acc_t* gradient = read_gradient(i, start, count, padded);
    if (max > state.max) {
      const int64_t at = std::find(x_.data(), x_.data() + count, max) - x_.data();
      const acc_t reference = gradient ? gradient[at] : acc_t(0);
      rescale(i, raise_maximum(state, max, std::isfinite(reference) ? reference : state.reference, inverse_tau_));
    }
    write_weights(i, padded, gradient);
  }

  // x = logit + soft noise into x_, y = logit + hard noise into y_ (or x_ where there is no noise), and their maxima.
  void read_logits(int64_t i, int64_t start, int64_t count, int64_t padded, acc_t& max, acc_t& best) {
    const int64_t row = input_.rows[i];
    const acc_t* z;
    if (z_) {
      z = z_->template read<acc_t>(row, start, count, kMinusInfinity, x_.data());
    } else {
      acc_t* product = products_.logits(workspace_, i, tile_);
      std::fill(product + count, product + padded, kMinusInfinity);
      z = product;
    }
    const acc_t* hard = hard_ ? hard_->template read<acc_t>(row, start, count, acc_t(0), y_.data()) : nullptr;
    const acc_t* soft = soft_ ? soft_->template read<acc_t>(row, start, count, acc_t(0), buffer_.data()) : nullptr;
    const Vec softcap(static_cast<acc_t>(input_.softcap));
    Vec x_max(kMinusInfinity);
    Vec y_max(kMinusInfinity);
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      Vec value = Vec::loadu(z + j);
      if (input_.softcap != 0) {
        const Vec ratio = (value / softcap).tanh();
        value = Vec::blendv(softcap * ratio, value, value == Vec(kMinusInfinity));
        (Vec(acc_t(1)) - ratio * ratio).store(cap_.data() + j);
      }
      const Vec y = hard ? value + Vec::loadu(hard + j) : value;
      const Vec x = soft ? value + Vec::loadu(soft + j) : value;
      if (noisy()) y.store(y_.data() + j);
      x.store(x_.data() + j);
      x_max = at::vec::maximum(x_max, x);
      y_max = at::vec::maximum(y_max, y);
    }
    max = Lanes<acc_t>(x_max).max();
    best = Lanes<acc_t>(y_max).max();
  }

  const acc_t* read_gradient(int64_t i, int64_t start, int64_t count, int64_t padded) {
    if (dense_) return dense_->template read<acc_t>(input_.rows[i], start, count, acc_t(0), gradient_.data());
    return products_.gradient(workspace_, i, tile_, padded, gradient_.data()) ? gradient_.data() : nullptr;
  }

  void write_weights(int64_t i, int64_t padded, const acc_t* gradient) {
    RowState& state = states[i];
    const Vec max(static_cast<acc_t>(state.max));
    const Vec scale(static_cast<acc_t>(inverse_tau_));
    const Vec reference(static_cast<acc_t>(state.reference));
    acc_t* plain = weights_.data() + ((blocks_ - 1) * n_ + i) * tile_;
    acc_t* with_gradient = weights_.data() + i * tile_;
    const bool capped = input_.through_cap && input_.softcap != 0;
    Vec sum(acc_t(0));
    Vec gradient_sum(acc_t(0));
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      const Vec e = ((Vec::loadu(x_.data() + j) - max) * scale).exp();
      const Vec cap = capped ? Vec::loadu(cap_.data() + j) : Vec(acc_t(1));
      sum = sum + e;
      (capped ? e * cap : e).store(plain + j);
      if (!gradient) continue;
      const Vec product = weighted(e, Vec::loadu(gradient + j) - reference);
      gradient_sum = gradient_sum + product;
      (capped ? product * cap : product).store(with_gradient + j);
    }
    state.sum += Lanes<acc_t>(sum).sum();
    state.gradient_sum += Lanes<acc_t>(gradient_sum).sum();
  }

  void rescale(int64_t i, Rescale by) {
    acc_t* plain = sums.data() + ((blocks_ - 1) * n_ + i) * width_;
    acc_t* with_gradient = sums.data() + i * width_;
    for (int64_t j = 0; j < width_; ++j) {
      if (blocks_ == 2) {
        with_gradient[j] = static_cast<acc_t>(by.factor * (with_gradient[j] - by.shift * plain[j]));
      }
      plain[j] = static_cast<acc_t>(by.factor * plain[j]);
    }
  }

  void accumulate(int64_t start, int64_t count) {
    const acc_t* values;
    int64_t stride;
    if (values_product_ >= 0) {
      values = workspace_.table_data[values_product_];
      stride = workspace_.table_stride[values_product_];
    } else {
      values = read_table<acc_t>(input_.values, start, count, values_buffer_, stride);
    }
    multiply(weights_.data(), tile_, values, stride, false, blocks_ * n_, width_, count, true, sums.data(), width_);
  }

 public:
  std::vector<RowState> states;

 private:
  const PassInput& input_;
  const VocabularyProducts<acc_t>& products_;
  int64_t tile_;
  int64_t n_;
  int64_t blocks_;  // weighted sums per row: none, e alone, or e (G - reference) before e
  int64_t width_;
  int64_t values_product_;
  double inverse_tau_;
  std::optional<StridedRows> z_, soft_, hard_, dense_;
  typename VocabularyProducts<acc_t>::Workspace workspace_;
  std::vector<acc_t> weights_, x_, y_, cap_, gradient_, buffer_, values_buffer_;

 public:
  std::vector<acc_t> sums;  // (blocks * n, width)

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
      if (b.sum == 0) continue;
      if (b.max > a.max) {
        rescale(i, raise_maximum(a, b.max, b.reference, inverse_tau_));
      } else {
        other.rescale(i, raise_maximum(b, a.max, a.reference, inverse_tau_));
      }
      a.sum += b.sum;
      a.gradient_sum += b.gradient_sum;
      for (int64_t block = 0; block < blocks_; ++block) {
        acc_t* to = sums.data() + (block * n_ + i) * width_;
        const acc_t* from = other.sums.data() + (block * n_ + i) * width_;
        for (int64_t j = 0; j < width_; ++j) to[j] += from[j];
      }
    }
  }
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
  const VocabularyProducts<acc_t> products(n, input.hidden, input.weight, input.terms);
  const int64_t width = std::max(products.width(), input.values.defined() ? input.values.size(1) : 0);
  const int64_t tile = tile_size<acc_t>(width, 4 * n);
  const int64_t tiles = (input.vocabulary + tile - 1) / tile;
  const int64_t useful = std::max<int64_t>(1, n * width * input.vocabulary / kWorkPerThread);
  const int64_t parts = std::max<int64_t>(1, std::min({tiles, useful, static_cast<int64_t>(at::get_num_threads())}));

  // Whole tiles, as evenly as they go.
  std::vector<std::unique_ptr<PartPass<acc_t>>> passes(parts);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      passes[part] = std::make_unique<PartPass<acc_t>>(input, products, tile);
      passes[part]->run(tiles * part / parts * tile, std::min(tiles * (part + 1) / parts * tile, input.vocabulary));
    }
  });
  PartPass<acc_t>& total = *passes[0];
  for (int64_t part = 1; part < parts; ++part) total.merge(*passes[part]);

  PassOutput output;
  output.states = std::move(total.states);
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
  const VocabularyProducts<acc_t> products(n, at::Tensor(), at::Tensor(), terms);
  const int64_t tile = tile_size<acc_t>(products.width(), n);
  const int64_t tiles = (vocabulary + tile - 1) / tile;
  acc_t* data = out.mutable_data_ptr<acc_t>();
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    auto workspace = products.workspace(tile);
    std::vector<acc_t> sum(tile);
    for (int64_t begin = first * tile; begin < std::min(last * tile, vocabulary); begin += tile) {
      const int64_t count = std::min(tile, vocabulary - begin);
      products.compute(begin, count, tile, workspace);
      for (int64_t i = 0; i < n; ++i) {
        products.gradient(workspace, i, tile, round_up(count, at::vec::Vectorized<acc_t>::size()), sum.data());
        std::copy_n(sum.data(), count, data + i * out.stride(0) + begin);
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
