#include "../checks.h"
#include "operators.h"
#include "tile_softmax.h"

#include <cmath>
#include <utility>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Each row's own token is left out of the sums: of a nearly certain token, 1 - p keeps no digits, and the sum of the
// other tokens' p does.
template <typename acc_t>
class Pass {
 public:
  Pass(const at::Tensor& h, const Matrix& table, const HeadTransform& transform, const int64_t* tokens, bool need_grad)
      : table_(table),
        transform_(transform),
        tokens_(tokens),
        need_grad_(need_grad),
        rows_(h, table),
        rounds_(std::is_same_v<acc_t, float> && rounds_factors(h.scalar_type(), table)),
        split_(table.rows, table.columns),
        states_(split_.parts),
        mixtures_(split_.parts),
        target_logits_(rows_.rows()) {
    split_.run([&](int64_t part, int64_t first, int64_t last) {
      std::tie(states_[part], mixtures_[part]) = reduce_part(first, last);
    });
  }

  void write(acc_t* log_likelihood, acc_t* gradient) const {
    const std::vector<State> merged = merge_parts(states_, 1.0);
    at::parallel_for(0, rows_.rows(), 16, [&](int64_t first, int64_t last) {
      TableTile<acc_t> target;
      for (int64_t row = first; row < last; ++row) {
        const Whole whole(target_logits_[row], merged[row]);
        log_likelihood[row] = static_cast<acc_t>(whole.log_likelihood);
        if (need_grad_) write_gradient(row, whole, target, gradient + row * table_.columns);
      }
    });
  }

 private:
  // A row's own token beside the state of the others.
  struct Whole {
    double max;
    double sum;     // of exp(logit - max)
    double others;  // 1 - p of the token
    double log_likelihood;

    Whole(double logit, const State& state) {
      // Others that are all -inf count as nothing, unless one of them is NaN.
      const double top = state.max;
      const bool undefined = !std::isfinite(state.sum_exp) || !(logit < kInfinity) || !(top < kInfinity) ||
                             (logit == -kInfinity && top == -kInfinity);
      max = std::max(logit, top);
      const double rest = top == -kInfinity ? 0 : std::exp(top - max) * state.sum_exp;
      const double own = std::exp(logit - max);
      sum = undefined ? std::numeric_limits<double>::quiet_NaN() : own + rest;
      others = rest / sum;
      log_likelihood = logit - max - (logit < top ? std::log(sum) : std::log1p(rest)) + 0 * sum;
    }
  };

  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  // What one thread finds in its part of the vocabulary.
  std::pair<std::vector<State>, std::vector<acc_t>> reduce_part(int64_t first, int64_t last) {
    std::vector<State> states(rows_.padded_rows());
    std::vector<acc_t> mixtures(need_grad_ ? rows_.padded_rows() * table_.columns : 0);
    std::vector<acc_t> logits(split_.tile * kPanel);
    std::vector<acc_t> slopes(need_grad_ && transform_.softcap != 0 ? logits.size() : 0);
    std::vector<acc_t> transposed(need_grad_ ? logits.size() : 0);
    std::vector<double> factors(kPanel);
    TableTile<acc_t> tile;
    PairedTile pairs;
    for (int64_t index = first; index < last; ++index) {
      const int64_t begin = split_.begin(index);
      const int64_t size = split_.size(index);
      if ((need_grad_ && !rounds_) || !rows_.bfloat16()) tile.load(table_, begin, size);
      if (need_grad_ && rounds_) pairs.load(table_, begin, size);
      for (int64_t panel = 0; panel < rows_.panels(); ++panel) {
        const int64_t columns = rows_.columns(panel);
        State* panel_states = states.data() + panel * kPanel;
        rows_.multiply(table_, tile, begin, size, panel, logits.data(), false);
        transform_.apply(logits.data(), size * columns);
        for (size_t i = 0; i < slopes.size(); ++i) slopes[i] = transform_.slope(logits[i]);
        take_targets(logits.data(), begin, size, panel, columns);
        if (!need_grad_) {
          add_tile<false>(logits.data(), size, columns, begin, 1.0, panel_states, factors.data());
          continue;
        }
        add_tile<true>(logits.data(), size, columns, begin, 1.0, panel_states, factors.data());
        for (size_t i = 0; i < slopes.size(); ++i) logits[i] *= slopes[i];
        transpose_tile(logits.data(), size, columns, transposed.data(), size);
        acc_t* mixture = mixtures.data() + panel * kPanel * table_.columns;
        rescale(mixture, factors, columns);
        if constexpr (std::is_same_v<acc_t, float>) {
          if (rounds_) {
            pairs.add_product(columns, transposed.data(), size, mixture);
            continue;
          }
        }
        matmul<acc_t>(columns, table_.columns, size, transposed.data(), size, tile.data(), tile.stride(), mixture,
                      table_.columns, true);
      }
    }
    return {std::move(states), std::move(mixtures)};
  }

