#include "../checks.h"
#include "attention_arguments.h"
#include "attention_block.h"
#include "half_precision.h"
#include "operators.h"
#include "strided_matmul.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

// Attention of many queries and its derivative, a block of queries of one head at a time. Scores of a block lie column
// by column, with the queries in the lanes of vectors: maxima and sums need no exchange between lanes, and every
// product reads one of its operands as it lies. All sums are of float32.
namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Columns that the derivative works on at a time: their scores, and those scores' derivatives, stay in the second-level
// cache.
constexpr int64_t kChunk = 256;
// Pieces of work below which the heads that share keys become pieces of their own. No matter how many threads there
// are: so sums are the same in every number of them.
constexpr int64_t kPieces = 16;

// Rows (count, size), each number times the row's factor, to rows `stride` apart.
template <typename scalar_t, typename Factor>
void write_rows(const std::vector<float>& rows, int64_t count, int64_t size, const Factor& factor, scalar_t* to,
                int64_t stride) {
  for (int64_t row = 0; row < count; ++row) {
    const Numbers own(factor(row));
    for (int64_t d = 0; d < size; d += kPair) {
      Pair pair = load_pair<float>(rows.data() + row * size + d, size - d);
      for (auto& vector : pair) vector = vector * own;
      store_pair(pair, to + row * stride + d, size - d);
    }
  }
}

// A block of queries of one head.
struct Queries {
  int64_t sequence;
  int64_t head;
  int64_t first;
  int64_t count;
  int64_t width;  // in whole vectors

  Queries(int64_t sequence, int64_t head, int64_t block, int64_t all)
      : sequence(sequence),
        head(head),
        first(block * kBlock),
        count(std::min(kBlock, all - first)),
        width(ceil_divide(count, kUnit) * kUnit) {}
};

template <typename scalar_t>
struct Operands {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Additions& additions;
  float scale;

  int64_t batch = q.size(0);
  int64_t heads = q.size(1);
  int64_t queries = q.size(2);
  int64_t size = q.size(3);
  int64_t key_heads = k.size(1);
  int64_t columns = k.size(2);
  int64_t value_size = v.size(3);

  WideRows<scalar_t> rows_of(const Tensor& x, int64_t sequence, int64_t head) const {
    return {x.const_data_ptr<scalar_t>() + sequence * x.stride(0) + head * x.stride(1), x.stride(2), x.size(2),
            x.size(3)};
  }

  void load(Block& block, const Tensor& x, const Queries& own, float factor) const {
    block.load(
        x.const_data_ptr<scalar_t>() + own.sequence * x.stride(0) + own.head * x.stride(1) + own.first * x.stride(2),
        x.stride(2), own.count, factor);
  }

  // In (B, S, heads, size).
  int64_t place(const Queries& own, int64_t own_size) const {
    return ((own.sequence * queries + own.first) * heads + own.head) * own_size;
  }

