// What a softmax over a row adds up to, entry by entry, while the row's maximum is still rising.
#pragma once

#include "operators.h"

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

// The factor and the shift that bring sums to another maximum and another reference.
struct Rescale {
  double factor = 0;
  double shift = 0;
};

// What the entries of a row that were seen so far add up to, with e = exp((x - max) / tau). An operator adds to the
// sums that it needs; the others mean nothing. Sums are double: a vocabulary's worth of float32 additions would cost
// digits, and there is one addition per block. Of a row that holds NaN or +inf, max, best or sum_exp is not finite.
struct State {
  double max = -std::numeric_limits<double>::infinity();   // of x
  double sum_exp = 0;                                      // of e
  double sum_exp_logit = 0;                                // of e (x - max) / tau
  double sum_exp_grad = 0;                                 // of e (G - reference)
  double best = -std::numeric_limits<double>::infinity();  // of the values whose argmax is the hard token
  int64_t token = -1;                                      // where `best` is, the lowest index of equals
  // G of the maximum: only differences of G matter, and where one token holds nearly all of the weight, those of the
  // others would drown in its rounding.
  double reference = 0;

  // Indices must ascend, so that the first of equals stays.
  void add_hard(double value, int64_t index) {
    if (value > best) {
      best = value;
      token = index;
    }
  }

  // Makes `value` the maximum; what was summed beside the state is to be rescaled alike.
  Rescale raise_max(double value, double inverse_tau, double new_reference = 0) {
    Rescale by{0, new_reference - reference};
    if (max > -std::numeric_limits<double>::infinity()) {
      const double moved = (max - value) * inverse_tau;
      by.factor = std::exp(moved);
      // -inf times a factor of 0 would be NaN, and so would be the right answer for a row with +inf in it.
      sum_exp_logit = by.factor > 0 ? by.factor * (sum_exp_logit + moved * sum_exp) : sum_exp * 0;
      sum_exp_grad = by.factor * (sum_exp_grad - by.shift * sum_exp);
      sum_exp *= by.factor;
    }
    max = value;
    reference = new_reference;
    return by;
  }

  // Adds a state of later entries, relative to the same maximum and reference.
  void add(const State& later) {
    sum_exp += later.sum_exp;
    sum_exp_logit += later.sum_exp_logit;
    sum_exp_grad += later.sum_exp_grad;
    add_hard(later.best, later.token);
  }

  // Adds a state of later entries.
  void merge(State later, double inverse_tau) {
    if (later.max > max) {
      raise_max(later.max, inverse_tau, later.reference);
    } else {
      later.raise_max(max, inverse_tau, reference);
    }
    add(later);
  }

  // Whether there are a softmax and a hard token.
  bool defined() const { return std::isfinite(max) && std::isfinite(best) && std::isfinite(sum_exp); }

  double lse(double inverse_tau) const {
    return defined() ? max * inverse_tau + std::log(sum_exp) : std::numeric_limits<double>::quiet_NaN();
  }
};

namespace {

struct Thresholds {
  std::optional<double> entropy;
  std::optional<double> confidence;
};

// Exponentials count in the units that their implementation likes: exp(y) = power(y * kUnits), y <= 0.
template <typename acc_t>
struct Power;

template <>
struct Power<float> {
  static constexpr double kUnits = 1.4426950408889634;  // of log2
  // What is further below the maximum counts as 2^-126, which no float32 sum with a 1 in it can see. It keeps an entry
  // of -inf from adding 0 * inf = NaN to the entropy, and the exponent of the result a normal one.
  static constexpr float kLowest = -126;

  // 2^x for -126 <= x <= 126, exactly 1 for 0. Relative error below 2e-7: that of the minimax polynomials is 1e-7, the
  // rest is rounding, and its mean over x is below 2e-8.
  static at::vec::Vectorized<float> of(const at::vec::Vectorized<float>& x) {
    using Vec = at::vec::Vectorized<float>;
#ifdef CPU_CAPABILITY_AVX512
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const Vec p = polynomial(f, {1.8671300495043397e-3f, 9.017030708491802e-3f, 5.579991266131401e-2f,
                                 0.24016444385051727f, 0.6931512951850891f});
    return _mm512_scalef_ps(p, x);
#else
    // Adding it rounds to an integer, whose bits are then the lowest ones of the sum.
    const Vec magic(12582912.0f);
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    const Vec p = polynomial(f, {1.326472731307149e-3f, 9.671512991189957e-3f, 5.550733581185341e-2f,
                                 0.24022242426872253f, 0.6931470036506653f});
    const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
    return at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
#endif
  }

