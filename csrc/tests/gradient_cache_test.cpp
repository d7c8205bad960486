// The gradient cache without Python: what only C++ can try (real concurrency, sanitizers, tensors that call back), and
// enough of the rest that the sanitizers see every line. tests/test_gradient_cache.py checks the meaning in full.
#include "gradient_cache.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <thread>

using nabla_fast::GradientCache;
using Ids = std::vector<int64_t>;

namespace {

#define REQUIRE(condition)                                                           \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: REQUIRE(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

// The type and the beginning of the message of what `statement` throws.
#define REQUIRE_THROWS(statement, type, message)                                                       \
  do {                                                                                                 \
    std::string said = "nothing was thrown";                                                           \
    try {                                                                                              \
      statement;                                                                                       \
    } catch (const c10::type& error) {                                                                 \
      said = error.what_without_backtrace();                                                           \
    }                                                                                                  \
    if (said != (message)) {                                                                           \
      std::fprintf(stderr, "%s:%d: wanted: %s\ngot: %s\n", __FILE__, __LINE__, message, said.c_str()); \
      std::exit(1);                                                                                    \
    }                                                                                                  \
  } while (false)

constexpr int64_t kRowBytes = (4 + 4 + 3) * 4 + 8;

at::Tensor tokens(const Ids& ids) { return at::tensor(ids, at::kLong); }

std::vector<at::Tensor> values(int64_t rows) {
  return {at::zeros({rows, 4}), at::zeros({rows, 4}), at::zeros({rows, 3}), at::zeros({rows}, at::kDouble)};
}

int64_t size(size_t token_count, int64_t rows) { return static_cast<int64_t>(token_count) * 8 + rows * kRowBytes; }

int64_t count(GradientCache& cache, const char* name) { return cache.stats().at(name); }

Ids changed(GradientCache& cache, const Ids& ids) {
  const at::Tensor positions = std::get<4>(cache.find(tokens(ids), 0));
  REQUIRE(positions.scalar_type() == at::kLong && positions.dim() == 1);
  const at::Tensor row = positions.contiguous();
  return {row.const_data_ptr<int64_t>(), row.const_data_ptr<int64_t>() + row.numel()};
}

struct Mode {
  int64_t hash_bits;
  bool on_device;
};

void test_find(Mode mode) {
  GradientCache cache(1 << 20, mode.hash_bits, mode.on_device);
  const auto kept = values(2);
  at::Tensor key = tokens({7, 8, 9});
  cache.insert(key, 1, kept, 0.5);
  key.fill_(1);  // the cache has its own copy
  const auto [start, found, reward, prefix, positions] = cache.find(tokens({7, 8, 9}), 2);
  REQUIRE(start == 1 && reward == 0.5 && prefix == 3 && positions.numel() == 0 && found.size() == 4);
  for (size_t i = 0; i < found.size(); ++i) REQUIRE(found[i].is_same(kept[i]));

  const auto late = cache.find(tokens({7, 8, 9}), 0);
  REQUIRE(std::get<0>(late) == -1 && std::get<1>(late).empty() && std::isnan(std::get<2>(late)));
  REQUIRE(std::get<3>(late) == 3);
  cache.insert(tokens({7, 8, 1, 9}), 0, values(0), 1.0);
  cache.insert_reward(tokens({7, 8, 2, 9}), 2.0);
  REQUIRE((changed(cache, {7, 8, 2, 9, 9}) == Ids{2}));
  REQUIRE((changed(cache, {7, 8, 9, 9}) == Ids{}));
  REQUIRE((changed(cache, {}) == Ids{}));
  REQUIRE(std::get<3>(cache.find(tokens({5}), 0)) == 0);
  const at::Tensor wide = tokens({7, 0, 8, 0, 9, 0});
  REQUIRE(std::get<0>(cache.find(wide.slice(0, 0, 6, 2), 1)) == 1);
  REQUIRE(count(cache, "hits") == 2 && count(cache, "misses") == 5 && count(cache, "partial_hits") == 3);
  REQUIRE(count(cache, "entries") == 3 && count(cache, "bytes") == size(3, 2) + size(4, 0) + size(4, 0));
}

void test_insert_and_forget(Mode mode) {
  GradientCache cache(2 * size(2, 2), mode.hash_bits, mode.on_device);
  cache.insert(tokens({1, 1}), 1, values(1), 1.0);
  cache.insert(tokens({1, 1}), 0, values(2), 2.0);  // covers more
  cache.insert(tokens({1, 1}), 1, values(1), 3.0);  // covers less
  REQUIRE(std::get<2>(cache.find(tokens({1, 1}), 1)) == 2.0 && count(cache, "bytes") == size(2, 2));
  cache.insert(tokens({2, 2}), 0, values(2), 4.0);
  cache.insert(tokens({1, 1}), 1, values(1), 5.0);  // a use
  cache.insert(tokens({3, 3}), 0, values(2), 6.0);
  REQUIRE(!cache.find_reward(tokens({2, 2})) && cache.find_reward(tokens({1, 1})) == 2.0);
  REQUIRE(count(cache, "evictions") == 1 && count(cache, "entries") == 2);
  cache.insert(tokens({1, 1, 1, 1, 1, 1}), 0, values(6), 7.0);  // larger than the budget
  cache.insert_reward(at::zeros({1000}, at::kLong), 7.0);
  REQUIRE(count(cache, "evictions") == 1 && count(cache, "entries") == 2);
  cache.insert_reward(tokens({3, 3}), 8.0);
  REQUIRE(std::get<2>(cache.find(tokens({3, 3}), 0)) == 8.0);
  cache.insert_reward(tokens({4}), 9.0);
  REQUIRE(cache.find_reward(tokens({4})) == 9.0 && !cache.find_reward(tokens({1, 1})));
  REQUIRE(count(cache, "reward_hits") == 2 && count(cache, "reward_misses") == 2);
  cache.clear();
  REQUIRE(count(cache, "bytes") == 0 && count(cache, "entries") == 0 && count(cache, "evictions") == 2);
  REQUIRE(!cache.find_reward(tokens({4})));
}

void test_errors() {
  REQUIRE_THROWS(GradientCache(-1), ValueError, "GradientCache: max_bytes must be 0 or more, got -1");
  REQUIRE_THROWS(GradientCache(0, 65), ValueError, "GradientCache: hash_bits must be from 0 to 64, got 65");
  GradientCache cache(1 << 20);
  REQUIRE_THROWS(cache.find(at::zeros({2}), 0), TypeError,
               "GradientCache.find: tokens must be torch.int64, got torch.float32");
  REQUIRE_THROWS(cache.find_reward(at::zeros({1, 2}, at::kLong)), ValueError,
               "GradientCache.find_reward: tokens must have shape (n,), got [1, 2]");
  REQUIRE_THROWS(cache.insert(tokens({1}), 0, {values(1)[0]}, 0), ValueError,
               "GradientCache.insert: values must be hidden, embedding, reward_embedding and log_likelihoods, got 1 "
               "tensors");
  auto undefined = values(1);
  undefined[2] = at::Tensor();
  REQUIRE_THROWS(cache.insert(tokens({1}), 0, undefined, 0), ValueError,
               "GradientCache.insert: reward_embedding must have shape (m, d_r), got []");
  REQUIRE_THROWS(cache.insert(tokens({1}), 1, values(1), 0), ValueError,
               "GradientCache.insert: hidden must have at most 0 rows, for positions 1 to 1, got 1");
  REQUIRE(count(cache, "entries") == 0);
}

// A tensor whose end uses the cache that held it: with the lock held then, this would never return.
void test_tensors_may_call_back(Mode mode) {
  GradientCache cache(size(1, 1), mode.hash_bits, mode.on_device);
  float memory[4] = {};
  int ended = 0;
  const auto insert = [&](int64_t id) {
    auto parts = values(1);
    parts[0] = at::from_blob(
        memory, {1, 4}, [&](void*) { ended += cache.stats().at("bytes") >= 0; }, at::kFloat);
    cache.insert(tokens({id}), 0, std::move(parts), 0.0);
  };
  insert(1);
  REQUIRE(ended == 0);
  insert(1);  // replaced
  REQUIRE(ended == 1);
  insert(2);  // evicted
  REQUIRE(ended == 2);
  cache.clear();
  REQUIRE(ended == 3);
}

// Every operation at random against a list, the least recently used entry first.
void test_random(Mode mode) {
  struct Kept {
    Ids ids;
    int64_t start;  // -1: no factors
    int64_t rows;
    double reward;
  };
  const int64_t max_bytes = 6 * size(4, 2);
  GradientCache cache(max_bytes, mode.hash_bits, mode.on_device);
  std::deque<Kept> oracle;
  int64_t evictions = 0;
  std::mt19937 random(7);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const auto bytes = [&] {
    int64_t sum = 0;
    for (const Kept& kept : oracle) sum += size(kept.ids.size(), kept.rows);
    return sum;
  };
  for (int step = 0; step < 2000; ++step) {
    Ids ids(static_cast<size_t>(below(5)));
    for (int64_t& id : ids) id = below(3);
    const int64_t start = below(static_cast<int64_t>(ids.size()) + 1);
    const int64_t rows = static_cast<int64_t>(ids.size()) - start;
    const double reward = step;
    auto old = std::find_if(oracle.begin(), oracle.end(), [&](const Kept& kept) { return kept.ids == ids; });
    const bool there = old != oracle.end();
    const Kept before = there ? *old : Kept{ids, -1, 0, reward};
    const auto use = [&](Kept kept) {
      if (there) oracle.erase(old);
      oracle.push_back(std::move(kept));
    };
    switch (below(5)) {
      case 0:
      case 1: {
        const auto found = cache.find(tokens(ids), start);
        if (there && before.start >= 0 && before.start <= start) {
          REQUIRE(std::get<0>(found) == before.start && std::get<2>(found) == before.reward);
          REQUIRE(std::get<1>(found)[3].size(0) == before.rows);
          use(before);
        } else {
          size_t best = 0;
          for (const Kept& kept : oracle) {
            if (kept.start < 0) continue;
            const size_t end = std::min(ids.size(), kept.ids.size());
            size_t prefix = 0;
            while (prefix < end && ids[prefix] == kept.ids[prefix]) ++prefix;
            best = std::max(best, prefix);
          }
          REQUIRE(std::get<0>(found) == -1 && std::get<3>(found) == static_cast<int64_t>(best));
        }
        break;
      }
      case 2:
        cache.insert(tokens(ids), start, values(rows), reward);
        use(there && before.start >= 0 && before.start < start ? before : Kept{ids, start, rows, reward});
        break;
      case 3:
        cache.insert_reward(tokens(ids), reward);
        use({ids, before.start, before.rows, reward});
        break;
      default:
        REQUIRE(cache.find_reward(tokens(ids)) == (there ? std::optional<double>(before.reward) : std::nullopt));
        if (there) use(before);
    }
    for (; bytes() > max_bytes; ++evictions) oracle.pop_front();
    REQUIRE(count(cache, "bytes") == bytes() && count(cache, "entries") == static_cast<int64_t>(oracle.size()));
    REQUIRE(count(cache, "evictions") == evictions);
  }
  REQUIRE(evictions > 100);
}

void test_threads(Mode mode) {
  constexpr int kThreads = 4;
  constexpr int64_t kKeys = 24;
  GradientCache cache(8 * size(3, 3), mode.hash_bits, mode.on_device);
  std::atomic<int64_t> finds{0}, reward_finds{0};
  const auto ids = [](int64_t key) { return Ids{key % 2, key % 3, key}; };
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    for (int step = 0; step < 1000; ++step) {
      const auto key = static_cast<int64_t>(random() % kKeys);
      const auto start = static_cast<int64_t>(random() % 4);
      switch (random() % 8) {
        case 0:
        case 1:
        case 2:
          cache.insert(tokens(ids(key)), start, values(3 - start), static_cast<double>(key));
          break;
        case 3:
          cache.insert_reward(tokens(ids(key)), static_cast<double>(key));
          break;
        case 4: {
          ++reward_finds;
          const auto reward = cache.find_reward(tokens(ids(key)));
          REQUIRE(!reward || *reward == static_cast<double>(key));
          break;
        }
        case 5:
          if (random() % 50 == 0) cache.clear();
          REQUIRE(count(cache, "bytes") <= 8 * size(3, 3));
          break;
        default: {
          ++finds;
          const auto found = cache.find(tokens(ids(key)), start);
          if (std::get<0>(found) < 0) break;
          REQUIRE(std::get<2>(found) == static_cast<double>(key) && std::get<0>(found) <= start);
          REQUIRE(std::get<1>(found)[0].size(0) == 3 - std::get<0>(found));
          REQUIRE(at::equal(std::get<1>(found)[0], at::zeros({3 - std::get<0>(found), 4})));
        }
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < kThreads; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();

  REQUIRE(count(cache, "hits") + count(cache, "misses") == finds);
  REQUIRE(count(cache, "reward_hits") + count(cache, "reward_misses") == reward_finds);
  REQUIRE(count(cache, "hits") > 0 && count(cache, "partial_hits") > 0 && count(cache, "evictions") > 0);
  int64_t entries = 0, bytes = 0;
  for (int64_t key = 0; key < kKeys; ++key) {
    if (!cache.find_reward(tokens(ids(key)))) continue;
    const auto found = cache.find(tokens(ids(key)), 3);
    ++entries;
    bytes += size(3, std::get<1>(found).empty() ? 0 : std::get<1>(found)[0].size(0));
  }
  REQUIRE(count(cache, "entries") == entries && count(cache, "bytes") == bytes);
}

void test_long_tokens(Mode mode) {
  GradientCache cache(1 << 24, mode.hash_bits, mode.on_device);
  const at::Tensor base = at::zeros({5000}, at::kLong);
  for (int64_t i = 0; i < 40; ++i) {
    at::Tensor key = base.clone();
    key[4000 + 20 * i].fill_(i + 1);
    const auto found = cache.find(key, 0);
    REQUIRE(std::get<0>(found) == -1 && std::get<3>(found) == (i == 0 ? 0 : 4000 + 20 * (i - 1)));
    REQUIRE(std::get<4>(found).numel() == (i == 0 ? 0 : 2));
    cache.insert(key, 0, values(1), 0.0);
    REQUIRE(std::get<0>(cache.find(key, 0)) == 0);
  }
}

}  // namespace

int main() {
  test_errors();
  for (const bool on_device : {false, true}) {
    for (const int64_t hash_bits : {0, 3, 64}) {
      const Mode mode{hash_bits, on_device};
      test_find(mode);
      test_insert_and_forget(mode);
      test_tensors_may_call_back(mode);
      test_random(mode);
      test_long_tokens(mode);
      test_threads(mode);
      std::printf("hash bits %d, %s path: passed\n", static_cast<int>(hash_bits), on_device ? "device" : "host");
    }
  }
  return 0;
}
