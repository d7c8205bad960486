#include "kept_logits.h"

#include "matrix.h"
#include "vocabulary_products.h"

#include <ATen/ops/empty.h>

#include <memory>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// What one thread makes of its part of the vocabulary: p (G - <p, G>), times the values.
template <typename acc_t>
class SecondPass {
  using Vec = at::vec::Vectorized<acc_t>;

 public:
  SecondPass(const PassInput& input, const KeptLogits<acc_t>& kept, const std::vector<State>& states,
             const std::vector<int64_t>& chosen, const VocabularyProducts<acc_t>& products)
      : sums(chosen.size() * input.values.size(1)),
        input_(input),
        kept_(kept),
        states_(states),
        chosen_(chosen),
        products_(products),
        soft_(optional_matrix(input.soft_noise)),
        gradient_(input.gradient),
        workspace_(products.workspace(kept.tile)),
        weights_(kPanel * kept.tile),
        soft_buffer_(kept.tile),
        gradient_buffer_(kept.tile) {}

  void add_tile(int64_t start, int64_t count) {
    const int64_t width = input_.values.size(1);
    products_.load(start, count, workspace_);
    const auto n = static_cast<int64_t>(chosen_.size());
    for (int64_t first = 0; first < n; first += kPanel) {
      const int64_t rows = std::min(kPanel, n - first);
      for (int64_t row = 0; row < rows; ++row) {
        if (first + row + kRowsAhead < n) {
          const int64_t next = input_.rows[chosen_[first + row + kRowsAhead]];
          gradient_.prefetch(next, start, count);
          if (soft_) soft_->prefetch(next, start, count);
        }
        write_weights(chosen_[first + row], start, count, weights_.data() + row * kept_.tile);
      }
      products_.add_values(rows, count, weights_.data(), kept_.tile, workspace_, sums.data() + first * width);
    }
  }

 private:
  // Of row i of the first pass. The first pass has filled its logits up with -inf, so that lanes behind `count` are 0.
  void write_weights(int64_t i, int64_t start, int64_t count, acc_t* weights) {
    const State& state = states_[i];
    const acc_t* z = kept_.block(start, i);
    const acc_t* soft =
        soft_ ? soft_->template read<acc_t>(input_.rows[i], start, count, acc_t(0), soft_buffer_.data()) : nullptr;
    const acc_t* gradient = gradient_.read<acc_t>(input_.rows[i], start, count, acc_t(0), gradient_buffer_.data());
    const Vec max(static_cast<acc_t>(state.max));
    const Vec scale(static_cast<acc_t>(Power<acc_t>::kUnits / input_.tau));
    const Vec reference(static_cast<acc_t>(state.reference));
    const Vec mean(static_cast<acc_t>(state.sum_exp_grad / state.sum_exp));
    const bool capped = input_.through_cap && input_.softcap != 0;
    const Vec inverse_cap(static_cast<acc_t>(capped ? 1 / input_.softcap : 0));
    for (int64_t j = 0; j < count; j += Vec::size()) {
      const Vec logit = Vec::loadu(z + j);
      const Vec x = soft ? logit + Vec::loadu(soft + j) : logit;
      const Vec e = power_or_zero<acc_t>((x - max) * scale);
      Vec weight = weighted(e, Vec::loadu(gradient + j) - reference - mean);
      if (capped) {
        const Vec ratio = logit * inverse_cap;
        weight = weighted(weight, Vec(acc_t(1)) - ratio * ratio);
      }
      weight.store(weights + j);
    }
  }

 public:
  std::vector<acc_t> sums;  // (chosen, width)

 private:
  const PassInput& input_;
  const KeptLogits<acc_t>& kept_;
  const std::vector<State>& states_;
  const std::vector<int64_t>& chosen_;
  const VocabularyProducts<acc_t>& products_;
  std::optional<Matrix> soft_;
  Matrix gradient_;
  typename VocabularyProducts<acc_t>::Workspace workspace_;
  std::vector<acc_t> weights_, soft_buffer_, gradient_buffer_;
};

}  // namespace

int64_t kept_size(int64_t rows, int64_t vocabulary) { return (vocabulary + kMostEntries) * round_up(rows, kPanelUnit); }

template <typename acc_t>
at::Tensor kept_gradient(const PassInput& input, const std::vector<State>& states, const std::vector<int64_t>& chosen) {
  const KeptLogits<acc_t> kept = *optional_kept<acc_t>(input);
  const VocabularyProducts<acc_t> products({}, {}, {1, 0}, {}, input.values, input.hidden.scalar_type());
  const Split split(input.vocabulary(), input.weight.size(1));
  std::vector<std::unique_ptr<SecondPass<acc_t>>> passes(split.parts);
  split.run([&](int64_t part, int64_t first, int64_t last) {
    passes[part] = std::make_unique<SecondPass<acc_t>>(input, kept, states, chosen, products);
    for (int64_t i = first; i < last; ++i) passes[part]->add_tile(split.begin(i), split.size(i));
  });
  const auto n = static_cast<int64_t>(chosen.size());
  const int64_t width = input.values.size(1);
  at::Tensor result = at::empty({n, width}, at::dtype(c10::CppTypeToScalarType<acc_t>::value));
  acc_t* out = result.mutable_data_ptr<acc_t>();
  for (int64_t i = 0; i < n; ++i) {
    const auto factor = static_cast<acc_t>(1 / (states[chosen[i]].sum_exp * input.tau));
    for (int64_t at = i * width; at < (i + 1) * width; ++at) {
      acc_t sum = 0;
      for (const auto& pass : passes) sum += pass->sums[at];
      out[at] = sum * factor;
    }
  }
  return result;
}

template at::Tensor kept_gradient<float>(const PassInput&, const std::vector<State>&, const std::vector<int64_t>&);
template at::Tensor kept_gradient<double>(const PassInput&, const std::vector<State>&, const std::vector<int64_t>&);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