 private:
  static at::vec::Vectorized<float> polynomial(const at::vec::Vectorized<float>& f,
                                               const std::array<float, 5>& coefficients) {
    using Vec = at::vec::Vectorized<float>;
    Vec p(coefficients[0]);
    for (int k = 1; k < 5; ++k) p = at::vec::fmadd(p, f, Vec(coefficients[k]));
    return at::vec::fmadd(p, f, Vec(1.0f));
  }
};

template <>
struct Power<double> {
  static constexpr double kUnits = 1;
  static constexpr double kLowest = -700;

  static at::vec::Vectorized<double> of(const at::vec::Vectorized<double>& x) { return x.exp(); }
};

// power(x), but 0 for what is too far below the maximum for Power: an infinity may be weighted with it.
template <typename acc_t>
at::vec::Vectorized<acc_t> power_or_zero(const at::vec::Vectorized<acc_t>& x) {
  using Vec = at::vec::Vectorized<acc_t>;
  const Vec lowest(static_cast<acc_t>(Power<acc_t>::kLowest));
  return Vec::blendv(Power<acc_t>::of(at::vec::clamp_min(x, lowest)), Vec(acc_t(0)), x < lowest);
}

// Not NaN and not -inf, of which nothing can be subtracted.
template <typename acc_t>
acc_t finite_or_zero(double max) {
  return max == -std::numeric_limits<double>::infinity() ? acc_t(0) : static_cast<acc_t>(max);
}

// A row's mask is true where its entropy and its largest probability pass the thresholds that there are.
template <typename acc_t>
Statistics relaxed_statistics(const std::vector<State>& states, int64_t rows, double inverse_tau,
                              const Thresholds& thresholds, const at::TensorOptions& options) {
  constexpr auto kDtype = c10::CppTypeToScalarType<acc_t>::value;
  at::Tensor max_prob = at::empty({rows}, options.dtype(kDtype));
  at::Tensor lse = at::empty({rows}, options.dtype(kDtype));
  at::Tensor entropy = at::empty({rows}, options.dtype(kDtype));
  at::Tensor token = at::empty({rows}, options.dtype(at::kLong));
  at::Tensor mask = at::empty({rows}, options.dtype(at::kBool));
  auto* max_prob_out = max_prob.mutable_data_ptr<acc_t>();
  auto* lse_out = lse.mutable_data_ptr<acc_t>();
  auto* entropy_out = entropy.mutable_data_ptr<acc_t>();
  auto* token_out = token.mutable_data_ptr<int64_t>();
  auto* mask_out = mask.mutable_data_ptr<bool>();
  for (int64_t row = 0; row < rows; ++row) {
    const State& state = states[row];
    if (!state.defined()) {
      max_prob_out[row] = lse_out[row] = entropy_out[row] = std::numeric_limits<acc_t>::quiet_NaN();
      token_out[row] = -1;
      mask_out[row] = false;
      continue;
    }
    max_prob_out[row] = static_cast<acc_t>(1 / state.sum_exp);
    lse_out[row] = static_cast<acc_t>(state.lse(inverse_tau));
    // Never below zero, rounding or not: the maximum adds exactly 1 to sum_exp and nothing to sum_exp_logit.
    entropy_out[row] = static_cast<acc_t>(std::log(state.sum_exp) - state.sum_exp_logit / state.sum_exp);
    token_out[row] = state.token;
    mask_out[row] = (!thresholds.entropy || entropy_out[row] >= static_cast<acc_t>(*thresholds.entropy)) &&
                    (!thresholds.confidence || max_prob_out[row] <= static_cast<acc_t>(*thresholds.confidence));
  }
  return {max_prob, lse, entropy, token, mask};
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
