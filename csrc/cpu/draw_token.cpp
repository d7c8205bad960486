#include "../checks.h"
#include "gumbel.h"
#include "nucleus.h"
#include "online_softmax.h"
#include "operators.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <type_traits>

// A row is read once, block by block. Without top-k and top-p its tokens enter the race at once; else the largest entry
// of every block and the sum of the exponentials say which few blocks hold what top-k and top-p keep.
namespace nabla_fast::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 256;
// A row is cut into parts of fixed length whatever the number of threads: its sum is the same bits alone and in a
// batch.
constexpr int64_t kPart = 16384;
// Above it, the sum over a row in float32 no longer tells which tokens are left out.
constexpr double kNearlyAll = 1 - 1e-4;

template <typename acc_t>
constexpr acc_t kNothing = -std::numeric_limits<acc_t>::infinity();

// What is drawn with; top_k is V, and top_p is 1, where there is none.
struct Settings {
  double temperature;
  int64_t top_k;
  double top_p;
};

template <typename scalar_t>
class Row {
 public:
  using acc_t = at::opmath_type<scalar_t>;
  using Buffer = std::array<acc_t, kBlock>;

  Row(const Tensor& z, int64_t row)
      : data_(z.const_data_ptr<scalar_t>() + row * z.stride(0)), stride_(z.stride(1)), size_(z.size(1)) {}

  // The entries of a block, and -inf behind the row's last; in `buffer`, where they are not so in memory.
  const acc_t* block(int64_t index, Buffer& buffer) const {
    using Vec = at::vec::Vectorized<acc_t>;
    const int64_t first = index * kBlock;
    const int64_t count = std::min(kBlock, size_ - first);
    const scalar_t* z = data_ + first * stride_;
    if (stride_ != 1 || count < kBlock) {
      for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<acc_t>(z[i * stride_]);
      std::fill(buffer.begin() + count, buffer.end(), kNothing<acc_t>);
    } else if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return z;
    } else {
      for (int64_t i = 0; i < kBlock; i += 2 * Vec::size()) {
        Vec a, b;
        at::vec::load_to_float<scalar_t>(z + i, a, b);
        a.store(buffer.data() + i);
        b.store(buffer.data() + i + Vec::size());
      }
    }
    return buffer.data();
  }

 private:
  const scalar_t* data_;
  int64_t stride_;
  int64_t size_;
};

// What is found in a part of a row.
template <typename acc_t>
struct Part {
  acc_t max = kNothing<acc_t>;
  bool readable = true;  // neither NaN nor +inf
  double sum = 0;        // of exp((z - max) / temperature)
  Best<acc_t> best;      // of this part, and of others before it
};

// Reads the blocks of one part.
template <typename acc_t>
class Reader {
  using Vec = at::vec::Vectorized<acc_t>;

 public:
  // The largest of a block; NaN may be passed over, which readable() tells.
  acc_t max(const acc_t* z) {
    Vec most(kNothing<acc_t>);
    const Vec limit(std::numeric_limits<acc_t>::max());
    for (int64_t i = 0; i < kBlock; i += Vec::size()) {
      const Vec x = Vec::loadu(z + i);
      readable_ = readable_ & (x <= limit);
      most = at::vec::clamp_min(x, most);
    }
    const auto larger = [](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); };
    const acc_t found = at::vec::vec_reduce_all<acc_t>(larger, most);
    max_ = std::max(max_, found);
    return found;
  }

  // Adds the exponentials of a block whose max was taken.
  void add(const acc_t* z, double inverse_temperature) {
    if (max_ == kNothing<acc_t>) return;
    if (max_ > reference_) {
      const Vec factor(static_cast<acc_t>(std::exp((static_cast<double>(reference_) - max_) * inverse_temperature)));
      for (Vec& sum : sums_) sum = sum * factor;
      reference_ = max_;
    }
    const Vec subtract(reference_);
    const Vec scale(static_cast<acc_t>(inverse_temperature * Power<acc_t>::kUnits));
    const Vec lowest(Power<acc_t>::kLowest);
    for (int64_t i = 0; i < kBlock; i += kSums * Vec::size()) {
      for (int64_t k = 0; k < kSums; ++k) {
        const Vec x = Vec::loadu(z + i + k * Vec::size());
        sums_[k] = sums_[k] + Power<acc_t>::of(at::vec::clamp_min((x - subtract) * scale, lowest));
      }
    }
  }

  Part<acc_t> part() const {
    const auto plus = [](const Vec& a, const Vec& b) { return a + b; };
    const Vec sum = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
    return {max_, readable_.zero_mask() == 0, static_cast<double>(at::vec::vec_reduce_all<acc_t>(plus, sum)), {}};
  }

 private:
  static constexpr int64_t kSums = 4;

  acc_t max_ = kNothing<acc_t>;
  acc_t reference_ = kNothing<acc_t>;
  Vec readable_ = Vec(acc_t(0)) <= Vec(acc_t(0));
  std::array<Vec, kSums> sums_{Vec(acc_t(0)), Vec(acc_t(0)), Vec(acc_t(0)), Vec(acc_t(0))};
};

