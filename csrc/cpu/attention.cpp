#include "../checks.h"
#include "half_precision.h"
#include "operators.h"
#include "registers.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// Attention of few queries, whose time is that of reading keys and values. A query's result is the same bits whatever
// columns are masked before, between and behind the ones it reads, and whatever other queries there are: its columns
// are gathered first, and everything is added up in their order.
namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

// Products below which waking up a second thread takes longer than it helps.
constexpr int64_t kGrain = 131072;
// Columns whose products with a query are added up together.
constexpr int kAtOnce = 4;
// Pairs of vectors of a value that are added up in registers.
constexpr int kPairs = 4;

// The columns that each query reads, one list for each row of the mask.
class Columns {
 public:
  Columns(const OptionalTensor& mask, int64_t width) {
    if (!mask.has_value()) {
      starts_ = {0, width};
      for (int64_t column = 0; column < width; ++column) columns_.push_back(column);
      return;
    }
    const Tensor flags = mask->contiguous();
    const bool* flag = flags.const_data_ptr<bool>();
    const int64_t rows = flags.size(0) * flags.size(1) * flags.size(2);
    starts_.push_back(0);
    for (int64_t row = 0; row < rows; ++row, flag += width) {
      for (int64_t column = 0; column < width; ++column) {
        if (flag[column]) columns_.push_back(column);
      }
      starts_.push_back(static_cast<int64_t>(columns_.size()));
    }
  }

  const int64_t* of(int64_t row) const { return columns_.data() + starts_[row]; }
  int64_t count(int64_t row) const { return starts_[row + 1] - starts_[row]; }

 private:
  std::vector<int64_t> columns_;
  std::vector<int64_t> starts_;
};

// One query and head. The keys and values of a column are `stride` numbers after those of the one before.
template <typename scalar_t>
struct Head {
  const scalar_t* keys;
  int64_t key_stride;
  const scalar_t* values;
  int64_t value_stride;

  // weights[i] = query . key of the i-th column.
  void scores(const float* query, int64_t size, const int64_t* columns, int64_t count, float* weights) const {
    int64_t i = 0;
    if (size % kPair == 0) {
      for (; i + kAtOnce <= count; i += kAtOnce) scores<kAtOnce, true>(query, size, columns + i, weights + i);
    }
    for (; i < count; ++i) scores<1, false>(query, size, columns + i, weights + i);
  }

  // `whole`: size is a multiple of kPair.
  template <int count, bool whole>
  void scores(const float* query, int64_t size, const int64_t* columns, float* weights) const {
    Vec sums[2 * count];
    unrolled<2 * count>([&](auto i) { sums[i] = Vec(0.0F); });
    for (int64_t d = 0; d < size; d += kPair) {
      const int64_t left = whole ? kPair : size - d;
      const Pair one = load_pair(query + d, left);
      unrolled<count>([&](auto c) {
        const Pair other = load_pair(keys + columns[c] * key_stride + d, left);
        sums[2 * c] = at::vec::fmadd(one[0], other[0], sums[2 * c]);
        sums[2 * c + 1] = at::vec::fmadd(one[1], other[1], sums[2 * c + 1]);
      });
    }
    float vectors[count * Vec::size()];
    unrolled<count>([&](auto c) { (sums[2 * c] + sums[2 * c + 1]).store(vectors + c * Vec::size()); });
    float totals[(count + 3) / 4 * 4];
    add_up<count>(vectors, totals);
    std::copy_n(totals, count, weights);
  }

  // out = sum of weights[i] * value of the i-th column, times `factor`.
  void mix(const float* weights, float factor, int64_t size, const int64_t* columns, int64_t count,
           scalar_t* out) const {
    for (int64_t d = 0; d < size; d += kPairs * kPair) {
      Pair sums[kPairs];
      for (auto& sum : sums) sum = {Vec(0.0F), Vec(0.0F)};
      for (int64_t i = 0; i < count; ++i) {
        const scalar_t* value = values + columns[i] * value_stride + d;
        const Vec weight(weights[i]);
        for (int p = 0; p < kPairs; ++p) {
          const int64_t left = size - d - p * kPair;
          if (left <= 0) break;
          const Pair entries = load_pair(value + p * kPair, left);
          for (int v = 0; v < 2; ++v) sums[p][v] = at::vec::fmadd(weight, entries[v], sums[p][v]);
        }
      }
      for (int p = 0; p < kPairs; ++p) {
        const int64_t left = size - d - p * kPair;
        if (left <= 0) break;
        for (auto& vector : sums[p]) vector = vector * Vec(factor);
        store_pair(sums[p], out + d + p * kPair, left);
      }
    }
  }
};

