#include "../checks.h"
#include "operators.h"
#include "tile_softmax.h"

#include <array>
#include <cmath>
#include <utility>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// Of one row in one part of the vocabulary. The entries of the gradient are G + c with c = nll_coeff * lse, which is
// known only at the end. Logits may share an offset that is far larger than their spread, and sum G^2 + 2 c sum G +
// V c^2 would then be a small difference of large numbers. So D = G + nll_coeff * shift is added up, with a logit as
// the shift.
struct Moments {
  double shift = 0;
  double sum = 0;      // of D
  double squares = 0;  // of D^2
};

// Sums of D and D^2 over a tile (size, columns): D = gradient - nll_coeff * (logit - shift).
template <typename acc_t>
void add_moments(const acc_t* gradient, const acc_t* logits, int64_t size, int64_t columns, acc_t nll_coeff,
                 Moments* moments) {
  using Vec = at::vec::Vectorized<acc_t>;
  std::array<acc_t, Vec::size()> lanes;
  const Vec coefficient(nll_coeff);
  for (int64_t column = 0; column < columns; column += Vec::size()) {
    for (int64_t lane = 0; lane < Vec::size(); ++lane) lanes[lane] = static_cast<acc_t>(moments[column + lane].shift);
    const Vec shift = Vec::loadu(lanes.data());
    Vec sum(acc_t(0));
    Vec squares(acc_t(0));
    for (int64_t i = column; i < size * columns; i += columns) {
      Vec entry = Vec::loadu(gradient + i);
      if (nll_coeff != 0) entry = entry - coefficient * (Vec::loadu(logits + i) - shift);
      sum = sum + entry;
      squares = at::vec::fmadd(entry, entry, squares);
    }
    sum.store(lanes.data());
    for (int64_t lane = 0; lane < Vec::size(); ++lane) moments[column + lane].sum += lanes[lane];
    squares.store(lanes.data());
    for (int64_t lane = 0; lane < Vec::size(); ++lane) moments[column + lane].squares += lanes[lane];
  }
}

struct Tables {
  Matrix head;
  Matrix embedding;
  Matrix reward_embedding;
  HeadTransform transform;
  double nll_coeff;

  // The head is not read without the likelihood, and read as the embedding where they are one.
  bool reads_head() const { return nll_coeff != 0; }
  bool shares_head() const { return reads_head() && head == embedding; }
};

template <typename acc_t>
class Pass {
 public:
  Pass(const at::Tensor& hidden, const at::Tensor& embedding, const at::Tensor& reward_embedding, const Tables& tables)
      : tables_(tables),
        hidden_(hidden, tables.head),
        embedding_(embedding, tables.embedding),
        reward_(reward_embedding, tables.reward_embedding),
        split_(tables.head.rows, tables.reward_embedding.columns + tables.embedding.columns +
                                     (tables.reads_head() && !tables.shares_head() ? tables.head.columns : 0)),
        states_(split_.parts),
        moments_(split_.parts) {
    split_.run([&](int64_t part, int64_t first, int64_t last) {
      std::tie(states_[part], moments_[part]) = reduce_part(first, last);
    });
  }

  void write(acc_t* norms) const {
    const std::vector<State> merged = merge_parts(states_, 1.0);
    for (int64_t row = 0; row < hidden_.rows(); ++row) {
      double squares = 0;
      for (int64_t part = 0; part < split_.parts; ++part) {
        const Moments& moments = moments_[part][row];
        squares += moments.squares;
        if (tables_.nll_coeff == 0) continue;
        const double constant = tables_.nll_coeff * (merged[row].lse(1.0) - moments.shift);
        squares += 2 * constant * moments.sum + static_cast<double>(split_.part_size(part)) * constant * constant;
      }
      // Rounding may leave the sum of squares a little below zero; a NaN stays one.
      norms[row] = static_cast<acc_t>(std::sqrt(squares < 0 ? 0 : squares));
    }
  }

