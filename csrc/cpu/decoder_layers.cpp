#include "../checks.h"
#include "attention.h"
#include "half_precision.h"
#include "operators.h"
#include "token_modules.h"
#include "token_rows.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

// All layers of a model in one go: between two of them there is nothing that could wait for the interpreter, or ask for
// memory.
namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Of the linear layers of a layer, in the order in which they are given.
enum Linear : int64_t { kQuery, kKey, kValue, kOut, kGate, kUp, kDown, kLinears };
// Of the norms; those of heads may be missing.
enum Norm : int64_t { kBeforeAttention, kBeforeMLP, kQueryNorm, kKeyNorm, kNorms };

struct Layer {
  std::vector<LinearLayer> attention;  // query, key, value
  LinearLayer out;
  std::vector<LinearLayer> gates;  // gate, up
  LinearLayer down;
  std::vector<OptionalTensor> norms;
  Tensor keys;  // (B, key heads, columns, D)
  Tensor values;
};

struct Settings {
  double scaling;
  float epsilon;
  float offset;
  float head_epsilon;
  float head_offset;
  std::string_view activation;
};

template <typename scalar_t>
class Decoder {
 public:
  // x (B, S, d), which becomes the output; cos and sin (B or 1, S, D).
  Decoder(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t past, const Settings& settings)
      : x_(x.mutable_data_ptr<scalar_t>()),
        cos_(cos.const_data_ptr<scalar_t>()),
        sin_(sin.const_data_ptr<scalar_t>()),
        batch_(x.size(0)),
        tokens_(x.size(1)),
        width_(x.size(2)),
        size_(cos.size(2)),
        angles_(cos.size(0) == 1 ? 0 : tokens_ * size_),
        past_(past),
        settings_(settings) {}

  void run(const Layer& layer, const Columns& columns) {
    const int64_t rows = batch_ * tokens_;
    const int64_t heads = layer.attention[kQuery].weight.size(0) / size_;
    const int64_t key_heads = layer.attention[kKey].weight.size(0) / size_;
    const int64_t inner = layer.gates[0].weight.size(0);
    scalar_t* normed = place(normed_, rows * width_);
    scalar_t* queries = place(queries_, rows * heads * size_);
    scalar_t* keys = place(keys_, rows * key_heads * size_);
    scalar_t* values = place(values_, rows * key_heads * size_);
    norm(x_, rows, width_, layer.norms[kBeforeAttention], settings_.epsilon, settings_.offset, normed);
    multiply_rows<scalar_t>(normed, rows, width_, layer.attention, {queries, keys, values});
    for (const auto& [part, count, which] : {std::tuple(queries, heads, kQueryNorm), {keys, key_heads, kKeyNorm}}) {
      if (layer.norms[which].has_value()) {
        norm(part, rows * count, size_, layer.norms[which], settings_.head_epsilon, settings_.head_offset, part);
      }
      for (int64_t i = 0; i < rows * count; ++i) {
        const int64_t row = i / count;
        const int64_t angle = row / tokens_ * angles_ + row % tokens_ * size_;
        turn(part + i * size_, cos_ + angle, sin_ + angle, size_ / 2, part + i * size_);
      }
    }
    append(keys, key_heads, layer.keys);
    append(values, key_heads, layer.values);
    scalar_t* mixed = place(mixed_, rows * heads * size_);
    const int64_t strides[] = {tokens_ * heads * size_, size_, heads * size_};
    Attention<scalar_t>{queries,
                        strides,
                        layer.keys.const_data_ptr<scalar_t>(),
                        layer.keys.strides(),
                        layer.values.const_data_ptr<scalar_t>(),
                        layer.values.strides(),
                        batch_,
                        heads,
                        key_heads,
                        tokens_,
                        size_,
                        size_,
                        static_cast<float>(settings_.scaling)}
        .run(columns, mixed);
    multiply_rows<scalar_t>(mixed, rows, heads * size_, layer.out, normed);
    add(x_, normed, rows * width_);
    norm(x_, rows, width_, layer.norms[kBeforeMLP], settings_.epsilon, settings_.offset, normed);
    scalar_t* gates = place(gates_, rows * inner);
    scalar_t* factors = place(factors_, rows * inner);
    multiply_rows<scalar_t>(normed, rows, width_, layer.gates, {gates, factors});
    gated(gates, factors, rows * inner, gates, settings_.activation);
    multiply_rows<scalar_t>(gates, rows, inner, layer.down, normed);
    add(x_, normed, rows * width_);
  }

