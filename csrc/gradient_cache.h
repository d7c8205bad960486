// Evaluated gradients, keyed by the token ids they belong to, least recently used out first.
//
// Python knows it as torch.classes.nabla_fast.GradientCache; nabla_fast/gradient_cache.py is its face there, and says
// what the arguments mean. nabla_fast/gradient_cache_python.py does the same where this library is missing.
//
// Tokens on the CPU are hashed and compared here. Tokens on another device stay there: a look-up reads back the hash
// and one flag, a miss one number more for the nearest entry and the count of changed positions.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace nabla_fast {

class GradientCache : public torch::CustomClassHolder {
 public:
  // (start of the entry or -1, its values or none, its reward or NaN, common prefix, changed positions)
  using Found = std::tuple<int64_t, std::vector<at::Tensor>, double, int64_t, at::Tensor>;

  // hash_bits and on_device are for tests: few bits of the hash make tokens collide, on_device = true takes the path of
  // another device for tokens on the CPU as well.
  explicit GradientCache(int64_t max_bytes, int64_t hash_bits = 64, bool on_device = false);

  Found find(const at::Tensor& tokens, int64_t start);
  std::optional<double> find_reward(const at::Tensor& tokens);
  // values: hidden (m, d), embedding (m, d), reward_embedding (m, d_r), log_likelihoods (m,) float64 on the CPU.
  void insert(const at::Tensor& tokens, int64_t start, std::vector<at::Tensor> values, double reward);
  void insert_reward(const at::Tensor& tokens, double reward);
  void clear();
  c10::Dict<std::string, int64_t> stats();

 private:
  struct Entry {
    at::Tensor tokens;  // a contiguous copy that nobody else writes to
    uint64_t hash;
    int64_t start;
    std::vector<at::Tensor> values;  // empty where only the reward is known
    double reward;
    int64_t bytes;
  };
  using Entries = std::list<Entry>;
  using Place = Entries::iterator;

  bool on_host(const at::Tensor& tokens) const;
  uint64_t hash(const at::Tensor& tokens);
  bool equal(const at::Tensor& a, const at::Tensor& b) const;
  Place lookup(const at::Tensor& tokens, uint64_t hash);
  std::pair<Place, int64_t> nearest(const at::Tensor& tokens);
  std::pair<Place, int64_t> nearest_on_device(const at::Tensor& tokens);
  at::Tensor changed_positions(const at::Tensor& tokens, const at::Tensor& others) const;
  void touch(Place entry);
  void add(Entries& entry, Entries& dropped);
  void remove(Place entry, Entries& dropped);

  const int64_t max_bytes_;
  const uint64_t hash_mask_;
  const bool on_device_;

  // Guards everything below. Nothing that could call back into Python runs while it is held: a thread that waits for it
  // keeps the interpreter's lock. That is why entries leave through `dropped` and die after the lock is given back: the
  // last owner of a tensor may have Python code to run.
  std::mutex mutex_;
  Entries entries_;  // most recently used first
  std::unordered_multimap<uint64_t, Place> buckets_;
  std::unordered_map<c10::Device, at::Tensor> powers_;  // of the hash's base, per device
  int64_t bytes_ = 0;
  int64_t hits_ = 0;
  int64_t misses_ = 0;
  int64_t partial_hits_ = 0;
  int64_t reward_hits_ = 0;
  int64_t reward_misses_ = 0;
  int64_t evictions_ = 0;
};

}  // namespace nabla_fast
