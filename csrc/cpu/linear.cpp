#include "../checks.h"
#include "bfloat16_matmul.h"
#include "half_precision.h"
#include "linear_blocks.h"
#include "operators.h"
#include "registers.h"
#include "token_modules.h"
#include "weight_entries.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

// Products of few rows. Their time is that of reading the weight, so it is read once, as it lies, by all threads; every
// row of x takes what it needs of a part of it while that is in registers.
namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Rows of x that take part in one reading of the weight's registers. Further ones read the cache.
constexpr int kGroup = 8;
// Sums in registers, of 32 or 16.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kSums = 24;
#else
constexpr int kSums = 10;
#endif
// Bytes of rows of x that stay in the first-level cache beside the weight, when each entry reads all of them again.
constexpr int64_t kNearBytes = 12288;
// Bytes of a weight's row up to which several rows that are read together lie in one page, where the hardware's own
// prefetching takes them for one stream that jumps.
constexpr int64_t kShortBytes = 2560;
// Rows of the weight that several groups of rows of x read in turn, the later ones from a cache: a multiple of 3 and 4,
// as many as are read together.
constexpr int64_t kTile = 12;
// Entries of a weight below which waking up a second thread takes longer than it helps.
constexpr int64_t kGrain = 32768;
// Of a row, so that no instruction set has a rest: the entries that 64 bytes hold in the narrower dtypes.
constexpr int64_t kUnit = 32;

// Whether it is a processor of Intel's. Others fetch from memory by themselves what is read in order, and multiply
// pairs of bfloat16 numbers as fast as float32 numbers; Intel's take as long for a pair as for four float32 numbers.
bool is_intel() {
#if defined(__x86_64__)
  static const bool is = __builtin_cpu_is("intel");
  return is;
#else
  return false;
#endif
}

// sum += the products of 32 bfloat16 numbers, two of them in each of its entries; where `has_bfloat16_matmul`.
inline void add_pairs([[maybe_unused]] Vec& sum, [[maybe_unused]] const Bits& one, [[maybe_unused]] const Bits& other) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 total = sum;
  add_products<at::BFloat16>(total, one, other);
  sum = total;
#endif
}

// Where a product is written: numbers of the weight's dtype, or float32, of which the other is null.
template <typename scalar_t>
struct Place {
  scalar_t* own = nullptr;
  float* wide = nullptr;

  explicit Place(scalar_t* to) : own(to) {}
  explicit Place(float* to) : wide(to) {}
  void write(int64_t at, float number) const {
    if (wide != nullptr) {
      wide[at] = number;
    } else {
      own[at] = static_cast<scalar_t>(number);
    }
  }
};
template <>
struct Place<float> {
  float* wide;

  explicit Place(float* to) : wide(to) {}
  void write(int64_t at, float number) const { wide[at] = number; }
};

// Makes a register of it. For three products the compiler would read memory three times, which takes longer than they
// do; for four it does not.
inline void keep([[maybe_unused]] Vec& numbers) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 kept = numbers;
  asm("" : "+v"(kept));
  numbers = kept;
#endif
}

// x_t is float, or bfloat16 as the weight is: then `has_bfloat16_matmul`.
template <typename scalar_t, typename x_t>
struct Product {
  const x_t* x;  // (M, K)
  const scalar_t* weight;
  int64_t weight_stride;
  int64_t size;         // K
  const float* scale;   // (N,), or null
  const float* bias;    // (N,), or null
  Place<scalar_t> out;  // (M, N)
  int64_t columns;      // N

  // Rows [row, row + count) of x, at most kGroup, times entries [begin, end) of the weight, which lies in memory, or in
  // a cache.
  void range(int64_t row, int64_t count, int64_t begin, int64_t end, bool from_memory) const {
    unrolled<kGroup>([&](auto before) {
      if (count == before + 1) range<before + 1>(row, begin, end, from_memory);
    });
  }

 private:
  using E = Entries<scalar_t>;
  static constexpr bool kPairs = std::is_same_v<x_t, at::BFloat16>;