  // out (B, S, heads, E), log_sums (B, heads, S)
  void forward(const Tensor& out, const Tensor& log_sums) const {
    const int64_t blocks = additions.blocks();
    at::parallel_for(0, batch * heads * blocks, 1, [&](int64_t begin, int64_t end) {
      Block query(size);
      std::vector<float> scores(columns * kBlock);
      std::vector<float> mixed(kBlock * value_size);
      float largest[kBlock];
      float sums[kBlock];
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t block = piece % blocks;
        const Queries own(piece / blocks / heads, piece / blocks % heads, block, queries);
        const int64_t key_head = own.head / (heads / key_heads);
        const auto keys = rows_of(k, own.sequence, key_head);
        const auto values = rows_of(v, own.sequence, key_head);
        const auto [first, last] = additions.range(own.sequence, own.head, block);
        const float* added = additions.of(own.sequence, own.head, block, first);
        load(query, q, own, scale);
        multiply(last - first, own.width, size, keys.left(first), query.turned(), {scores.data(), kBlock}, false);
        exponentials(scores.data(), added, additions.least(own.sequence, own.head, block), last - first, own.width,
                     largest, sums);
        multiply(own.count, value_size, last - first, {scores.data(), 1, kBlock}, values.rows(first),
                 {mixed.data(), value_size}, false);
        const auto inverse = [&](int64_t i) { return sums[i] == 0 ? 0.0F : 1 / sums[i]; };
        write_rows(mixed, own.count, value_size, inverse, out.mutable_data_ptr<scalar_t>() + place(own, value_size),
                   heads * value_size);
        float* logs = log_sums.mutable_data_ptr<float>() + (own.sequence * heads + own.head) * queries + own.first;
        for (int64_t i = 0; i < own.count; ++i) {
          logs[i] = sums[i] == 0 ? std::numeric_limits<float>::infinity() : largest[i] + std::log(sums[i]);
        }
      }
    });
  }

  // grad and out (B, S, heads, E), log_sums (B, heads, S) -> grad_q (B, S, heads, D); and of keys (B, key heads, parts,
  // T, D) and of values (..., T, E), for each of `parts` parts of the heads that share them.
  void backward(const Tensor& grad, const Tensor& out, const Tensor& log_sums, const Tensor& grad_q,
                const Tensor& grad_k, const Tensor& grad_v) const {
    const int64_t parts = grad_k.size(2);
    const int64_t sharing = heads / key_heads / parts;
    const Tensor upstream = grad.transpose(1, 2);
    at::parallel_for(0, batch * key_heads * parts, 1, [&](int64_t begin, int64_t end) {
      Block query(size);
      Block sent(value_size);
      std::vector<float> scores(kChunk * kBlock);
      std::vector<float> slopes(kChunk * kBlock);
      std::vector<float> to_query(kBlock * size);
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t sequence = piece / parts / key_heads;
        const auto keys = rows_of(k, sequence, piece / parts % key_heads);
        const auto values = rows_of(v, sequence, piece / parts % key_heads);
        float* to_k = grad_k.mutable_data_ptr<float>() + piece * columns * size;
        float* to_v = grad_v.mutable_data_ptr<float>() + piece * columns * value_size;
        std::fill_n(to_k, columns * size, 0.0F);
        std::fill_n(to_v, columns * value_size, 0.0F);
        for (int64_t unit = 0; unit < sharing * additions.blocks(); ++unit) {
          const int64_t block = unit / sharing;
          const Queries own(sequence, piece % (parts * key_heads) * sharing + unit % sharing, block, queries);
          load(query, q, own, scale);
          load(sent, upstream, own, 1);
          float means[kBlock] = {};
          float logs[kBlock] = {};
          mean_slopes(out, sent, own, means);
          const float* from = log_sums.const_data_ptr<float>() + (sequence * heads + own.head) * queries + own.first;
          std::copy_n(from, own.count, logs);
          std::fill(to_query.begin(), to_query.end(), 0.0F);
          const auto [first, last] = additions.range(sequence, own.head, block);
          for (int64_t column = first; column < last; column += kChunk) {
            const int64_t count = std::min(kChunk, last - column);
            multiply(count, own.width, size, keys.left(column), query.turned(), {scores.data(), kBlock}, false);
            probabilities(scores.data(), additions.of(sequence, own.head, block, column), count, own.width, logs);
            multiply(count, value_size, own.count, {scores.data(), kBlock, 1}, sent.rows(),
                     {to_v + column * value_size, value_size}, true);
            multiply(count, own.width, value_size, values.left(column), sent.turned(), {slopes.data(), kBlock}, false);
            times_deviation(slopes.data(), scores.data(), count, own.width, means);
            multiply(count, size, own.count, {slopes.data(), kBlock, 1}, query.rows(), {to_k + column * size, size},
                     true);
            multiply(own.count, size, count, {slopes.data(), 1, kBlock}, keys.rows(column), {to_query.data(), size},
                     true);
          }
          write_rows(
              to_query, own.count, size, [&](int64_t) { return scale; },
              grad_q.mutable_data_ptr<scalar_t>() + place(own, size), heads * size);
        }
      }
    });
  }

  // The mean of what reaches a query's probabilities, by them: what reaches its result, times the result.
  void mean_slopes(const Tensor& out, const Block& sent, const Queries& own, float* means) const {
    const scalar_t* result = out.const_data_ptr<scalar_t>() + place(own, value_size);
    for (int64_t i = 0; i < own.count; ++i) {
      Pair sum{Numbers(0.0F), Numbers(0.0F)};
      for (int64_t d = 0; d < value_size; d += kPair) {
        const Pair one = load_pair(result + i * heads * value_size + d, value_size - d);
        const Pair other = load_pair<float>(sent.row(i) + d, value_size - d);
        for (int half = 0; half < 2; ++half) sum[half] = at::vec::fmadd(one[half], other[half], sum[half]);
      }
      means[i] = sum_of(sum);
    }
  }
};

