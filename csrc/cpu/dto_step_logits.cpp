// Rows of logits. A step is one pass over a row: the stored weights e give the gradient, Adam the new logits, and these
// the next weights and the next token.
#include "adam.h"
#include "dto_step.h"
#include "matrix.h"
#include "online_softmax.h"
#include "vocabulary_pass.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <optional>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

// A row is cut into parts of fixed length, whatever the number of threads, so it moves alike alone and in a batch.
constexpr int64_t kPart = 4096;
// A block is gone through three times, from the first-level cache: step, maximum, weights.
constexpr int64_t kBlock = 1024;
// Groups are worked off together until they have this many rows, and the gradient rows of all of them come from one
// reading of the tables. Weights and gradient of that many rows are kept for the steps still to come.
constexpr int64_t kRowsTogether = 16;
// The weights of a step's result are taken against the maximum before the step. A maximum that moved further than this
// many nats calls for another pass, or they would lose digits or overflow.
constexpr double kFarMove = 30;

template <typename acc_t>
class LogitsRows {
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr acc_t kMinusInfinity = -std::numeric_limits<acc_t>::infinity();

 public:
  // Rows [first, last), whole groups.
  LogitsRows(DtoProblem& problem, int64_t first, int64_t last, const at::Tensor& weights, const at::Tensor& gradient)
      : problem_(problem),
        first_(first),
        vocabulary_(problem.vocabulary),
        parts_((vocabulary_ + kPart - 1) / kPart),
        inverse_tau_(1 / problem.tau),
        weights_(weights),
        states_(last - first),
        tops_(last - first, -1),
        partial_((last - first) * parts_),
        gradient_(gradient.defined() ? gradient : problem.gradient),
        gradient_offset_(gradient.defined() ? first : 0),
        soft_(optional_matrix(problem.soft_noise)),
        hard_(optional_matrix(problem.hard_noise)) {}

  // The tokens of rows as they are; with `weigh`, also their weights and sums.
  void start(const std::vector<int64_t>& rows, bool weigh) {
    // Mostly the row's token is the likeliest: then one pass makes its weights, too.
    for (const int64_t row : rows) states_[row - first_].max = weigh ? guess_maximum(row) : kMinusInfinity;
    each_part(rows, [&](int64_t row, int64_t begin, int64_t end) {
      const Part part = maximum_part(row, begin, end);
      return states_[row - first_].max == kMinusInfinity ? part : weigh_part(row, begin, end, part);
    });
    if (!weigh) return;
    std::vector<int64_t> wrong;
    for (const int64_t row : rows) {
      const int64_t token = problem_.tokens[row];
      if (problem_.current[row] == token && top_part(row).top != token) wrong.push_back(row);
    }
    reweigh(wrong);
  }

  // One step of rows whose weights are known; the last one leaves them behind.
  void step(const std::vector<int64_t>& rows, bool last) {
    std::vector<Adam<acc_t>> rules(states_.size(), {1, 0, 0});
    for (const int64_t row : rows) {
      const double rate = problem_.rates[problem_.step[row]];
      rules[row - first_] = Adam<acc_t>(++problem_.step[row], rate, problem_.weight_decay);
    }
    std::vector<State> before(states_);
    each_part(rows, [&](int64_t row, int64_t begin, int64_t end) {
      return step_part(row, begin, end, rules[row - first_], before[row - first_], last);
    });
    if (last) return;
    std::vector<int64_t> far;
    for (const int64_t row : rows) {
      const Part& top = top_part(row);
      const double moved = (top.max - before[row - first_].max) * inverse_tau_;
      // Where noise holds the hard token, another one may have become the likeliest.
      if (!(std::abs(moved) < kFarMove) || top.top != tops_[row - first_]) far.push_back(row);
    }
    reweigh(far);
  }

 private:
  // Of a part of a row: x is logit + soft noise, hard values are logit + hard noise.
  struct Part : State {
    int64_t top = -1;  // where `max` is
  };