 private:
  std::pair<std::vector<State>, std::vector<Moments>> reduce_part(int64_t first, int64_t last) const {
    std::vector<State> states(hidden_.padded_rows());
    std::vector<Moments> moments(hidden_.padded_rows());
    std::vector<acc_t> gradient(split_.tile * kPanel);
    std::vector<acc_t> logits(tables_.reads_head() ? gradient.size() : 0);
    std::vector<double> factors(kPanel);
    TableTile<acc_t> head;
    TableTile<acc_t> own_embedding;
    TableTile<acc_t> reward;
    const bool read_head = tables_.reads_head();
    TableTile<acc_t>& embedding = tables_.shares_head() && !hidden_.bfloat16() ? head : own_embedding;
    for (int64_t index = first; index < last; ++index) {
      const int64_t begin = split_.begin(index);
      const int64_t size = split_.size(index);
      if (read_head && !hidden_.bfloat16()) head.load(tables_.head, begin, size);
      if (&embedding != &head && !embedding_.bfloat16()) embedding.load(tables_.embedding, begin, size);
      if (!reward_.bfloat16()) reward.load(tables_.reward_embedding, begin, size);
      for (int64_t panel = 0; panel < hidden_.panels(); ++panel) {
        const int64_t columns = hidden_.columns(panel);
        Moments* panel_moments = moments.data() + panel * kPanel;
        embedding_.multiply(tables_.embedding, embedding, begin, size, panel, gradient.data(), false);
        reward_.multiply(tables_.reward_embedding, reward, begin, size, panel, gradient.data(), true);
        if (read_head) {
          hidden_.multiply(tables_.head, head, begin, size, panel, logits.data(), false);
          tables_.transform.apply(logits.data(), size * columns);
          if (index == first) choose_shifts(logits.data(), columns, panel_moments);
        }
        add_moments(gradient.data(), logits.data(), size, columns, static_cast<acc_t>(tables_.nll_coeff),
                    panel_moments);
        if (read_head) {
          add_tile<false>(logits.data(), size, columns, begin, 1.0, states.data() + panel * kPanel, factors.data());
        }
      }
    }
    return {std::move(states), std::move(moments)};
  }

  // The first logit of the part, if it is finite.
  static void choose_shifts(const acc_t* logits, int64_t columns, Moments* moments) {
    for (int64_t column = 0; column < columns; ++column) {
      if (std::isfinite(logits[column])) moments[column].shift = logits[column];
    }
  }

  const Tables& tables_;
  Rows<acc_t> hidden_;
  Rows<acc_t> embedding_;
  Rows<acc_t> reward_;
  Split split_;
  std::vector<std::vector<State>> states_;     // (parts, padded rows)
  std::vector<std::vector<Moments>> moments_;  // as many
};

template <typename acc_t>
Tensor run(const Tensor& hidden, const Tensor& embedding, const Tensor& reward_embedding, const Tables& tables) {
  Tensor norms = at::empty({hidden.size(0)}, hidden.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  each_pass(hidden.size(0), [&](int64_t row, int64_t rows) {
    const Pass<acc_t> pass(hidden.narrow(0, row, rows), embedding.narrow(0, row, rows),
                           reward_embedding.narrow(0, row, rows), tables);
    pass.write(norms.mutable_data_ptr<acc_t>() + row);
  });
  // Without the likelihood the head is not read, but a row whose hidden state is NaN is one without a gradient.
  if (tables.nll_coeff == 0) norms.add_(zero_or_nan(hidden));
  return norms;
}

}  // namespace

Tensor gradient_norm(const Tensor& hidden, const Tensor& embedding, const Tensor& reward_embedding,
                     const Tensor& weight, double scale, double softcap, const Tensor& embedding_table,
                     const Tensor& reward_table, double nll_coeff) {
  const Check check("gradient_norm");
  check.product(hidden, "hidden", weight, "weight");
  check.table(embedding_table, "embedding_table", weight.size(0), "d");
  check.table(reward_table, "reward_table", weight.size(0), "d_r");
  check.floats(embedding, "embedding", {hidden.size(0), embedding_table.size(1)});
  check.floats(reward_embedding, "reward_embedding", {hidden.size(0), reward_table.size(1)});
  const Tables tables{Matrix(weight), Matrix(embedding_table), Matrix(reward_table), {scale, softcap}, nll_coeff};
  return any_double({hidden, embedding, reward_embedding, weight, embedding_table, reward_table})
             ? run<double>(hidden, embedding, reward_embedding, tables)
             : run<float>(hidden, embedding, reward_embedding, tables);
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