  // What is fetched from memory ahead of time: the rows of the weight that come next, each where it will be read, or,
  // as much, in the order of memory. In bytes, between vectors of a row and between rows.
  struct Ahead {
    uintptr_t along;
    uintptr_t across;
  };

  template <int rows>
  void range(int64_t row, int64_t begin, int64_t end, bool from_memory) const {
    constexpr int kAtOnce = std::min(4, kSums / rows);
    // One row of the weight after the other is what memory is fastest at, but reads all of x for each; and of 8-bit
    // integers, memory gives more than one sum can take.
    if constexpr (rows <= 3 && !std::is_same_v<scalar_t, int8_t>) {
      if (!is_intel() && rows * size * int64_t(sizeof(x_t)) <= kNearBytes) {
        return blocks<rows, 1, false>(row, begin, end);
      }
    }
    if (from_memory) {
      blocks<rows, kAtOnce, true>(row, begin, end);
    } else {
      blocks<rows, kAtOnce, false>(row, begin, end);
    }
  }

  template <int rows, int entries, bool fetches>
  void blocks(int64_t row, int64_t begin, int64_t end) const {
    constexpr uintptr_t kVector = E::kCount * sizeof(scalar_t);
    const bool in_order = size * int64_t(sizeof(scalar_t)) <= kShortBytes;
    const Ahead ahead = in_order ? Ahead{entries * kVector, kVector} : Ahead{kVector, weight_stride * sizeof(scalar_t)};
    int64_t n = begin;
    for (; n + entries <= end; n += entries) block<rows, entries, fetches>(row, n, ahead);
    for (; n < end; ++n) block<rows, 1, false>(row, n, ahead);
  }

  template <int rows, int entries, bool fetches>
  void block(int64_t row, int64_t n, const Ahead& ahead) const {
    const x_t* a = x + row * size;
    const scalar_t* w = weight + n * weight_stride;
    // As a number: a pointer behind a buffer has no meaning.
    uintptr_t next = reinterpret_cast<uintptr_t>(w) + entries * weight_stride * sizeof(scalar_t);
    const auto fetch = [&](int entry) {
      if constexpr (fetches) __builtin_prefetch(reinterpret_cast<const void*>(next + entry * ahead.across));
    };
    Vec sums[rows * entries];
    unrolled<rows * entries>([&](auto i) { sums[i] = Vec(0.0F); });
    if constexpr (kPairs) {
      for (int64_t k = 0; k < size; k += E::kCount, next += ahead.along) {
        Bits values[entries];
        unrolled<entries>([&](auto i) {
          fetch(i);
          values[i] = Bits::loadu(w + i * weight_stride + k);
        });
        unrolled<rows>([&](auto r) {
          const Bits factor = Bits::loadu(a + r * size + k);
          unrolled<entries>([&](auto i) { add_pairs(sums[r * entries + i], factor, values[i]); });
        });
      }
    } else {
      for (int64_t k = 0; k < size; k += E::kCount, next += ahead.along) {
        Vec values[entries * E::kVectors];
        unrolled<entries>([&](auto i) {
          fetch(i);
          E::load(w + i * weight_stride + k, values + i * E::kVectors);
        });
        unrolled<E::kVectors>([&](auto v) {
          unrolled<rows>([&](auto r) {
            Vec factor = Vec::loadu(a + r * size + k + v * Vec::size());
            if constexpr (entries == 3) keep(factor);
            unrolled<entries>([&](auto i) {
              sums[r * entries + i] = at::vec::fmadd(factor, values[i * E::kVectors + v], sums[r * entries + i]);
            });
          });
        });
      }
    }
    // Until here they are registers, which they are only as long as nothing takes their address.
    float vectors[rows * entries * Vec::size()];
    unrolled<rows * entries>([&](auto i) { sums[i].store(vectors + i * Vec::size()); });
    float totals[(rows * entries + 3) / 4 * 4];
    add_up<rows * entries>(vectors, totals);
    unrolled<rows * entries>([&](auto i) {
      float sum = totals[i];
      const int64_t column = n + i % entries;
      if constexpr (std::is_same_v<scalar_t, int8_t>) sum *= scale[column];
      out.write((row + i / entries) * columns + column, bias == nullptr ? sum : sum + bias[column]);
    });
  }
};