  void reweigh(const std::vector<int64_t>& rows) {
    for (const int64_t row : rows) choose_reference(row);
    each_part(rows, [&](int64_t row, int64_t begin, int64_t end) {
      return weigh_part(row, begin, end, partial_[(row - first_) * parts_ + begin / kPart]);
    });
  }

  template <typename Work>
  void each_part(const std::vector<int64_t>& rows, const Work& work) {
    const auto tasks = static_cast<int64_t>(rows.size()) * parts_;
    at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t row = rows[task / parts_];
        const int64_t part = task % parts_;
        partial_[(row - first_) * parts_ + part] = work(row, part * kPart, std::min((part + 1) * kPart, vocabulary_));
      }
    });
    for (const int64_t row : rows) merge(row);
  }

  void merge(int64_t row) {
    State& state = states_[row - first_];
    State merged;
    merged.max = state.max;
    merged.reference = state.reference;
    double max = -std::numeric_limits<double>::infinity();
    for (int64_t part = 0; part < parts_; ++part) {
      const Part& one = partial_[(row - first_) * parts_ + part];
      max = std::max(max, one.max);
      merged.add(one);
    }
    state = merged;
    // Soft noise of nothing but -inf leaves no softmax.
    problem_.current[row] = std::isfinite(max) ? state.token : -1;
  }

  // The part that holds the row's maximum.
  const Part& top_part(int64_t row) const {
    const Part* top = &partial_[(row - first_) * parts_];
    for (int64_t part = 1; part < parts_; ++part) {
      const Part& one = partial_[(row - first_) * parts_ + part];
      if (one.max > top->max) top = &one;
    }
    return *top;
  }

  // Takes the row's token for its maximum, as `choose_reference` does; -inf if that cannot be.
  double guess_maximum(int64_t row) {
    const int64_t token = problem_.tokens[row];
    acc_t soft = 0;
    if (soft_) soft_->copy(row, token, 1, &soft);
    const acc_t guess = parameters(row)[token] + soft;
    acc_t reference = 0;
    gradient_.copy(row - gradient_offset_, token, 1, &reference);
    states_[row - first_].reference = std::isfinite(reference) ? reference : 0;
    tops_[row - first_] = token;
    return std::isfinite(guess) ? guess : kMinusInfinity;
  }

  // The maximum, against which weights are taken, and its G: sums of G - reference keep their digits where that token
  // holds nearly all of the weight.
  void choose_reference(int64_t row) {
    State& state = states_[row - first_];
    const Part& top = top_part(row);
    state.max = top.max;
    tops_[row - first_] = top.top;
    acc_t reference = 0;
    if (top.top >= 0) gradient_.copy(row - gradient_offset_, top.top, 1, &reference);
    state.reference = std::isfinite(reference) ? reference : 0;
  }

  acc_t* parameters(int64_t row) const { return problem_.parameters.mutable_data_ptr<acc_t>() + row * vocabulary_; }

  acc_t* weights(int64_t row) const {
    return weights_.defined() ? weights_.mutable_data_ptr<acc_t>() + (row - first_) * vocabulary_ : nullptr;
  }

  // Noise and gradient of one block of a row.
  struct Block {
    acc_t soft_buffer[kBlock];
    acc_t hard_buffer[kBlock];
    acc_t gradient_buffer[kBlock];
    const acc_t* soft = nullptr;
    const acc_t* hard = nullptr;
    const acc_t* gradient = nullptr;
  };

  void read_noise(Block& block, int64_t row, int64_t begin, int64_t count) const {
    if (soft_) block.soft = soft_->read(row, begin, count, acc_t(0), block.soft_buffer);
    if (hard_) block.hard = hard_->read(row, begin, count, acc_t(0), block.hard_buffer);
  }

  void read_gradient(Block& block, int64_t row, int64_t begin, int64_t count) const {
    block.gradient = gradient_.read(row - gradient_offset_, begin, count, acc_t(0), block.gradient_buffer);
  }

  // Takes the block's maxima into the part's. Lanes behind `count` must not be seen.
  void add_maxima(Part& part, const Block& block, const acc_t* z, int64_t begin, int64_t count) const {
    Vec x_max(kMinusInfinity);
    Vec y_max(kMinusInfinity);
    const acc_t* soft = block.soft;
    const acc_t* hard = block.hard;
    each_vector<Vec>(count, [=, &x_max, &y_max](int64_t i, int64_t lanes) NABLA_FAST_INLINE {
      Vec value = Vec::loadu(z + i, lanes);
      if (lanes < Vec::size()) value = Vec::set(Vec(kMinusInfinity), value, lanes);
      y_max = at::vec::maximum(y_max, hard ? value + Vec::loadu(hard + i, lanes) : value);
      if (soft || hard) x_max = at::vec::maximum(x_max, soft ? value + Vec::loadu(soft + i, lanes) : value);
    });
    const auto at = [&](const acc_t* noise, acc_t value) {
      int64_t index = 0;
      while (index < count - 1 && (noise ? z[index] + noise[index] : z[index]) != value) ++index;
      return index;
    };
    const acc_t best = Lanes<acc_t>(y_max).max();
    const acc_t max = block.soft || block.hard ? Lanes<acc_t>(x_max).max() : best;
    // A maximum that is NaN or +inf fails this.
    if (!(best < -kMinusInfinity && max < -kMinusInfinity)) part.max = -kMinusInfinity;
    if (best > part.best) part.add_hard(best, begin + at(block.hard, best));
    if (max > part.max) {
      part.max = max;
      part.top = begin + at(block.soft, max);
    }
  }

  Part maximum_part(int64_t row, int64_t begin, int64_t end) const {
    Part part;
    Block block;
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t count = std::min(kBlock, end - start);
      read_noise(block, row, start, count);
      add_maxima(part, block, parameters(row) + start, start, count);
    }
    return part;
  }

  // Weights of a block against the row's maximum, and their sums.
  void weigh_block(const Block& block, const State& state, const acc_t* z, acc_t* e, int64_t count, Part& part) const {
    const Vec max(static_cast<acc_t>(state.max));
    const Vec scale(static_cast<acc_t>(inverse_tau_ * Power<acc_t>::kUnits));
    const Vec reference(static_cast<acc_t>(state.reference));
    const acc_t* soft = block.soft;
    const acc_t* gradient = block.gradient;
    Vec sum(acc_t(0));
    Vec gradient_sum(acc_t(0));
    each_vector<Vec>(count, [=, &sum, &gradient_sum](int64_t i, int64_t lanes) NABLA_FAST_INLINE {
      Vec x = Vec::loadu(z + i, lanes);
      if (soft) x = x + Vec::loadu(soft + i, lanes);
      Vec weight = power_or_zero<acc_t>((x - max) * scale);
      if (lanes < Vec::size()) weight = Vec::set(Vec(acc_t(0)), weight, lanes);
      weight.store(e + i, lanes);
      sum = sum + weight;
      gradient_sum = gradient_sum + weighted(weight, Vec::loadu(gradient + i, lanes) - reference);
    });
    part.sum_exp += Lanes<acc_t>(sum).sum();
    part.sum_exp_grad += Lanes<acc_t>(gradient_sum).sum();
  }

  // `part` with the sums of its weights.
  Part weigh_part(int64_t row, int64_t begin, int64_t end, Part part) const {
    part.sum_exp = part.sum_exp_grad = 0;
    Block block;
    acc_t passing[kBlock];
    acc_t* e = weights(row);
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t count = std::min(kBlock, end - start);
      read_noise(block, row, start, count);
      read_gradient(block, row, start, count);
      weigh_block(block, states_[row - first_], parameters(row) + start, e ? e + start : passing, count, part);
    }
    return part;
  }

  Part step_part(int64_t row, int64_t begin, int64_t end, const Adam<acc_t>& adam, const State& state,
                 bool last) const {
    acc_t* z = parameters(row);
    acc_t* stored = weights(row);
    acc_t* mean = problem_.exp_avg.mutable_data_ptr<acc_t>() + row * vocabulary_;
    acc_t* square = problem_.exp_avg_sq.mutable_data_ptr<acc_t>() + row * vocabulary_;
    const Vec expected(static_cast<acc_t>(state.sum_exp_grad / state.sum_exp));
    const Vec reference(static_cast<acc_t>(state.reference));
    const Vec scale(static_cast<acc_t>(inverse_tau_ / state.sum_exp));
    const Adam<acc_t> rule = adam;
    Part part;
    Block block;
    acc_t passing[kBlock];
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t count = std::min(kBlock, end - start);
      read_noise(block, row, start, count);
      read_gradient(block, row, start, count);
      acc_t* e = stored ? stored + start : passing;
      Part before;
      if (!stored) weigh_block(block, state, z + start, e, count, before);
      const acc_t* own = block.gradient;
      each_vector<Vec>(count, [=](int64_t i, int64_t lanes) NABLA_FAST_INLINE {
        const Vec difference = Vec::loadu(own + i, lanes) - reference - expected;
        const Vec gradient = weighted(Vec::loadu(e + i, lanes) * scale, difference);
        Vec m = Vec::loadu(mean + start + i, lanes);
        Vec v = Vec::loadu(square + start + i, lanes);
        rule(Vec::loadu(z + start + i, lanes), gradient, m, v).store(z + start + i, lanes);
        m.store(mean + start + i, lanes);
        v.store(square + start + i, lanes);
      });
      add_maxima(part, block, z + start, start, count);
      if (!last) weigh_block(block, state, z + start, e, count, part);
    }
    return part;
  }

  DtoProblem& problem_;
  int64_t first_;
  int64_t vocabulary_;
  int64_t parts_;
  double inverse_tau_;
  at::Tensor weights_;  // (rows, V), or undefined where only one step is made: then they are made twice
  std::vector<State> states_;
  std::vector<int64_t> tops_;  // the token whose G is a row's reference
  std::vector<Part> partial_;
  Matrix gradient_;
  int64_t gradient_offset_;  // the row of the problem that is the gradient's first
  std::optional<Matrix> soft_, hard_;
};

