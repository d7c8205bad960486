#include "../checks.h"
#include "operators.h"
#include "tile_softmax.h"

#include <cmath>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// What one thread finds in its part of the vocabulary, each row's own token left out: of a nearly certain token,
// 1 - p keeps no digits, and the sum of the other tokens' p does.
template <typename acc_t>
struct Part {
  std::vector<State> states;
  std::vector<acc_t> mixture;  // (padded rows, d): sum over v of exp(logit - max) * slope * weight of v
};

template <typename acc_t>
class Pass {
 public:
  Pass(const at::Tensor& h, const Table& table, const HeadTransform& transform, const int64_t* tokens, bool need_grad)
      : table_(table),
        transform_(transform),
        tokens_(tokens),
        need_grad_(need_grad),
        rows_(h, table),
        rounds_(std::is_same_v<acc_t, float> && rounds_factors(h.scalar_type(), table)),
        split_(table.entries, table.width),
        parts_(split_.parts),
        target_logits_(rows_.rows()) {
    split_.run([&](int64_t part, int64_t first, int64_t last) { parts_[part] = reduce_part(first, last); });
  }

  void write(acc_t* log_likelihood, acc_t* gradient) const {
    std::vector<std::vector<State>> states;
    for (const auto& part : parts_) states.push_back(part.states);
    const std::vector<State> merged = merge_parts(states, 1.0);
    at::parallel_for(0, rows_.rows(), 16, [&](int64_t first, int64_t last) {
      TableTile<acc_t> target;
      for (int64_t row = first; row < last; ++row) {
        const Whole whole(target_logits_[row], merged[row]);
        log_likelihood[row] = static_cast<acc_t>(whole.log_likelihood);
        if (need_grad_) write_gradient(row, whole, target, gradient + row * table_.width);
      }
    });
  }

 private:
  // A row's own token beside the state of the others.
  struct Whole {
    double max;
    double sum;  // of exp(logit - max)
    double others;  // 1 - p of the token
    double log_likelihood;

    Whole(double logit, const State& state) {
      // Others that are all -inf count as nothing, unless one of them is NaN.
      const double top = state.token >= 0 ? state.max : -kInfinity;
      const bool undefined = !std::isfinite(state.sum) || !(logit < kInfinity) || !(top < kInfinity) ||
                             (logit == -kInfinity && top == -kInfinity);
      max = std::max(logit, top);
      const double rest = top == -kInfinity ? 0 : std::exp(top - max) * state.sum;
      const double own = std::exp(logit - max);
      sum = undefined ? std::numeric_limits<double>::quiet_NaN() : own + rest;
      others = rest / sum;
      log_likelihood = logit - max - (logit < top ? std::log(sum) : std::log1p(rest)) + 0 * sum;
    }
  };

  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  Part<acc_t> reduce_part(int64_t first, int64_t last) {
    Part<acc_t> part;
    part.states.resize(rows_.padded_rows());
    if (need_grad_) part.mixture.resize(rows_.padded_rows() * table_.width);
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
        State* states = part.states.data() + panel * kPanel;
        rows_.multiply(table_, tile, begin, size, panel, logits.data(), false);
        transform_.apply(logits.data(), size * columns);
        for (size_t i = 0; i < slopes.size(); ++i) slopes[i] = transform_.slope(logits[i]);
        take_targets(logits.data(), begin, size, panel, columns);
        if (!need_grad_) {
          add_tile<false>(logits.data(), size, columns, begin, 1.0, states, factors.data());
          continue;
        }
        add_tile<true>(logits.data(), size, columns, begin, 1.0, states, factors.data());
        for (size_t i = 0; i < slopes.size(); ++i) logits[i] *= slopes[i];
        transpose_tile(logits.data(), size, columns, transposed.data(), size);
        acc_t* mixture = part.mixture.data() + panel * kPanel * table_.width;
        rescale(mixture, factors, columns);
        if constexpr (std::is_same_v<acc_t, float>) {
          if (rounds_) {
            pairs.add_product(columns, transposed.data(), size, mixture);
            continue;
          }
        }
        matmul<acc_t>(columns, table_.width, size, transposed.data(), size, tile.data(), tile.stride(), mixture,
                      table_.width, true);
      }
    }
    return part;
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
      acc_t* line = mixture + column * table_.width;
      const acc_t factor = static_cast<acc_t>(factors[column]);
      for (int64_t i = 0; i < table_.width; ++i) line[i] *= factor;
    }
  }

  // scale * ((1 - p_y) slope_y W_y - sum over the others of p_v slope_v W_v)
  void write_gradient(int64_t row, const Whole& whole, TableTile<acc_t>& target, acc_t* gradient) const {
    const acc_t scale = static_cast<acc_t>(transform_.scale);
    const acc_t own = static_cast<acc_t>(whole.others * transform_.slope(target_logits_[row]));
    target.load(table_, tokens_[row], 1);
    for (int64_t i = 0; i < table_.width; ++i) gradient[i] = own * target.data()[i];
    for (const auto& part : parts_) {
      const State& state = part.states[row];
      // A part without an entry above -inf adds nothing.
      if (state.token < 0) continue;
      const acc_t factor = static_cast<acc_t>(std::exp(state.max - whole.max) / whole.sum);
      const acc_t* mixture = part.mixture.data() + row * table_.width;
      for (int64_t i = 0; i < table_.width; ++i) gradient[i] -= factor * mixture[i];
    }
    for (int64_t i = 0; i < table_.width; ++i) gradient[i] *= scale;
  }

  const Table& table_;
  const HeadTransform& transform_;
  const int64_t* tokens_;
  bool need_grad_;
  Rows<acc_t> rows_;
  bool rounds_;  // the weights of the mixture
  Split split_;
  std::vector<Part<acc_t>> parts_;
  std::vector<acc_t> target_logits_;
};

template <typename acc_t>
TwoTensors run(const Tensor& h, const Tensor& weight, const HeadTransform& transform, const Tensor& tokens,
               bool need_grad) {
  constexpr auto kDtype = c10::CppTypeToScalarType<acc_t>::value;
  const Table table(weight);
  const Tensor targets = tokens.contiguous();
  Tensor log_likelihood = at::empty({h.size(0)}, h.options().dtype(kDtype));
  Tensor gradient = at::empty({need_grad ? h.size(0) : 0, h.size(1)}, h.options().dtype(kDtype));
  for (int64_t row = 0; row < h.size(0); row += kRowsPerPass) {
    const int64_t rows = std::min(kRowsPerPass, h.size(0) - row);
    const Pass<acc_t> pass(h.narrow(0, row, rows), table, transform, targets.const_data_ptr<int64_t>() + row,
                           need_grad);
    pass.write(log_likelihood.mutable_data_ptr<acc_t>() + row,
               need_grad ? gradient.mutable_data_ptr<acc_t>() + row * table.width : nullptr);
  }
  return {log_likelihood, gradient};
}

}  // namespace

TwoTensors log_likelihood_gradient(const Tensor& h, const Tensor& weight, double scale, double softcap,
                                   const Tensor& tokens, bool need_grad) {
  const Check check("log_likelihood_gradient");
  check.product(h, "h", weight, "weight");
  check.tokens(tokens, "tokens", h.size(0), weight.size(0));
  const HeadTransform transform{scale, softcap};
  if (h.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble) {
    return run<double>(h, weight, transform, tokens, need_grad);
  }
  return run<float>(h, weight, transform, tokens, need_grad);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
