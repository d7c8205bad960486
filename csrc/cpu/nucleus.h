// Top-k and top-p among the few tokens of a row that they may keep.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

template <typename acc_t>
struct Candidate {
  acc_t z;  // logit
  acc_t x;  // logit / temperature
  uint32_t token;
  double weight;  // exp((logit - largest) / temperature), where it is needed
};

template <typename acc_t>
using Candidates = std::vector<Candidate<acc_t>>;

// Whether one is likelier than the other; of equals the lowest token comes first.
template <typename acc_t>
bool likelier(const Candidate<acc_t>& a, const Candidate<acc_t>& b) {
  return a.x > b.x || (a.x == b.x && a.token < b.token);
}

template <typename acc_t>
double total_weight(const Candidate<acc_t>* begin, const Candidate<acc_t>* end) {
  return std::accumulate(begin, end, 0.0, [](double sum, const Candidate<acc_t>& c) { return sum + c.weight; });
}

// Weighs the candidates, whose largest logit is `max`; returns what all weigh.
template <typename acc_t>
double weigh(Candidates<acc_t>& candidates, acc_t max, double temperature) {
  using Vec = at::vec::Vectorized<double>;
  constexpr size_t kLanes = Vec::size();
  std::array<double, kLanes> lanes{};
  for (size_t begin = 0; begin < candidates.size(); begin += kLanes) {
    const size_t count = std::min(kLanes, candidates.size() - begin);
    for (size_t i = 0; i < count; ++i) lanes[i] = static_cast<double>(candidates[begin + i].z);
    ((Vec::loadu(lanes.data()) - Vec(static_cast<double>(max))) / Vec(temperature)).exp().store(lanes.data());
    for (size_t i = 0; i < count; ++i) candidates[begin + i].weight = lanes[i];
  }
  return total_weight(candidates.data(), candidates.data() + candidates.size());
}

// How many of `size` candidates, taken in some order, weigh together what fits. They are then the first, in any order,
// and the next one stands behind them. Halves are put in order as long as it matters what is in them: no more than
// 2 size comparisons, and sums of doubles, whose order makes no difference that could be seen.
template <typename acc_t, typename Order, typename Fits>
int64_t count_fitting(Candidate<acc_t>* all, int64_t size, const Order& before, const Fits& fits) {
  constexpr int64_t kFew = 32;
  int64_t begin = 0;
  int64_t end = size;
  double weight = 0;
  while (end - begin > kFew) {
    const int64_t middle = begin + (end - begin) / 2;
    std::nth_element(all + begin, all + middle, all + end, before);
    const double more = total_weight(all + begin, all + middle);
    if (fits(weight + more)) {
      weight += more;
      begin = middle;
    } else {
      end = middle;
    }
  }
  std::sort(all + begin, all + end, before);
  // Behind `end` is what did not fit, whatever this order of the sum makes of it.
  const int64_t last = end < size ? end - 1 : end;
  while (begin < last && fits(weight + all[begin].weight)) weight += all[begin++].weight;
  return begin;
}

// Leaves the smallest set of likeliest candidates that weighs at least `share` of `total`. The candidates lack nothing
// that is likelier than the least of them, and weigh as much.
template <typename acc_t>
void keep_nucleus(Candidates<acc_t>& candidates, double share, double total) {
  const auto size = static_cast<int64_t>(candidates.size());
  const int64_t below =
      count_fitting(candidates.data(), size, likelier<acc_t>, [&](double weight) { return weight < share * total; });
  candidates.resize(std::min(size, below + 1));
}

// The same by what may be left out, from the least likely up: exact however near to 1 the share is. `candidates` are
// all that there are.
template <typename acc_t>
void drop_tail(Candidates<acc_t>& candidates, double share, double total) {
  const auto size = static_cast<int64_t>(candidates.size());
  const double most = (1 - share) * total;
  const auto unlikelier = [](const Candidate<acc_t>& a, const Candidate<acc_t>& b) { return likelier(b, a); };
  const int64_t tail =
      count_fitting(candidates.data(), size, unlikelier, [&](double weight) { return weight <= most; });
  candidates.erase(candidates.begin(), candidates.begin() + std::min(tail, size - 1));
}

// Leaves the k likeliest candidates, and those as likely as the last of them.
template <typename acc_t>
void keep_top_k(Candidates<acc_t>& candidates, int64_t k) {
  if (static_cast<int64_t>(candidates.size()) <= k) return;
  const auto last = candidates.begin() + (k - 1);
  std::nth_element(candidates.begin(), last, candidates.end(), likelier<acc_t>);
  const acc_t least = last->x;
  candidates.erase(std::partition(last, candidates.end(), [&](const auto& c) { return c.x >= least; }),
                   candidates.end());
}

}  // namespace
}  // namespace nabla_fast::cpu::CPU_CAPABILITY