// Enters the tokens of a block, whose largest logit is `max`, that can still win: mostly none.
template <typename acc_t>
void enter_block(Best<acc_t>& best, const acc_t* z, acc_t max, int64_t first, NoiseKey key, acc_t temperature) {
  if (!(max > kNothing<acc_t>)) return;
  const int64_t reach = best.reach(static_cast<double>(max) / temperature);
  if (reach < 0) return;
  std::array<uint32_t, kBlock> bits;
  uint32_t least = std::numeric_limits<uint32_t>::max();
  for (uint32_t i = 0; i < kBlock; ++i) {
    bits[i] = key.bits(static_cast<uint32_t>(first) + i);
    least = std::min(least, bits[i]);
  }
  if (least > reach) return;
  for (int64_t i = 0; i < kBlock; ++i) {
    if (bits[i] <= reach) best.enter(z[i] / temperature, first + i, bits[i]);
  }
}

template <typename scalar_t>
class Drawer {
  using acc_t = at::opmath_type<scalar_t>;

 public:
  Drawer(const Tensor& z, const Tensor& low, const Tensor& high, const Settings& settings)
      : z_(z),
        low_(low),
        high_(high),
        settings_(settings),
        rows_(z.size(0)),
        parts_((z.size(1) + kPart - 1) / kPart),
        races_(settings.temperature > 0 && settings.top_k >= z.size(1) && settings.top_p == 1),
        sums_(settings.temperature > 0 && settings.top_k >= z.size(1) && settings.top_p <= kNearlyAll) {
    found_.resize(rows_ * parts_);
    if (!races_) maxima_.resize(rows_ * blocks());
  }

