// The arithmetic of one DTO row.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "intrinsics.cuh"

namespace nabla_fast::cuda {

// What a part of the vocabulary says about a row, with e = exp((x - max) / tau). Parts merge in any grouping; the empty
// part changes nothing. A NaN or +inf among the x shows in max or sum_exp, among the hard values in best.
struct State {
  float max = -INFINITY;   // of x = logit + soft noise
  float sum_exp = 0;       // of e
  float sum_exp_grad = 0;  // of e * G
  float best = -INFINITY;  // of logit + hard noise; +inf for NaN
  int token = INT_MAX;     // the lowest one with `best`
};

// Differences are taken before they are divided by tau: large logits would be rounded too far beside a small one.

// exp((from - to) / tau), the factor on sums when their maximum goes from `from` up to `to`. No NaN from
// (-inf) - (-inf).
__device__ __forceinline__ float rescale(float from, float to, float inverse_tau) {
  return from == -INFINITY ? 0.0f : expf((from - to) * inverse_tau);
}

// exp((x - max) / tau) where max may still be -inf, and then so is x.
__device__ __forceinline__ float relative_exp(float x, float max, float inverse_tau) {
  return expf((x - (max == -INFINITY ? 0.0f : max)) * inverse_tau);
}

// 0 * inf would be NaN where a -inf logit meets an infinite gradient; such entries cannot move.
__device__ __forceinline__ float weigh(float e, float gradient) { return e > 0 ? e * gradient : 0.0f; }

// The factor on what was summed with the state, too.
__device__ __forceinline__ float raise_max(State& state, float max, float inverse_tau) {
  const float factor = rescale(state.max, max, inverse_tau);
  state.sum_exp *= factor;
  state.sum_exp_grad *= factor;
  state.max = max;
  return factor;
}

// Of x where no softmax is wanted, what says whether there is one.
__device__ __forceinline__ void look_at_soft(State& state, float x) {
  state.max = fmaxf(state.max, x == x ? x : INFINITY);
}

__device__ __forceinline__ void add_soft(State& state, float x, float gradient, float inverse_tau) {
  if (x > state.max) raise_max(state, x, inverse_tau);
  const float e = relative_exp(x, state.max, inverse_tau);
  state.sum_exp += e;
  state.sum_exp_grad += weigh(e, gradient);
}

// Tokens must ascend, so that the first of equals stays.
__device__ __forceinline__ void add_hard(State& state, float value, int token) {
  const float seen = value == value ? value : INFINITY;
  if (seen > state.best) {
    state.best = seen;
    state.token = token;
  }
}

__device__ __forceinline__ State merge(const State& a, const State& b, float inverse_tau) {
  State out = a;
  out.max = fmaxf(a.max, b.max);
  const float factor_a = rescale(a.max, out.max, inverse_tau), factor_b = rescale(b.max, out.max, inverse_tau);
  out.sum_exp = a.sum_exp * factor_a + b.sum_exp * factor_b;
  out.sum_exp_grad = a.sum_exp_grad * factor_a + b.sum_exp_grad * factor_b;
  if (b.best > a.best || (b.best == a.best && b.token < a.token)) {
    out.best = b.best;
    out.token = b.token;
  }
  return out;
}

// The same of parts whose sums are relative to one base in place of each one's maximum.
__device__ __forceinline__ State merge_sums(const State& a, const State& b) {
  const bool later = b.best > a.best || (b.best == a.best && b.token < a.token);
  return {fmaxf(a.max, b.max), a.sum_exp + b.sum_exp, a.sum_exp_grad + b.sum_exp_grad, later ? b.best : a.best,
          later ? b.token : a.token};
}

// The hard token; -1 where the row, with either noise, holds NaN or +inf or is all -inf.
__device__ __forceinline__ int token_of(const State& row) {
  return fabsf(row.max) < INFINITY && fabsf(row.best) < INFINITY && row.sum_exp == row.sum_exp ? row.token : -1;
}

// A constant on G changes nothing in p * (G - <p, G>), so G is taken relative to its value at the hard token, where
// most of p usually is: less is lost when <p, G> is subtracted.
__device__ __forceinline__ float gradient_shift(const float* gradient, int64_t token, int64_t vocabulary) {
  const float value = token >= 0 && token < vocabulary ? gradient[token] : 0.0f;
  return fabsf(value) < INFINITY ? value : 0.0f;
}

struct Logit {
  float value;
  float slope;  // d value / d product, without the head's scale
};

__device__ __forceinline__ Logit head_logit(float product, float scale, float softcap) {
  const float scaled = scale * product;
  if (softcap == 0) return {scaled, 1.0f};
  const float bounded = tanhf(scaled / softcap);
  return {softcap * bounded, 1 - bounded * bounded};
}

// The numbers of one Adam step that are the same for every parameter of a row.
struct AdamStep {
  float rate;        // learning rate / (1 - beta1^count)
  float correction;  // 1 / (1 - beta2^count)
  float weight_decay;
};

__device__ __forceinline__ double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// In double, as torch.optim.Adam has them: 1 - 0.999f loses five digits.
__device__ __forceinline__ AdamStep adam_step(int64_t count, double learning_rate, float weight_decay) {
  return {static_cast<float>(learning_rate / (1 - power(0.9, count))),
          static_cast<float>(1 / (1 - power(0.999, count))), weight_decay};
}

// The root and the quotient are good to 2^-21 of a step. A second moment too small for the root is nothing beside eps.
__device__ __forceinline__ void adam(float& parameter, float& exp_avg, float& exp_avg_sq, float grad,
                                     const AdamStep& step) {
  if (step.weight_decay != 0) grad += step.weight_decay * parameter;
  exp_avg += 0.1f * (grad - exp_avg);
  exp_avg_sq = 0.999f * exp_avg_sq + 0.001f * grad * grad;
  const float root = approximate_sqrt(exp_avg_sq * step.correction);
  parameter -= step.rate * exp_avg * approximate_reciprocal(root + 1e-8f);
}

}  // namespace nabla_fast::cuda