// weights = exp(weights - their maximum); returns their sum.
float exponentials(float* weights, int64_t count) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, weights[i]);  // drops a NaN, which stays in the sum
  Vec sum(0.0F);
  for (int64_t i = 0; i < count; i += Vec::size()) {
    const int64_t left = std::min<int64_t>(count - i, Vec::size());
    const Vec power = (Vec::loadu(weights + i, left) - Vec(largest)).exp();
    power.store(weights + i, left);
    sum = sum + (left == Vec::size() ? power : Vec::set(Vec(0.0F), power, left));
  }
  return at::vec::vec_reduce_all<float>([](const Vec& one, const Vec& other) { return one + other; }, sum);
}

template <typename scalar_t>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale,
            const Tensor& out) {
  const int64_t heads = q.size(1);
  const int64_t queries = q.size(2);
  const int64_t size = q.size(3);
  const int64_t width = k.size(2);
  const int64_t sharing = heads / k.size(1);  // query heads that share keys
  const Columns columns(mask, width);
  // Of the mask's rows: 0 where one serves all.
  const int64_t mask_batch = mask.has_value() && mask->size(0) > 1 ? mask->size(1) * mask->size(2) : 0;
  const int64_t mask_head = mask.has_value() && mask->size(1) > 1 ? mask->size(2) : 0;
  const int64_t mask_query = mask.has_value() && mask->size(2) > 1 ? 1 : 0;
  const int64_t work = std::max<int64_t>(1, width * (size + v.size(3)));
  at::parallel_for(
      0, q.size(0) * heads * queries, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
        std::vector<float> weights(width + Vec::size());
        std::vector<float> query(size);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t s = row % queries;
          const int64_t h = row / queries % heads;
          const int64_t b = row / queries / heads;
          const scalar_t* from = q.const_data_ptr<scalar_t>() + b * q.stride(0) + h * q.stride(1) + s * q.stride(2);
          for (int64_t d = 0; d < size; ++d) query[d] = static_cast<float>(from[d]) * static_cast<float>(scale);
          const int64_t group = h / sharing;
          const Head<scalar_t> head{k.const_data_ptr<scalar_t>() + b * k.stride(0) + group * k.stride(1), k.stride(2),
                                    v.const_data_ptr<scalar_t>() + b * v.stride(0) + group * v.stride(1), v.stride(2)};
          const int64_t own = b * mask_batch + h * mask_head + s * mask_query;
          const int64_t* read = columns.of(own);
          const int64_t count = columns.count(own);
          head.scores(query.data(), size, read, count, weights.data());
          const float sum = exponentials(weights.data(), count);
          head.mix(weights.data(), count > 0 ? 1 / sum : 0.0F, v.size(3), read, count,
                   out.mutable_data_ptr<scalar_t>() + ((b * queries + s) * heads + h) * v.size(3));
        }
      });
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale) {
  const Check check("attention");
  check.floats(q, "q", {"B", "heads", "S", "D"});
  check.floats(k, "k", {q.size(0), "key heads", "T", q.size(3)});
  check.floats(v, "v", {q.size(0), k.size(1), k.size(2), "E"});
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "attention: q must have a multiple of the ", k.size(1),
                    " heads of k, got ", q.size(1));
  for (const Tensor* other : {&k, &v}) {
    TORCH_CHECK_TYPE(other->scalar_type() == q.scalar_type(), "attention: q, k and v must have one dtype, got ",
                     dtype_name(q), " and ", dtype_name(*other));
  }
  if (mask.has_value()) {
    check.memory(*mask, "mask");
    const bool fits = mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == q.size(0)) &&
                      (mask->size(1) == 1 || mask->size(1) == q.size(1)) &&
                      (mask->size(2) == 1 || mask->size(2) == q.size(2)) && mask->size(3) == k.size(2);
    TORCH_CHECK_VALUE(fits && mask->scalar_type() == at::kBool, "attention: mask must be bool (", q.size(0), " or 1, ",
                      q.size(1), " or 1, ", q.size(2), " or 1, ", k.size(2), "), got ", dtype_name(*mask), " ",
                      mask->sizes());
  }
  const auto lined = [](const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const Tensor keys = lined(k);
  const Tensor values = lined(v);
  const Tensor queries = lined(q);
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options());
  for_dtype("attention", "q", q,
            [&](auto number) { attend<decltype(number)>(queries, keys, values, mask, scale, out); });
  return out;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