  Tensor draw() {
    Tensor tokens = at::empty({rows_}, low_.options());
    auto* out = tokens.mutable_data_ptr<int64_t>();
    const int64_t grain = std::max<int64_t>(1, kPart / z_.size(1));
    at::parallel_for(0, rows_ * parts_, grain, [&](int64_t begin, int64_t end) { read(begin, end); });
    at::parallel_for(0, rows_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) out[row] = token(row);
    });
    return tokens;
  }

 private:
  int64_t blocks() const { return (z_.size(1) + kBlock - 1) / kBlock; }

  const acc_t* maxima(int64_t number) const { return maxima_.data() + number * blocks(); }

  acc_t divisor() const { return static_cast<acc_t>(settings_.temperature); }

  NoiseKey key(int64_t row) const {
    return {static_cast<uint32_t>(low_.const_data_ptr<int64_t>()[row * low_.stride(0)]),
            static_cast<uint32_t>(high_.const_data_ptr<int64_t>()[row * high_.stride(0)])};
  }

  // Parts begin..end of all rows' parts.
  void read(int64_t begin, int64_t end) {
    typename Row<scalar_t>::Buffer buffer;
    Best<acc_t> best;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = task / parts_;
      const int64_t first = task % parts_ * (kPart / kBlock);
      if (first == 0) best = {};
      const Row<scalar_t> row(z_, number);
      Reader<acc_t> reader;
      for (int64_t block = first; block < std::min(first + kPart / kBlock, blocks()); ++block) {
        const acc_t* z = row.block(block, buffer);
        const acc_t max = reader.max(z);
        if (races_) {
          enter_block(best, z, max, block * kBlock, key(number), divisor());
        } else {
          maxima_[number * blocks() + block] = max;
        }
        if (sums_) reader.add(z, 1 / settings_.temperature);
      }
      found_[task] = reader.part();
      found_[task].best = best;
    }
  }

  int64_t token(int64_t number) const {
    Part<acc_t> whole;
    for (int64_t i = 0; i < parts_; ++i) {
      const Part<acc_t>& part = found_[number * parts_ + i];
      whole.max = std::max(whole.max, part.max);
      whole.readable &= part.readable;
      if (part.best.token >= 0) whole.best.take(part.best.score, part.best.token);
    }
    const bool greedy = settings_.temperature == 0;
    if (!whole.readable || !std::isfinite(greedy ? whole.max : whole.max / divisor())) return -1;
    if (races_) return whole.best.token;
    if (greedy) return first(number, whole.max);
    for (int64_t i = 0; sums_ && i < parts_; ++i) {
      const Part<acc_t>& part = found_[number * parts_ + i];
      const double below = (static_cast<double>(part.max) - static_cast<double>(whole.max)) / settings_.temperature;
      if (part.sum > 0) whole.sum += part.sum * std::exp(below);
    }
    const NoiseKey noise = key(number);
    for (const auto& c : kept(number, whole.max, whole.sum)) whole.best.enter(c.x, c.token, noise.bits(c.token));
    return whole.best.token;
  }

  // The first token of a row with this logit.
  int64_t first(int64_t number, acc_t max) const {
    typename Row<scalar_t>::Buffer buffer;
    const int64_t block = std::find(maxima(number), maxima(number) + blocks(), max) - maxima(number);
    const acc_t* z = Row<scalar_t>(z_, number).block(block, buffer);
    return block * kBlock + (std::find(z, z + kBlock, max) - z);
  }

  // What top-k and top-p leave of a row, in any order.
  Candidates<acc_t> kept(int64_t number, acc_t max, double sum) const {
    if (sums_) return nucleus(number, max, sum);
    Candidates<acc_t> candidates = collect(number, settings_.top_k < z_.size(1) ? kth(number) : kNothing<acc_t>);
    keep_top_k(candidates, settings_.top_k);
    if (settings_.top_p == 1) return candidates;
    const double total = weigh(candidates, max, settings_.temperature);
    if (settings_.top_p > kNearlyAll) {
      drop_tail(candidates, settings_.top_p, total);
    } else {
      keep_nucleus(candidates, settings_.top_p, total);
    }
    return candidates;
  }

  // The k-th largest of the blocks' maxima, divided by the temperature: so many tokens are at least as likely.
  acc_t kth(int64_t number) const {
    if (settings_.top_k > blocks()) return kNothing<acc_t>;
    std::vector<acc_t> ordered(maxima(number), maxima(number) + blocks());
    const auto last = ordered.begin() + (settings_.top_k - 1);
    std::nth_element(ordered.begin(), last, ordered.end(), std::greater<acc_t>());
    return *last / divisor();
  }

  // The nucleus of a row whose exponentials have this sum. It is looked for among the tokens above a share of the
  // probability, and that is lowered until they are enough.
  Candidates<acc_t> nucleus(int64_t number, acc_t max, double sum) const {
    const double rest = 1 - settings_.top_p;
    Candidates<acc_t> candidates;
    for (double share = rest / 64;; share /= 4) {
      // What is less likely than this share of the rest weighs less than the rest.
      const bool all = share * static_cast<double>(z_.size(1)) < rest;
      const double below = all ? -std::numeric_limits<double>::infinity() : std::log(share * sum);
      const auto least = static_cast<acc_t>(max + settings_.temperature * below);
      if (!all && weight_above(number, least) < settings_.top_p * sum) continue;
      candidates = collect(number, least / divisor());
      if (weigh(candidates, max, settings_.temperature) >= settings_.top_p * sum || all) break;
    }
    keep_nucleus(candidates, settings_.top_p, sum);
    return candidates;
  }

  // What the entries of a row weigh that are at least `least`, in float32.
  double weight_above(int64_t number, acc_t least) const {
    const Row<scalar_t> row(z_, number);
    typename Row<scalar_t>::Buffer buffer, likely;
    Reader<acc_t> reader;
    for (int64_t block = 0; block < blocks(); ++block) {
      if (maxima(number)[block] < least) continue;
      const acc_t* z = row.block(block, buffer);
      for (int64_t i = 0; i < kBlock; ++i) likely[i] = z[i] >= least ? z[i] : kNothing<acc_t>;
      reader.max(likely.data());
      reader.add(likely.data(), 1 / settings_.temperature);
    }
    return reader.part().sum;
  }

  // The tokens of a row whose x = logit / temperature is at least `least`, and above -inf.
  Candidates<acc_t> collect(int64_t number, acc_t least) const {
    const Row<scalar_t> row(z_, number);
    const acc_t lowest = std::max(least, std::numeric_limits<acc_t>::lowest());
    typename Row<scalar_t>::Buffer buffer, x;
    std::array<int32_t, kBlock> places;
    Candidates<acc_t> candidates;
    for (int64_t block = 0; block < blocks(); ++block) {
      if (maxima(number)[block] / divisor() < lowest) continue;
      const acc_t* z = row.block(block, buffer);
      for (int64_t i = 0; i < kBlock; ++i) x[i] = z[i] / divisor();
      int32_t count = 0;
      for (int32_t i = 0; i < kBlock; ++i) {
        places[count] = i;
        count += static_cast<int32_t>(x[i] >= lowest);
      }
      for (int32_t i = 0; i < count; ++i) {
        const int32_t place = places[i];
        candidates.push_back({z[place], x[place], static_cast<uint32_t>(block * kBlock + place), 0});
      }
    }
    return candidates;
  }

  const Tensor& z_;
  const Tensor& low_;
  const Tensor& high_;
  const Settings settings_;
  const int64_t rows_;
  const int64_t parts_;
  const bool races_;                // every token may win
  const bool sums_;                 // the sum over the row is needed
  std::vector<Part<acc_t>> found_;  // (rows, parts)
  std::vector<acc_t> maxima_;       // (rows, blocks)
};

}  // namespace

Tensor draw_token(const Tensor& z, const Tensor& low, const Tensor& high, double temperature,
                  std::optional<int64_t> top_k, std::optional<double> top_p) {
  const Check check("draw_token");
  check.logits(z);
  check.integers(low, "low", {z.size(0)});
  check.integers(high, "high", {z.size(0)});
  TORCH_CHECK_VALUE(temperature == 0 || (temperature >= 0x1p-126 && temperature <= 0x1p126),
                    "draw_token: temperature must be 0, or positive with an inverse in float32's range, got ",
                    temperature);
  TORCH_CHECK_VALUE(top_k.value_or(1) >= 1, "draw_token: top_k must be at least 1 or None, got ", *top_k);
  TORCH_CHECK_VALUE(top_p.value_or(1) > 0 && top_p.value_or(1) <= 1,
                    "draw_token: top_p must be above 0 and at most 1, or None, got ", *top_p);
  const Settings settings{temperature, top_k.value_or(z.size(1)), top_p.value_or(1)};
  Tensor tokens;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, z.scalar_type(), "draw_token",
                                  [&] { tokens = Drawer<scalar_t>(z, low, high, settings).draw(); });
  return tokens;
}

}  // namespace nabla_fast::cpu::CPU_CAPABILITY
