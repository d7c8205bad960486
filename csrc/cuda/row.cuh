// The arithmetic of one DTO row: plain C++ that the kernels and the host tests share.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define NABLA_FAST_BOTH __host__ __device__ __forceinline__
#else
#define NABLA_FAST_BOTH inline
#endif

namespace nabla_fast::cuda {

// What one part of the vocabulary says about a row. Parts merge in any grouping; the empty part changes nothing.
struct Part {
  float max = -INFINITY;   // of x = logit + soft noise; NaN shows in `sum`
  float sum = 0;           // of exp((x - max) / tau)
  float weighted = 0;      // of exp((x - max) / tau) * gradient
  float best = -INFINITY;  // of logit + hard noise
  int index = INT_MAX;     // the lowest one with `best`
  int bad = 0;             // whether a hard value is NaN or +inf
};

// Differences are taken before they are divided by tau: large logits would be rounded too far beside a small one.

// exp((from - to) / tau), the factor on sums when their maximum goes from `from` up to `to`. No NaN from
// (-inf) - (-inf).
NABLA_FAST_BOTH float rescale(float from, float to, float inverse_tau) {
  return from == -INFINITY ? 0.0f : expf((from - to) * inverse_tau);
}

// exp((x - max) / tau) where max may still be -inf, and then so is x.
NABLA_FAST_BOTH float relative_exp(float x, float max, float inverse_tau) {
  return expf((x - (max == -INFINITY ? 0.0f : max)) * inverse_tau);
}

// 0 * inf would be NaN where a -inf logit meets an infinite gradient; such entries cannot move.
NABLA_FAST_BOTH float weigh(float e, float gradient) { return e > 0 ? e * gradient : 0.0f; }

// The factor on what was summed with the part, too.
NABLA_FAST_BOTH float raise_max(Part& part, float max, float inverse_tau) {
  const float factor = rescale(part.max, max, inverse_tau);
  part.sum *= factor;
  part.weighted *= factor;
  part.max = max;
  return factor;
}

// Of x where no softmax is wanted, what says whether there is one.
NABLA_FAST_BOTH void look_at_soft(Part& part, float x) { part.max = fmaxf(part.max, x == x ? x : INFINITY); }

NABLA_FAST_BOTH void add_soft(Part& part, float x, float gradient, float inverse_tau) {
  if (x > part.max) {
    raise_max(part, x, inverse_tau);
  }
  const float e = relative_exp(x, part.max, inverse_tau);
  part.sum += e;
  part.weighted += weigh(e, gradient);
}

// Indices must ascend, so that the first of equals stays.
NABLA_FAST_BOTH void add_hard(Part& part, float value, int index) {
  if (!(value < INFINITY)) {
    part.bad = 1;
  }
  if (value > part.best) {
    part.best = value;
    part.index = index;
  }
}

NABLA_FAST_BOTH Part merge(const Part& a, const Part& b, float inverse_tau) {
  Part out = a;
  out.max = fmaxf(a.max, b.max);
  const float factor_a = rescale(a.max, out.max, inverse_tau), factor_b = rescale(b.max, out.max, inverse_tau);
  out.sum = a.sum * factor_a + b.sum * factor_b;
  out.weighted = a.weighted * factor_a + b.weighted * factor_b;
  if (b.best > a.best || (b.best == a.best && b.index < a.index)) {
    out.best = b.best;
    out.index = b.index;
  }
  out.bad = a.bad | b.bad;
  return out;
}

// The hard token; -1 where the row, with either noise, holds NaN or +inf or is all -inf.
NABLA_FAST_BOTH int token_of(const Part& row) {
  const bool softmax = fabsf(row.max) < INFINITY && row.sum == row.sum;
  return row.bad || row.best == -INFINITY || !softmax ? -1 : row.index;
}

// A constant on G changes nothing in p * (G - <p, G>), so G is taken relative to its value at the hard token, where
// most of p usually is: less is lost when <p, G> is subtracted.
NABLA_FAST_BOTH float gradient_shift(const float* gradient, int64_t token, int64_t vocabulary) {
  const float value = token >= 0 && token < vocabulary ? gradient[token] : 0.0f;
  return fabsf(value) < INFINITY ? value : 0.0f;
}

// dL/dz of one entry, from its x and G and the row's statistics.
NABLA_FAST_BOTH float logit_gradient(float x, float gradient, float max, float sum, float mean, float inverse_tau) {
  const float p = relative_exp(x, max, inverse_tau) / sum;
  return (p > 0 ? p * (gradient - mean) : p * mean) * inverse_tau;
}

struct Logit {
  float value;
  float slope;  // d value / d product, without the head's scale
};

NABLA_FAST_BOTH Logit head_logit(float product, float scale, float softcap) {
  const float scaled = scale * product;
  if (softcap == 0) {
    return {scaled, 1.0f};
  }
  const float bounded = tanhf(scaled / softcap);
  return {softcap * bounded, 1 - bounded * bounded};
}

// The numbers of one Adam step that are the same for every parameter of a row.
struct AdamStep {
  float rate;          // learning rate / (1 - beta1^count)
  float correction;    // 1 - beta2^count
  float weight_decay;
};

NABLA_FAST_BOTH double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) {
      result *= base;
    }
  }
  return result;
}

// In double, as torch.optim.Adam has them: 1 - 0.999f loses five digits.
NABLA_FAST_BOTH AdamStep adam_step(int64_t count, double learning_rate, float weight_decay) {
  return {static_cast<float>(learning_rate / (1 - power(0.9, count))), static_cast<float>(1 - power(0.999, count)),
          weight_decay};
}

NABLA_FAST_BOTH void adam(float& parameter, float& exp_avg, float& exp_avg_sq, float grad, const AdamStep& step) {
  if (step.weight_decay != 0) {
    grad += step.weight_decay * parameter;
  }
  exp_avg += 0.1f * (grad - exp_avg);
  exp_avg_sq = 0.999f * exp_avg_sq + 0.001f * grad * grad;
  parameter -= step.rate * exp_avg / (sqrtf(exp_avg_sq / step.correction) + 1e-8f);
}

}  // namespace nabla_fast::cuda