// Rows x (M, K) float32, or bfloat16 as the weights are, with each of the layers.
template <typename scalar_t, typename out_t, typename x_t>
void multiply(const x_t* x, int64_t count, int64_t size, c10::ArrayRef<LinearLayer> layers,
              c10::ArrayRef<out_t*> outs) {
  std::vector<Product<scalar_t, x_t>> products;
  products.reserve(layers.size());
  int64_t total = 0;
  const auto numbers = [](const OptionalTensor& own) { return own ? own->const_data_ptr<float>() : nullptr; };
  for (size_t i = 0; i < layers.size(); ++i) {
    const Tensor& weight = layers[i].weight;
    products.push_back({x, weight.const_data_ptr<scalar_t>(), weight.stride(0), size, numbers(layers[i].scale),
                        numbers(layers[i].bias), Place<scalar_t>(outs[i]), weight.size(0)});
    total += weight.size(0);
  }
  const int64_t groups = (count + kGroup - 1) / kGroup;
  const int64_t tile = groups == 1 ? total : kTile;
  at::parallel_for(0, total, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // of all weights' rows, that of this weight
    for (const auto& product : products) {
      const int64_t last = std::min(end - first, product.columns);
      for (int64_t n = std::max<int64_t>(begin - first, 0); n < last; n += tile) {
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t row = count * group / groups;
          product.range(row, count * (group + 1) / groups - row, n, std::min(last, n + tile), group == 0);
        }
      }
      first += product.columns;
    }
  });
}

// With weights of the dtype of x.
template <typename scalar_t, typename out_t>
void multiply_alike(const scalar_t* x, int64_t count, int64_t size, c10::ArrayRef<LinearLayer> layers,
                    c10::ArrayRef<out_t*> outs) {
  if constexpr (std::is_same_v<scalar_t, float>) return multiply<float, out_t>(x, count, size, layers, outs);
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (has_bfloat16_matmul() && !is_intel()) return multiply<scalar_t, out_t>(x, count, size, layers, outs);
  }
  if constexpr (!std::is_same_v<scalar_t, float>) {
    multiply<scalar_t, out_t>(converted(x, count * size).data(), count, size, layers, outs);
  }
}

template <typename out_t>
std::vector<out_t*> places(const std::vector<Tensor>& outs) {
  std::vector<out_t*> found;
  for (const Tensor& out : outs) found.push_back(out.mutable_data_ptr<out_t>());
  return found;
}

}  // namespace

LinearLayer checked_layer(const Check& check, int64_t size, at::ScalarType kind, const LinearLayer& layer,
                          at::ScalarType dtype) {
  const Tensor& weight = layer.weight;
  const bool int8 = weight.scalar_type() == at::kChar;
  if (int8) {
    check.memory(weight, "weight");
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == size, check.name(), ": weight must have the shape (N, ",
                      size, "), got (", weight.sizes(), ")");
  } else {
    check.floats(weight, "weight", {"N", size});
  }
  TORCH_CHECK_VALUE(int8 == layer.scale.has_value(), check.name(),
                    ": scale must be given with a weight of int8, and with no other");
  if (layer.scale.has_value()) check.floats(*layer.scale, "scale", {weight.size(0)});
  if (layer.bias.has_value()) check.floats(*layer.bias, "bias", {weight.size(0)});
  TORCH_CHECK_TYPE(
      kind != at::kDouble && (int8 || kind == weight.scalar_type()) && (dtype == kind || dtype == at::kFloat),
      check.name(), ": x must be float32, bfloat16 or float16, weight the same or int8, and dtype that of x or ",
      "float32, got ", dtype_name(kind), ", ", dtype_name(weight), " and ", dtype_name(dtype));
  TORCH_CHECK_VALUE(size > 0 && size % kUnit == 0 && weight.stride(1) == 1, check.name(),
                    ": a row of weight must be a multiple of ", kUnit, " entries without gaps, got ", size,
                    " with a stride of ", weight.stride(1));
  const auto in_float = [](const OptionalTensor& numbers) {
    return numbers.has_value() ? OptionalTensor(numbers->to(at::kFloat).contiguous()) : std::nullopt;
  };
  return {weight, in_float(layer.scale), in_float(layer.bias)};
}

