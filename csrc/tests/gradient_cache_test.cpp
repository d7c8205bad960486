// The gradient cache without Python: what only C++ can try (real concurrency, sanitizers, tensors that call back), and
// enough of the rest that the sanitizers see every line. tests/test_gradient_cache.py checks the meaning in full.
#include "gradient_cache.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

using nabla_fast::GradientCache;
using Ids = std::vector<int64_t>;

namespace {

#define REQUIRE(condition)                                                          \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: REQUIRE(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (false)

constexpr int64_t kRowBytes = (4 + 4 + 3) * 4 + 8;

at::Tensor tokens(const Ids& ids) { return at::tensor(ids, at::kLong); }

std::vector<at::Tensor> values(int64_t rows) {
  return {at::zeros({rows, 4}), at::zeros({rows, 4}), at::zeros({rows, 3}), at::zeros({rows}, at::kDouble)};
}

int64_t size(int64_t token_count, int64_t rows) { return token_count * 8 + rows * kRowBytes; }

int64_t count(GradientCache& cache, const char* name) { return cache.stats().at(name); }

void test_find() {
  GradientCache cache(1 << 20);
  const auto kept = values(2);
  at::Tensor key = tokens({7, 8, 9});
  cache.insert(key, 1, kept, 0.5);
  key.fill_(1);  // the cache has its own copy
  const auto found = cache.find(tokens({7, 8, 9}), 2);
  REQUIRE(found && std::get<0>(*found) == 1 && std::get<2>(*found) == 0.5);
  for (size_t i = 0; i < kept.size(); ++i) REQUIRE(std::get<1>(*found)[i].is_same(kept[i]));
  const at::Tensor wide = tokens({7, 0, 8, 0, 9, 0});
  REQUIRE(cache.find(wide.slice(0, 0, 6, 2), 1));
  REQUIRE(!cache.find(tokens({7, 8, 9}), 0) && !cache.find(tokens({7, 8}), 1) && !cache.find(tokens({}), 0));
  cache.insert(tokens({}), 0, values(0), 1.0);
  REQUIRE(cache.find(tokens({}), 0) && cache.find_reward(tokens({})) == 1.0);
  REQUIRE(count(cache, "hits") == 3 && count(cache, "misses") == 3 && count(cache, "bytes") == size(3, 2));
}

void test_insert_and_forget() {
  GradientCache cache(2 * size(2, 2));
  cache.insert(tokens({1, 1}), 1, values(1), 1.0);
  cache.insert(tokens({1, 1}), 0, values(2), 2.0);  // covers more
  cache.insert(tokens({1, 1}), 1, values(1), 3.0);  // covers less
  REQUIRE(std::get<2>(*cache.find(tokens({1, 1}), 1)) == 2.0 && count(cache, "bytes") == size(2, 2));
  cache.insert(tokens({2, 2}), 0, values(2), 4.0);
  cache.insert(tokens({1, 1}), 1, values(1), 5.0);  // a use
  cache.insert(tokens({3, 3}), 0, values(2), 6.0);
  REQUIRE(!cache.find_reward(tokens({2, 2})) && cache.find_reward(tokens({1, 1})) == 2.0);
  cache.insert(tokens({1, 1, 1, 1, 1, 1}), 0, values(6), 7.0);  // larger than the budget
  cache.insert_reward(at::zeros({1000}, at::kLong), 7.0);
  REQUIRE(count(cache, "evictions") == 1 && count(cache, "entries") == 2);
  cache.insert_reward(tokens({3, 3}), 8.0);
  REQUIRE(std::get<2>(*cache.find(tokens({3, 3}), 0)) == 8.0);
  cache.insert_reward(tokens({4}), 9.0);
  REQUIRE(cache.find_reward(tokens({4})) == 9.0 && !cache.find(tokens({4}), 0) && !cache.find_reward(tokens({1, 1})));
  cache.clear();
  REQUIRE(count(cache, "bytes") == 0 && count(cache, "entries") == 0 && count(cache, "evictions") == 2);
  REQUIRE(!cache.find_reward(tokens({4})));
}

void test_tokens_that_cannot_be_read_are_refused() {
  GradientCache cache(1 << 20);
  const at::Tensor meta = at::zeros({2}, at::TensorOptions(at::kLong).device(at::kMeta));
  const std::vector<at::Tensor> all{at::Tensor(), at::zeros({2}), at::zeros({1, 2}, at::kLong), meta,
                                    tokens({1, 2}).to_sparse()};
  for (const at::Tensor& wrong : all) {
    bool refused = false;
    try {
      cache.insert_reward(wrong, 0.0);
    } catch (const c10::TypeError&) {
      refused = true;
    }
    REQUIRE(refused && count(cache, "entries") == 0);
  }
}

// A tensor whose end uses the cache that held it: with the lock held then, this would never return.
void test_tensors_may_call_back() {
  GradientCache cache(size(1, 1));
  float memory[4] = {};
  int ended = 0;
  const auto insert = [&](int64_t id) {
    auto parts = values(1);
    parts[0] = at::from_blob(memory, {1, 4}, [&](void*) { ended += cache.stats().at("bytes") >= 0; }, at::kFloat);
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

// Whatever the order, what is found belongs to the tokens, and the books balance in the end.
void test_threads() {
  constexpr int64_t kKeys = 12, kThreads = 4;
  GradientCache cache(8 * size(3, 3));
  std::atomic<int64_t> finds{0}, reward_finds{0};
  const auto ids = [](int64_t key) { return tokens({key % 3, key / 3, 5}); };
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    for (int step = 0; step < 2000; ++step) {
      const auto key = static_cast<int64_t>(random() % kKeys);
      const auto start = static_cast<int64_t>(random() % 4);
      const auto reward = static_cast<double>(key);
      switch (random() % 8) {
        case 0:
        case 1:
        case 2: cache.insert(ids(key), start, values(3 - start), reward); break;
        case 3: cache.insert_reward(ids(key), reward); break;
        case 4: {
          ++reward_finds;
          const auto found = cache.find_reward(ids(key));
          REQUIRE(!found || *found == reward);
          break;
        }
        case 5:
          if (random() % 50 == 0) cache.clear();
          REQUIRE(count(cache, "bytes") <= 8 * size(3, 3));
          break;
        default: {
          ++finds;
          const auto found = cache.find(ids(key), start);
          if (!found) break;
          REQUIRE(std::get<2>(*found) == reward && std::get<0>(*found) <= start);
          REQUIRE(at::equal(std::get<1>(*found)[0], at::zeros({3 - std::get<0>(*found), 4})));
        }
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < kThreads; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();

  REQUIRE(count(cache, "hits") + count(cache, "misses") == finds);
  REQUIRE(count(cache, "reward_hits") + count(cache, "reward_misses") == reward_finds);
  REQUIRE(count(cache, "hits") > 0 && count(cache, "evictions") > 0);
  int64_t entries = 0, bytes = 0;
  for (int64_t key = 0; key < kKeys; ++key) {
    if (!cache.find_reward(ids(key))) continue;
    const auto found = cache.find(ids(key), 3);
    ++entries;
    bytes += size(3, found ? std::get<1>(*found)[0].size(0) : 0);
  }
  REQUIRE(count(cache, "entries") == entries && count(cache, "bytes") == bytes);
}

}  // namespace

int main() {
  test_find();
  test_insert_and_forget();
  test_tokens_that_cannot_be_read_are_refused();
  test_tensors_may_call_back();
  test_threads();
  std::puts("passed");
  return 0;
}
