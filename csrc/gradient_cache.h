// Evaluated gradients, keyed by the token ids they belong to, least recently used out first.
//
// Python knows it as torch.classes.nabla_fast.GradientCache. nabla_fast/gradient_cache.py is its face there: it says
// what the arguments mean, checks them, and does the same in Python where this library is missing.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace nabla_fast {

class GradientCache : public torch::CustomClassHolder {
 public:
  using Found = std::tuple<int64_t, std::vector<at::Tensor>, double>;  // start of the entry, its values, its reward

  explicit GradientCache(int64_t max_bytes);

  std::optional<Found> find(const at::Tensor& tokens, int64_t start);
  std::optional<double> find_reward(const at::Tensor& tokens);
  void insert(const at::Tensor& tokens, int64_t start, std::vector<at::Tensor> values, double reward);
  void insert_reward(const at::Tensor& tokens, double reward);
  void clear();
  c10::Dict<std::string, int64_t> stats();

 private:
  struct Entry {
    std::string key;  // the bytes of the tokens
    int64_t start;
    std::vector<at::Tensor> values;  // empty where only the reward is known
    double reward;
    int64_t bytes;
  };
  using Entries = std::list<Entry>;

  void touch(Entries::iterator entry);
  void add(Entries& entry, Entries& dropped);
  void remove(Entries::iterator entry, Entries& dropped);

  const int64_t max_bytes_;

  // Guards everything below. Nothing that could call back into Python runs while it is held, since a thread that waits
  // for it may hold the interpreter's lock. That is why entries leave through `dropped` and die after the lock is given
  // back: the last owner of a tensor may have Python code to run.
  std::mutex mutex_;
  Entries entries_;                                                // most recently used first
  std::unordered_map<std::string_view, Entries::iterator> index_;  // views of the entries' own keys
  int64_t bytes_ = 0;
  int64_t hits_ = 0;
  int64_t misses_ = 0;
  int64_t reward_hits_ = 0;
  int64_t reward_misses_ = 0;
  int64_t evictions_ = 0;
};

}  // namespace nabla_fast
