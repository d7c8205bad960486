// The CPU operators. What each one means stands in nabla_fast/ops/reference.py, its declaration in nabla_fast/ops/ too:
// named tuples are taken apart here, and lists of tensors are lists.
//
// Every file of this folder is compiled once per instruction set (DEFAULT, and on x86 AVX2 and AVX512), because at::vec
// and the compiler use no wider vectors than they were promised. registration.cpp picks the set of the running machine,
// as torch itself does: ATEN_CPU_CAPABILITY=default|avx2|avx512 in the environment lowers it.
//
// To add an operator: one line below; its function, named like the operator, in <operator>.cpp inside
// `namespace nabla_fast::cpu::CPU_CAPABILITY` (helpers in an anonymous namespace within, also those of a header, so
// that no instruction set links to the code of another). CMake finds the file by itself.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace nabla_fast::cpu {

using Tensor = at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;       // max_prob, lse, entropy, token, mask
using RecordedMixture = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // mixture, offset, top, max_prob, token
using HardEmbeddings = std::tuple<std::vector<Tensor>, Tensor>;

// Of dto_step; `gradient` is dense, or the three factors.
#define NABLA_FAST_DTO_STEP_ARGUMENTS                                                                     \
  (const Tensor& parameters, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step,         \
   const Tensor& tokens, const Tensor& learning_rates, at::TensorList gradient,                           \
   const std::optional<Tensor>& soft_noise, const std::optional<Tensor>& hard_noise,                      \
   const std::optional<Tensor>& group, const Tensor& weight, double scale, double softcap,                \
   const Tensor& embedding_table, const Tensor& reward_table, double nll_coeff, bool latents, double tau, \
   double weight_decay, int64_t max_steps)

// X(name, type of the result, arguments)
#define NABLA_FAST_CPU_OPERATORS(X)                                                                                    \
  X(token_diff, TwoTensors, (const Tensor& old_tokens, const Tensor& new_tokens))                                      \
  X(draw_token, Tensor,                                                                                                \
    (const Tensor& z, const Tensor& low, const Tensor& high, double temperature, std::optional<int64_t> top_k,         \
     std::optional<double> top_p))                                                                                     \
  X(relaxed_stats, Statistics,                                                                                         \
    (const Tensor& z, double tau, std::optional<double> entropy_threshold,                                             \
     std::optional<double> confidence_threshold))                                                                      \
  X(linear_relaxed_stats, Statistics,                                                                                  \
    (const Tensor& h, const Tensor& weight, double scale, double softcap, double tau,                                  \
     std::optional<double> entropy_threshold, std::optional<double> confidence_threshold))                             \
  X(log_likelihood_gradient, TwoTensors,                                                                               \
    (const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& tokens, bool need_grad))       \
  X(gradient_norm, Tensor,                                                                                             \
    (const Tensor& hidden, const Tensor& embedding, const Tensor& reward_embedding, const Tensor& weight,              \
     double scale, double softcap, const Tensor& embedding_table, const Tensor& reward_table, double nll_coeff))       \
  X(straight_through_embedding, HardEmbeddings, (const Tensor& z, at::TensorList tables, double tau))                  \
  X(linear_straight_through_embedding, HardEmbeddings,                                                                 \
    (const Tensor& h, const Tensor& weight, double scale, double softcap, at::TensorList tables, double tau))          \
  X(soft_embedding, Tensor, (const Tensor& z, const Tensor& table, double tau))                                        \
  X(linear_soft_embedding, Tensor,                                                                                     \
    (const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& table, double tau))            \
  X(soft_embedding_recorded, RecordedMixture, (const Tensor& z, const Tensor& table, double tau))                      \
  X(linear_soft_embedding_recorded, RecordedMixture,                                                                   \
    (const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& table, double tau))            \
  X(soft_embedding_backward, Tensor,                                                                                   \
    (const Tensor& z, const Tensor& vector, const Tensor& table, const Tensor& offset, const Tensor& top,              \
     const Tensor& max_prob, const Tensor& token, double tau))                                                         \
  X(linear_soft_embedding_backward, Tensor,                                                                            \
    (const Tensor& h, const Tensor& weight, double scale, double softcap, const Tensor& vector, const Tensor& table,   \
     const Tensor& offset, const Tensor& top, const Tensor& max_prob, const Tensor& token, double tau))                \
  X(relaxed_backward, Tensor, (const Tensor& z, at::TensorList vectors, at::TensorList tables, double tau))            \
  X(linear_relaxed_backward, Tensor,                                                                                   \
    (const Tensor& h, const Tensor& weight, double scale, double softcap, at::TensorList vectors,                      \
     at::TensorList tables, double tau))                                                                               \
  X(dto_step, TwoTensors, NABLA_FAST_DTO_STEP_ARGUMENTS)                                                               \
  X(linear, Tensor,                                                                                                    \
    (const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,                   \
     at::ScalarType dtype))                                                                                            \
  X(linear_backward, Tensor, (const Tensor& grad, const Tensor& weight))                                               \
  X(rms_norm, Tensor, (const Tensor& x, const OptionalTensor& weight, double epsilon, bool offset))                    \
  X(rms_norm_backward, Tensor,                                                                                         \
    (const Tensor& grad, const Tensor& x, const OptionalTensor& weight, double epsilon, bool offset))                  \
  X(rotary, TwoTensors, (const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin))                      \
  X(attention, Tensor, (const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale))  \
  X(attention_blocks, TwoTensors,                                                                                      \
    (const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale))                     \
  X(attention_blocks_backward, ThreeTensors,                                                                           \
    (const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,                \
     const Tensor& out, const Tensor& log_sums, double scale))                                                         \
  X(attention_inputs, ThreeTensors,                                                                                    \
    (const Tensor& x, const Tensor& query, const OptionalTensor& query_bias, const Tensor& key,                        \
     const OptionalTensor& key_bias, const Tensor& value, const OptionalTensor& value_bias,                            \
     const OptionalTensor& query_norm, const OptionalTensor& key_norm, const Tensor& cos, const Tensor& sin,           \
     double epsilon, bool offset))                                                                                     \
  X(gated_mlp, Tensor,                                                                                                 \
    (const Tensor& x, const Tensor& gate, const OptionalTensor& gate_bias, const Tensor& up,                           \
     const OptionalTensor& up_bias, const Tensor& down, const OptionalTensor& down_bias, std::string_view activation)) \
  X(decoder_layers, Tensor,                                                                                            \
    (const Tensor& x, at::TensorList weights, const OptionalTensors& scales, const OptionalTensors& biases,            \
     const OptionalTensors& norms, const Tensor& cos, const Tensor& sin, const OptionalTensor& mask,                   \
     at::TensorList keys, at::TensorList values, int64_t past, double scaling, double epsilon, bool offset,            \
     double head_epsilon, bool head_offset, std::string_view activation))

#define NABLA_FAST_DECLARE(name, result, arguments) result name arguments;

namespace DEFAULT {
NABLA_FAST_CPU_OPERATORS(NABLA_FAST_DECLARE)
}
#ifdef NABLA_FAST_X86
namespace AVX2 {
NABLA_FAST_CPU_OPERATORS(NABLA_FAST_DECLARE)
}
namespace AVX512 {
NABLA_FAST_CPU_OPERATORS(NABLA_FAST_DECLARE)
}
#endif

#undef NABLA_FAST_DECLARE

}  // namespace nabla_fast::cpu