template <typename scalar_t>
void multiply_rows(const scalar_t* x, int64_t count, int64_t size, c10::ArrayRef<LinearLayer> layers,
                   c10::ArrayRef<scalar_t*> outs) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (layers[0].weight.scalar_type() == at::kChar) return multiply<int8_t>(x, count, size, layers, outs);
  }
  multiply_alike<scalar_t, scalar_t>(x, count, size, layers, outs);
}

template void multiply_rows(const float*, int64_t, int64_t, c10::ArrayRef<LinearLayer>, c10::ArrayRef<float*>);
template void multiply_rows(const at::BFloat16*, int64_t, int64_t, c10::ArrayRef<LinearLayer>,
                            c10::ArrayRef<at::BFloat16*>);
template void multiply_rows(const at::Half*, int64_t, int64_t, c10::ArrayRef<LinearLayer>, c10::ArrayRef<at::Half*>);

std::vector<Tensor> linear_layers(const Check& check, const Tensor& input, c10::ArrayRef<LinearLayer> layers,
                                  at::ScalarType dtype) {
  check.memory(input, "x");
  TORCH_CHECK_VALUE(input.dim() >= 1, check.name(), ": x must have the shape (..., K), got a number");
  // Here and not in Python, where shapes of a small product take longer than the product.
  const Tensor x =
      input.dim() == 2 ? input : input.reshape({input.numel() / std::max<int64_t>(1, input.size(-1)), input.size(-1)});
  check.floats(x, "x", {"M", "K"});
  const at::ScalarType own = layers[0].weight.scalar_type();
  std::vector<LinearLayer> ready;
  std::vector<Tensor> outs;
  std::vector<int64_t> shape = input.sizes().vec();
  for (const LinearLayer& layer : layers) {
    TORCH_CHECK_TYPE(layer.weight.scalar_type() == own, check.name(), ": weights must have one dtype, got ",
                     dtype_name(layers[0].weight), " and ", dtype_name(layer.weight));
    ready.push_back(checked_layer(check, x.size(1), x.scalar_type(), layer, dtype));
    shape.back() = layer.weight.size(0);
    outs.push_back(at::empty(shape, x.options().dtype(own == at::kChar ? at::kFloat : dtype)));
  }
  if (own != at::kChar && x.size(0) > kFewRows && multiplies_blocks(own, x.size(1))) {
    for (size_t i = 0; i < outs.size(); ++i) {
      linear_blocks(x.contiguous(), ready[i].weight, ready[i].bias.value_or(Tensor()),
                    outs[i].view({x.size(0), ready[i].weight.size(0)}));
    }
    return outs;
  }
  // float32 where the weight is of int8
  const Tensor rows = (own == at::kChar ? x.to(at::kFloat) : x).contiguous();
  for_dtype(check.name(), "x", rows, [&](auto number) {
    using scalar_t = decltype(number);
    const auto* from = rows.const_data_ptr<scalar_t>();
    const bool wide = outs[0].scalar_type() == at::kFloat;
    if constexpr (std::is_same_v<scalar_t, float>) {
      multiply_rows<float>(from, x.size(0), x.size(1), ready, places<float>(outs));
    } else if (wide) {
      multiply_alike<scalar_t, float>(from, x.size(0), x.size(1), ready, places<float>(outs));
    } else {
      multiply_alike<scalar_t, scalar_t>(from, x.size(0), x.size(1), ready, places<scalar_t>(outs));
    }
  });
  for (Tensor& out : outs) out = out.to(dtype);
  return outs;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
              at::ScalarType dtype) {
  return linear_layers(Check("linear"), x, LinearLayer{weight, scale, bias}, dtype)[0];
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
