// Adam with the betas 0.9 and 0.999 and eps 1e-8, as torch.optim.Adam makes its steps.
#pragma once

#include "matrix.h"

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// What one step needs that is the same for every entry.
template <typename acc_t>
struct Adam {
  using Vec = at::vec::Vectorized<acc_t>;

  // `step` is 1 for the first step.
  Adam(int64_t step, double learning_rate, double weight_decay)
      : step_size(static_cast<acc_t>(-learning_rate / (1 - std::pow(0.9, step)))),
        inverse_correction(static_cast<acc_t>(1 / (1 - std::pow(0.999, step)))),
        decay(static_cast<acc_t>(weight_decay)),
        decays(weight_decay != 0) {}

  // The parameter after the step; the moments are updated.
  Vec operator()(const Vec& parameter, const Vec& objective_gradient, Vec& mean, Vec& square) const {
    const Vec gradient = decays ? at::vec::fmadd(decay, parameter, objective_gradient) : objective_gradient;
    mean = at::vec::fmadd(gradient - mean, Vec(acc_t(0.1)), mean);
    square = at::vec::fmadd(gradient * gradient, Vec(acc_t(0.001)), square * Vec(acc_t(0.999)));
    const Vec denominator = (square * inverse_correction).sqrt() + Vec(acc_t(1e-8));
    return at::vec::fmadd(step_size, mean / denominator, parameter);
  }

  void update(acc_t* parameters, acc_t* means, acc_t* squares, const acc_t* gradient, int64_t count) const {
    each_vector<Vec>(count, [&](int64_t i, int64_t lanes) {
      Vec mean = Vec::loadu(means + i, lanes);
      Vec square = Vec::loadu(squares + i, lanes);
      (*this)(Vec::loadu(parameters + i, lanes), Vec::loadu(gradient + i, lanes), mean, square)
          .store(parameters + i, lanes);
      mean.store(means + i, lanes);
      square.store(squares + i, lanes);
    });
  }

  Vec step_size;
  Vec inverse_correction;
  Vec decay;
  bool decays;
};

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