void check_sizes(const Check& check, const Tensor& q, const Tensor& v) {
  TORCH_CHECK_VALUE(q.size(3) % kUnit == 0 && v.size(3) % kUnit == 0, check.name(),
                    ": heads of q, k and v must have a multiple of ", kUnit, " features, got ", q.size(3), " and ",
                    v.size(3));
}

}  // namespace

TwoTensors attention_blocks(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                            double scale) {
  const Check check("attention_blocks");
  check_attention(check, q, k, v, mask);
  check_sizes(check, q, v);
  const Additions additions(mask, q.size(2), k.size(2));
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options());
  const Tensor log_sums = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const Tensor lines[] = {in_lines(q), in_lines(k), in_lines(v)};
  for_dtype(check.name(), "q", q, [&](auto number) {
    Operands<decltype(number)>{lines[0], lines[1], lines[2], additions, static_cast<float>(scale)}.forward(out,
                                                                                                           log_sums);
  });
  return {out, log_sums};
}

ThreeTensors attention_blocks_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const OptionalTensor& mask, const Tensor& out, const Tensor& log_sums,
                                       double scale) {
  const Check check("attention_blocks_backward");
  check_attention(check, q, k, v, mask);
  check_sizes(check, q, v);
  const int64_t batch = q.size(0);
  const int64_t heads = q.size(1);
  const int64_t queries = q.size(2);
  check.floats(grad, "grad", {batch, queries, heads, v.size(3)});
  check.floats(out, "out", {batch, queries, heads, v.size(3)});
  check.floats(log_sums, "log_sums", {batch, heads, queries});
  TORCH_CHECK_TYPE(grad.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type() &&
                       log_sums.scalar_type() == at::kFloat,
                   check.name(), ": grad and out must be ", dtype_name(q), " as q is, and log_sums torch.float32, got ",
                   dtype_name(grad), ", ", dtype_name(out), " and ", dtype_name(log_sums));
  const Additions additions(mask, queries, k.size(2));
  const int64_t parts = batch * k.size(1) < kPieces ? heads / k.size(1) : 1;
  const Tensor grad_q = at::empty({batch, queries, heads, q.size(3)}, q.options());
  const auto for_columns = [&](int64_t size) {
    return at::empty({batch, k.size(1), parts, k.size(2), size}, q.options().dtype(at::kFloat));
  };
  const Tensor grad_k = for_columns(q.size(3));
  const Tensor grad_v = for_columns(v.size(3));
  const Tensor lines[] = {in_lines(q), in_lines(k), in_lines(v), in_lines(grad)};
  for_dtype(check.name(), "q", q, [&](auto number) {
    Operands<decltype(number)>{lines[0], lines[1], lines[2], additions, static_cast<float>(scale)}.backward(
        lines[3], out.contiguous(), log_sums.contiguous(), grad_q, grad_k, grad_v);
  });
  const auto together = [&](const Tensor& all) {
    return (parts == 1 ? all.squeeze(2) : at::sum(all, {2})).to(q.scalar_type());
  };
  return {grad_q.transpose(1, 2), together(grad_k), together(grad_v)};
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