 private:
  static scalar_t* place(std::vector<scalar_t>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
  }

  static void norm(const scalar_t* x, int64_t rows, int64_t size, const OptionalTensor& weight, float epsilon,
                   float offset, scalar_t* out) {
    const scalar_t* scale = weight.has_value() ? weight->const_data_ptr<scalar_t>() : nullptr;
    for (int64_t i = 0; i < rows * size; i += size) normalise(x + i, scale, size, epsilon, offset, out + i);
  }

  // Rows (B, S, heads, D) to columns [past, past + S) of a buffer.
  void append(const scalar_t* rows, int64_t heads, const Tensor& buffer) const {
    auto* to = buffer.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < batch_ * tokens_ * heads; ++i) {
      const int64_t row = i / heads;
      std::copy_n(rows + i * size_, size_,
                  to + row / tokens_ * buffer.stride(0) + i % heads * buffer.stride(1) +
                      (past_ + row % tokens_) * buffer.stride(2));
    }
  }

  scalar_t* x_;
  const scalar_t* cos_;
  const scalar_t* sin_;
  int64_t batch_;
  int64_t tokens_;  // S
  int64_t width_;   // d
  int64_t size_;    // D
  int64_t angles_;  // of a sequence
  int64_t past_;
  Settings settings_;
  std::vector<scalar_t> normed_, queries_, keys_, values_, mixed_, gates_, factors_;
};

// A buffer of keys or values with room for all columns.
void check_buffer(const Check& check, const Tensor& buffer, const char* name, const Tensor& x, int64_t heads,
                  int64_t size, int64_t width) {
  check.floats(buffer, name, {x.size(0), heads, "columns", size});
  TORCH_CHECK_VALUE(width <= buffer.size(2) && buffer.stride(3) == 1, "decoder_layers: ", name, " must have room for ",
                    width, " columns, without gaps in a head, got ", buffer.size(2), " with strides ",
                    buffer.strides());
  TORCH_CHECK_TYPE(buffer.scalar_type() == x.scalar_type(), "decoder_layers: ", name, " must have the dtype of x, ",
                   dtype_name(x), ", got ", dtype_name(buffer));
}

// One layer, checked.
Layer layer_of(const Check& check, const Tensor& x, int64_t size, at::TensorList weights, const OptionalTensors& scales,
               const OptionalTensors& biases, const OptionalTensors& norms, int64_t i, const Tensor& keys,
               const Tensor& values, int64_t width) {
  const auto linear = [&](Linear which, int64_t inputs, int64_t outputs) {
    const int64_t at = i * kLinears + which;
    const LinearLayer given{weights[at], scales.get(at), biases.get(at)};
    check.memory(given.weight, "weights", at);
    TORCH_CHECK_VALUE(
        given.weight.dim() == 2 && given.weight.size(1) == inputs && (outputs < 0 || given.weight.size(0) == outputs),
        "decoder_layers: weights[", at, "] must have the shape (", outputs < 0 ? "N" : std::to_string(outputs), ", ",
        inputs, "), got ", given.weight.sizes());
    TORCH_CHECK_TYPE(given.weight.scalar_type() == weights[0].scalar_type() &&
                         (given.weight.scalar_type() != at::kChar || x.scalar_type() == at::kFloat),
                     "decoder_layers: weights must have the dtype of x, or with x of float32 all of them int8, got ",
                     dtype_name(given.weight));
    return checked_layer(check, inputs, x.scalar_type(), given, x.scalar_type());
  };
  const int64_t d = x.size(2);
  const int64_t query_rows = weights[i * kLinears + kQuery].size(0);
  const int64_t key_rows = weights[i * kLinears + kKey].size(0);
  const int64_t inner = weights[i * kLinears + kGate].size(0);
  TORCH_CHECK_VALUE(size > 0 && size % 2 == 0 && query_rows % size == 0 && key_rows % size == 0 && key_rows > 0 &&
                        query_rows % key_rows == 0,
                    "decoder_layers: weights of queries and keys must have heads of the ", size,
                    " features of cos, an even number, as rows, those of queries a multiple of those of keys, got ",
                    query_rows, " and ", key_rows);
  Layer layer{{linear(kQuery, d, -1), linear(kKey, d, -1), linear(kValue, d, key_rows)},
              linear(kOut, query_rows, d),
              {linear(kGate, d, -1), linear(kUp, d, inner)},
              linear(kDown, inner, d),
              {},
              keys,
              values};
  for (int64_t n = 0; n < kNorms; ++n) {
    OptionalTensor norm = norms.get(i * kNorms + n);
    if (norm.has_value()) {
      check.floats(*norm, "norms", {n < kQueryNorm ? d : size}, i * kNorms + n);
      TORCH_CHECK_TYPE(norm->scalar_type() == x.scalar_type(), "decoder_layers: norms must have the dtype of x, ",
                       dtype_name(x), ", got ", dtype_name(*norm));
      norm = norm->contiguous();
    }
    layer.norms.push_back(norm);
  }
  check_buffer(check, keys, "keys", x, key_rows / size, size, width);
  check_buffer(check, values, "values", x, key_rows / size, size, width);
  return layer;
}

}  // namespace