  // Keeps the logits of the tokens that lie in this tile, and leaves -inf. No other thread has the same one.
  void take_targets(acc_t* logits, int64_t begin, int64_t size, int64_t panel, int64_t columns) {
    const int64_t first = panel * kPanel;
    const int64_t count = std::min(columns, rows_.rows() - first);
    for (int64_t column = 0; column < count; ++column) {
      const int64_t v = tokens_[first + column] - begin;
      if (v < 0 || v >= size) continue;
      target_logits_[first + column] = logits[v * columns + column];
      logits[v * columns + column] = -std::numeric_limits<acc_t>::infinity();
    }
  }

  void rescale(acc_t* mixture, const std::vector<double>& factors, int64_t columns) const {
    for (int64_t column = 0; column < columns; ++column) {
      if (factors[column] == 1) continue;
      acc_t* line = mixture + column * table_.columns;
      const acc_t factor = static_cast<acc_t>(factors[column]);
      for (int64_t i = 0; i < table_.columns; ++i) line[i] *= factor;
    }
  }

  // scale * ((1 - p_y) slope_y W_y - sum over the others of p_v slope_v W_v)
  void write_gradient(int64_t row, const Whole& whole, TableTile<acc_t>& target, acc_t* gradient) const {
    const acc_t scale = static_cast<acc_t>(transform_.scale);
    const acc_t own = static_cast<acc_t>(whole.others * transform_.slope(target_logits_[row]));
    target.load(table_, tokens_[row], 1);
    for (int64_t i = 0; i < table_.columns; ++i) gradient[i] = own * target.data()[i];
    for (size_t part = 0; part < states_.size(); ++part) {
      const State& state = states_[part][row];
      // A part without an entry above -inf adds nothing.
      if (state.token < 0) continue;
      const acc_t factor = static_cast<acc_t>(std::exp(state.max - whole.max) / whole.sum);
      const acc_t* mixture = mixtures_[part].data() + row * table_.columns;
      for (int64_t i = 0; i < table_.columns; ++i) gradient[i] -= factor * mixture[i];
    }
    for (int64_t i = 0; i < table_.columns; ++i) gradient[i] *= scale;
  }

  const Matrix& table_;
  const HeadTransform& transform_;
  const int64_t* tokens_;
  bool need_grad_;
  Rows<acc_t> rows_;
  bool rounds_;  // the weights of the mixture
  Split split_;
  std::vector<std::vector<State>> states_;  // (parts, padded rows)
  // (parts, padded rows, d): sum over v of exp(logit - max) * slope * weight of v
  std::vector<std::vector<acc_t>> mixtures_;
  std::vector<acc_t> target_logits_;
};

template <typename acc_t>
TwoTensors run(const Tensor& h, const Tensor& weight, const HeadTransform& transform, const Tensor& tokens,
               bool need_grad) {
  constexpr auto kDtype = c10::CppTypeToScalarType<acc_t>::value;
  const Matrix table(weight);
  const Tensor targets = tokens.contiguous();
  Tensor log_likelihood = at::empty({h.size(0)}, h.options().dtype(kDtype));
  Tensor gradient = at::empty({need_grad ? h.size(0) : 0, h.size(1)}, h.options().dtype(kDtype));
  each_pass(h.size(0), [&](int64_t row, int64_t rows) {
    const Pass<acc_t> pass(h.narrow(0, row, rows), table, transform, targets.const_data_ptr<int64_t>() + row,
                           need_grad);
    pass.write(log_likelihood.mutable_data_ptr<acc_t>() + row,
               need_grad ? gradient.mutable_data_ptr<acc_t>() + row * table.columns : nullptr);
  });
  return {log_likelihood, gradient};
}

}  // namespace

TwoTensors log_likelihood_gradient(const Tensor& h, const Tensor& weight, double scale, double softcap,
                                   const Tensor& tokens, bool need_grad) {
  const Check check("log_likelihood_gradient");
  check.product(h, "h", weight, "weight");
  check.tokens(tokens, "tokens", h.size(0), weight.size(0));
  const HeadTransform transform{scale, softcap};
  return any_double({h, weight}) ? run<double>(h, weight, transform, tokens, need_grad)
                                 : run<float>(h, weight, transform, tokens, need_grad);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
