#include "gradient_cache.h"

#include <c10/util/Exception.h>

#include <iterator>
#include <utility>

namespace nabla_fast {
namespace {

// The tokens, contiguous, so that their bytes are a key.
at::Tensor checked(const at::Tensor& tokens) {
  TORCH_CHECK_TYPE(tokens.defined() && tokens.scalar_type() == at::kLong && tokens.dim() == 1 &&
                       tokens.device().is_cpu() && tokens.layout() == at::kStrided,
                   "GradientCache: tokens must be an int64 tensor of shape (n,) on the CPU");
  return tokens.contiguous();
}

std::string_view key_of(const at::Tensor& tokens) {
  return {reinterpret_cast<const char*>(tokens.const_data_ptr<int64_t>()), tokens.nbytes()};
}

}  // namespace

GradientCache::GradientCache(int64_t max_bytes) : max_bytes_(max_bytes) {}

std::optional<GradientCache::Found> GradientCache::find(const at::Tensor& tokens, int64_t start) {
  const at::Tensor ids = checked(tokens);
  const std::lock_guard lock(mutex_);
  const auto found = index_.find(key_of(ids));
  if (found == index_.end() || found->second->values.empty() || found->second->start > start) {
    ++misses_;
    return std::nullopt;
  }
  ++hits_;
  const Entry& entry = *found->second;
  touch(found->second);
  return Found{entry.start, entry.values, entry.reward};
}

std::optional<double> GradientCache::find_reward(const at::Tensor& tokens) {
  const at::Tensor ids = checked(tokens);
  const std::lock_guard lock(mutex_);
  const auto found = index_.find(key_of(ids));
  if (found == index_.end()) {
    ++reward_misses_;
    return std::nullopt;
  }
  ++reward_hits_;
  touch(found->second);
  return found->second->reward;
}

void GradientCache::insert(const at::Tensor& tokens, int64_t start, std::vector<at::Tensor> values, double reward) {
  const at::Tensor ids = checked(tokens);
  auto bytes = static_cast<int64_t>(ids.nbytes());
  for (const at::Tensor& value : values) bytes += static_cast<int64_t>(value.nbytes());
  Entries dropped;
  Entries fresh;
  fresh.push_back({std::string(key_of(ids)), start, std::move(values), reward, bytes});

  const std::lock_guard lock(mutex_);
  const auto old = index_.find(fresh.front().key);
  if (old != index_.end() && !old->second->values.empty() && old->second->start < start) {
    touch(old->second);
    return;
  }
  if (bytes > max_bytes_) return;
  if (old != index_.end()) remove(old->second, dropped);
  add(fresh, dropped);
}

void GradientCache::insert_reward(const at::Tensor& tokens, double reward) {
  const at::Tensor ids = checked(tokens);
  const auto bytes = static_cast<int64_t>(ids.nbytes());
  Entries dropped;
  const std::lock_guard lock(mutex_);
  const auto old = index_.find(key_of(ids));
  if (old != index_.end()) {
    old->second->reward = reward;
    touch(old->second);
  } else if (bytes <= max_bytes_) {
    Entries fresh;
    fresh.push_back({std::string(key_of(ids)), 0, {}, reward, bytes});
    add(fresh, dropped);
  }
}

void GradientCache::clear() {
  Entries dropped;
  const std::lock_guard lock(mutex_);
  index_.clear();
  dropped.swap(entries_);
  bytes_ = 0;
}

c10::Dict<std::string, int64_t> GradientCache::stats() {
  c10::Dict<std::string, int64_t> result;
  const std::lock_guard lock(mutex_);
  result.insert("hits", hits_);
  result.insert("misses", misses_);
  result.insert("reward_hits", reward_hits_);
  result.insert("reward_misses", reward_misses_);
  result.insert("evictions", evictions_);
  result.insert("entries", static_cast<int64_t>(entries_.size()));
  result.insert("bytes", bytes_);
  return result;
}

void GradientCache::touch(Entries::iterator entry) { entries_.splice(entries_.begin(), entries_, entry); }

// Moves the one entry of `entry`, which fits into the budget, to the front and makes room for it.
void GradientCache::add(Entries& entry, Entries& dropped) {
  index_.emplace(entry.front().key, entry.begin());
  bytes_ += entry.front().bytes;
  entries_.splice(entries_.begin(), entry);
  while (bytes_ > max_bytes_) {
    remove(std::prev(entries_.end()), dropped);
    ++evictions_;
  }
}

void GradientCache::remove(Entries::iterator entry, Entries& dropped) {
  index_.erase(entry->key);
  bytes_ -= entry->bytes;
  dropped.splice(dropped.end(), entries_, entry);
}

}  // namespace nabla_fast
