// Linear layers of few rows, for the operators that consist of several.
#pragma once

#include "../checks.h"
#include "operators.h"

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {

// A linear layer; its weight may be of int8, with a scale for each row.
struct LinearLayer {
  Tensor weight;
  OptionalTensor scale;
  OptionalTensor bias;
};

// The layer as `multiply_rows` takes it, for rows of K numbers of a `kind`: checked, its scale and bias float32 without
// gaps. `dtype`: of the product.
LinearLayer checked_layer(const Check& check, int64_t size, at::ScalarType kind, const LinearLayer& layer,
                          at::ScalarType dtype);

// What `linear` gives for each of the layers, one or more, whose weights have one dtype.
std::vector<Tensor> linear_layers(const Check& check, const Tensor& x, c10::ArrayRef<LinearLayer> layers,
                                  at::ScalarType dtype);

// outs[i] (M, N_i) = x (M, K) times layer i, checked; M is at most kFewRows. Weights are of the dtype of x, or, where
// that is float, all of int8. All of them are read by all threads in one go: between two of them, a thread would wait
// for the others.
template <typename scalar_t>
void multiply_rows(const scalar_t* x, int64_t count, int64_t size, c10::ArrayRef<LinearLayer> layers,
                   c10::ArrayRef<scalar_t*> outs);

// Rows of x up to which the weight is read once, and multiplied with them in the order of memory.
constexpr int64_t kFewRows = 16;

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