// Groups [begin, end).
template <typename acc_t>
void step_groups(DtoProblem& problem, size_t begin, size_t end) {
  const int64_t first = problem.groups[begin];
  const int64_t last = problem.groups[end];
  const std::vector<int64_t> all = row_numbers(first, last);
  const auto options = problem.parameters.options();
  at::Tensor gradient;
  if (!problem.gradient.defined()) {
    gradient = at::empty({last - first, problem.vocabulary}, options);
    write_gradient<acc_t>(problem.vocabulary, select_terms(problem.terms, all), row_numbers(0, last - first), gradient);
  }
  at::Tensor weights;
  if (problem.max_steps > 0) weights = at::empty({last - first, problem.vocabulary}, options);
  LogitsRows<acc_t> rows(problem, first, last, weights, gradient);
  rows.start(all, problem.max_steps > 0);
  for (int64_t i = 0; i < problem.max_steps; ++i) {
    std::vector<int64_t> moving;
    for (size_t group = begin; group < end; ++group) {
      if (!problem.may_move(group)) continue;
      for (int64_t row = problem.groups[group]; row < problem.groups[group + 1]; ++row) moving.push_back(row);
    }
    if (moving.empty()) return;
    rows.step(moving, i + 1 == problem.max_steps);
  }
}

}  // namespace

template <typename acc_t>
void step_logits(DtoProblem& problem) {
  const size_t groups = problem.groups.size() - 1;
  for (size_t begin = 0; begin < groups;) {
    size_t end = begin + 1;
    while (end < groups && problem.groups[end + 1] - problem.groups[begin] <= kRowsTogether) ++end;
    step_groups<acc_t>(problem, begin, end);
    begin = end;
  }
}

template void step_logits<float>(DtoProblem&);
template void step_logits<double>(DtoProblem&);

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