Tensor decoder_layers(const Tensor& x, at::TensorList weights, const OptionalTensors& scales,
                      const OptionalTensors& biases, const OptionalTensors& norms, const Tensor& cos, const Tensor& sin,
                      const OptionalTensor& mask, at::TensorList keys, at::TensorList values, int64_t past,
                      double scaling, double epsilon, bool offset, double head_epsilon, bool head_offset,
                      std::string_view activation) {
  const Check check("decoder_layers");
  check.floats(x, "x", {"B", "S", "d"});
  check.floats(cos, "cos", {cos.dim() > 0 && cos.size(0) == 1 ? 1 : x.size(0), x.size(1), "D"});
  check.floats(sin, "sin", {cos.size(0), x.size(1), cos.size(2)});
  for (const Tensor* other : {&cos, &sin}) {
    TORCH_CHECK_TYPE(other->scalar_type() == x.scalar_type(), "decoder_layers: cos and sin must have the dtype of x, ",
                     dtype_name(x), ", got ", dtype_name(*other));
  }
  const auto count = static_cast<int64_t>(keys.size());
  const auto number = [](const auto& list) { return static_cast<int64_t>(list.size()); };
  TORCH_CHECK_VALUE(number(values) == count && number(weights) == count * kLinears &&
                        number(scales) == count * kLinears && number(biases) == count * kLinears &&
                        number(norms) == count * kNorms,
                    "decoder_layers: for each of ", count, " keys there must be values, 7 weights, scales and biases, ",
                    "and 4 norms, got ", number(values), ", ", number(weights), ", ", number(scales), ", ",
                    number(biases), " and ", number(norms));
  TORCH_CHECK_VALUE(past >= 0 && x.size(0) * x.size(1) <= kFewRows, "decoder_layers: there must be at most ", kFewRows,
                    " tokens behind 0 or more, got ", x.size(0) * x.size(1), " behind ", past);
  TORCH_CHECK_VALUE(is_activation(activation), "decoder_layers: activation must be silu, gelu or gelu_tanh, got ",
                    activation);
  const int64_t width = past + x.size(1);
  if (mask.has_value()) {
    check.memory(*mask, "mask");
    const bool fits = mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == x.size(0)) && mask->size(1) == 1 &&
                      (mask->size(2) == 1 || mask->size(2) == x.size(1)) && mask->size(3) == width;
    TORCH_CHECK_VALUE(fits && mask->scalar_type() == at::kBool, "decoder_layers: mask must be bool (", x.size(0),
                      " or 1, 1, ", x.size(1), " or 1, ", width, "), got ", dtype_name(*mask), " ", mask->sizes());
  }
  Tensor out = at::empty(x.sizes(), x.options());
  out.copy_(x);
  const Settings settings{scaling,
                          static_cast<float>(epsilon),
                          offset ? 1.0F : 0.0F,
                          static_cast<float>(head_epsilon),
                          head_offset ? 1.0F : 0.0F,
                          activation};
  const Columns columns(mask, width);
  for_dtype("decoder_layers", "x", x, [&](auto entry) {
    const Tensor cosines = cos.contiguous();
    const Tensor sines = sin.contiguous();
    Decoder<decltype(entry)> decoder(out, cosines, sines, past, settings);
    for (int64_t i = 0; i < count; ++i) {
      decoder.run(layer_of(check, out, cos.size(2), weights, scales, biases, norms, i, keys[i], values[i], width),
                  columns);
    }
  });
  return out;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
