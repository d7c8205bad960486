#include "gradient_cache.h"

#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <limits>

namespace nabla_fast {
namespace {

// Odd, so that no power of it loses bits.
constexpr uint64_t kHashBase = 0x9E3779B97F4A7C15;

// Python's dispatch modes would run Python code under the lock, and tokens have no gradient to track.
class PlainDispatch {
  c10::impl::ExcludeDispatchKeyGuard python_{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
  c10::impl::ExcludeDispatchKeyGuard autograd_{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
};

std::string dtype_name(const at::Tensor& tensor) {
  return "torch." + std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

void check_tokens(const char* method, const at::Tensor& tokens) {
  TORCH_CHECK_TYPE(tokens.scalar_type() == at::kLong, "GradientCache.", method, ": tokens must be torch.int64, got ",
                   dtype_name(tokens));
  TORCH_CHECK_VALUE(tokens.dim() == 1, "GradientCache.", method, ": tokens must have shape (n,), got ",
                    tokens.sizes());
}

void check_start(const char* method, int64_t start) {
  TORCH_CHECK_VALUE(start >= 0, "GradientCache.", method, ": start must be 0 or more, got ", start);
}

void check_values(const std::vector<at::Tensor>& values, int64_t start, int64_t length) {
  constexpr std::array names{"hidden", "embedding", "reward_embedding", "log_likelihoods"};
  TORCH_CHECK_VALUE(values.size() == names.size(), "GradientCache.insert: values must be hidden, embedding, ",
                    "reward_embedding and log_likelihoods, got ", values.size(), " tensors");
  for (size_t i = 0; i < names.size(); ++i) {
    const int64_t dim = i < 3 ? 2 : 1;
    TORCH_CHECK_VALUE(values[i].defined() && values[i].dim() == dim, "GradientCache.insert: ", names[i],
                      " must have shape ", i == 2 ? "(m, d_r)" : dim == 2 ? "(m, d)" : "(m,)", ", got ",
                      values[i].defined() ? values[i].sizes() : at::IntArrayRef());
    TORCH_CHECK_VALUE(values[i].size(0) == values[0].size(0), "GradientCache.insert: ", names[i], " must have ",
                      values[0].size(0), " rows as hidden does, got ", values[i].size(0));
  }
  TORCH_CHECK_TYPE(values[3].scalar_type() == at::kDouble,
                   "GradientCache.insert: log_likelihoods must be torch.float64, got ", dtype_name(values[3]));
  TORCH_CHECK_VALUE(values[3].device().is_cpu(), "GradientCache.insert: log_likelihoods must be on cpu, got ",
                    values[3].device());
  TORCH_CHECK_VALUE(values[0].size(0) <= length - start, "GradientCache.insert: hidden must have at most ",
                    std::max<int64_t>(0, length - start), " rows, for positions ", start, " to ", length,
                    ", got ", values[0].size(0));
}

// Spreads the polynomial and the length over all bits (the finaliser of splitmix64).
uint64_t mix(uint64_t polynomial, int64_t length) {
  uint64_t x = polynomial + kHashBase * static_cast<uint64_t>(length);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

at::Tensor to_device(const std::vector<int64_t>& values, c10::Device device) {
  return at::tensor(values, at::kLong).to(device);
}

}  // namespace

GradientCache::GradientCache(int64_t max_bytes, int64_t hash_bits, bool on_device)
    : max_bytes_(max_bytes),
      hash_mask_(hash_bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << (hash_bits & 63)) - 1),
      on_device_(on_device) {
  TORCH_CHECK_VALUE(max_bytes >= 0, "GradientCache: max_bytes must be 0 or more, got ", max_bytes);
  TORCH_CHECK_VALUE(hash_bits >= 0 && hash_bits <= 64, "GradientCache: hash_bits must be from 0 to 64, got ",
                    hash_bits);
}

GradientCache::Found GradientCache::find(const at::Tensor& tokens, int64_t start) {
  check_tokens("find", tokens);
  check_start("find", start);
  const PlainDispatch plain;
  const at::Tensor key = tokens.contiguous();
  const std::lock_guard lock(mutex_);
  const Place entry = lookup(key, hash(key));
  if (entry != entries_.end() && !entry->values.empty() && entry->start <= start) {
    Found found{entry->start, entry->values, entry->reward, key.size(0), at::empty({0}, key.options())};
    touch(entry);
    ++hits_;
    return found;
  }
  const auto [near, prefix] = nearest(key);
  at::Tensor changed =
      near == entries_.end() ? at::empty({0}, key.options()) : changed_positions(key, near->tokens);
  ++misses_;
  partial_hits_ += prefix > 0;
  return {-1, {}, std::numeric_limits<double>::quiet_NaN(), prefix, std::move(changed)};
}

std::optional<double> GradientCache::find_reward(const at::Tensor& tokens) {
  check_tokens("find_reward", tokens);
  const PlainDispatch plain;
  const at::Tensor key = tokens.contiguous();
  const std::lock_guard lock(mutex_);
  const Place entry = lookup(key, hash(key));
  if (entry == entries_.end()) {
    ++reward_misses_;
    return std::nullopt;
  }
  touch(entry);
  ++reward_hits_;
  return entry->reward;
}

void GradientCache::insert(const at::Tensor& tokens, int64_t start, std::vector<at::Tensor> values, double reward) {
  check_tokens("insert", tokens);
  check_start("insert", start);
  check_values(values, start, tokens.size(0));
  const PlainDispatch plain;
  Entries dropped;
  Entries fresh;
  fresh.push_back({tokens.clone(at::MemoryFormat::Contiguous), 0, start, std::move(values), reward, 0});
  Entry& entry = fresh.back();
  entry.bytes = static_cast<int64_t>(entry.tokens.nbytes());
  for (const at::Tensor& value : entry.values) entry.bytes += static_cast<int64_t>(value.nbytes());

  const std::lock_guard lock(mutex_);
  entry.hash = hash(entry.tokens);
  const Place old = lookup(entry.tokens, entry.hash);
  if (old != entries_.end() && !old->values.empty() && old->start < start) {
    touch(old);
    return;
  }
  if (entry.bytes > max_bytes_) return;
  if (old != entries_.end()) remove(old, dropped);
  add(fresh, dropped);
}

void GradientCache::insert_reward(const at::Tensor& tokens, double reward) {
  check_tokens("insert_reward", tokens);
  const PlainDispatch plain;
  Entries dropped;
  Entries fresh;
  fresh.push_back({tokens.clone(at::MemoryFormat::Contiguous), 0, 0, {}, reward, 0});
  Entry& entry = fresh.back();
  entry.bytes = static_cast<int64_t>(entry.tokens.nbytes());

  const std::lock_guard lock(mutex_);
  entry.hash = hash(entry.tokens);
  const Place old = lookup(entry.tokens, entry.hash);
  if (old != entries_.end()) {
    old->reward = reward;
    touch(old);
  } else if (entry.bytes <= max_bytes_) {
    add(fresh, dropped);
  }
}

void GradientCache::clear() {
  Entries dropped;
  const std::lock_guard lock(mutex_);
  buckets_.clear();
  dropped.swap(entries_);
  bytes_ = 0;
}

c10::Dict<std::string, int64_t> GradientCache::stats() {
  c10::Dict<std::string, int64_t> result;
  const std::lock_guard lock(mutex_);
  result.insert("hits", hits_);
  result.insert("misses", misses_);
  result.insert("partial_hits", partial_hits_);
  result.insert("reward_hits", reward_hits_);
  result.insert("reward_misses", reward_misses_);
  result.insert("evictions", evictions_);
  result.insert("entries", static_cast<int64_t>(entries_.size()));
  result.insert("bytes", bytes_);
  return result;
}

bool GradientCache::on_host(const at::Tensor& tokens) const { return tokens.device().is_cpu() && !on_device_; }

// mix(sum of tokens[i] * base^i modulo 2^64): the same number on every device.
uint64_t GradientCache::hash(const at::Tensor& tokens) {
  const int64_t length = tokens.size(0);
  if (on_host(tokens)) {
    const int64_t* ids = tokens.const_data_ptr<int64_t>();
    uint64_t sum = 0;
    for (int64_t i = length; i-- > 0;) sum = sum * kHashBase + static_cast<uint64_t>(ids[i]);
    return mix(sum, length) & hash_mask_;
  }
  at::Tensor& powers = powers_[tokens.device()];
  if (!powers.defined() || powers.size(0) < length) {
    std::vector<int64_t> values(static_cast<size_t>(std::max<int64_t>(1024, 2 * length)));
    uint64_t power = 1;
    for (int64_t& value : values) {
      value = static_cast<int64_t>(power);
      power *= kHashBase;
    }
    powers = to_device(values, tokens.device());
  }
  const int64_t sum = (tokens * powers.narrow(0, 0, length)).sum().item<int64_t>();
  return mix(static_cast<uint64_t>(sum), length) & hash_mask_;
}

bool GradientCache::equal(const at::Tensor& a, const at::Tensor& b) const {
  if (a.device() != b.device() || a.size(0) != b.size(0)) return false;
  if (!on_host(a)) return at::equal(a, b);
  return std::equal(a.const_data_ptr<int64_t>(), a.const_data_ptr<int64_t>() + a.size(0),
                    b.const_data_ptr<int64_t>());
}

GradientCache::Place GradientCache::lookup(const at::Tensor& tokens, uint64_t hash) {
  const auto [begin, end] = buckets_.equal_range(hash);
  const auto found =
      std::find_if(begin, end, [&](const auto& candidate) { return equal(candidate.second->tokens, tokens); });
  return found == end ? entries_.end() : found->second;
}

// The entry with factors that has most leading tokens in common, the most recently used of several, and how many.
std::pair<GradientCache::Place, int64_t> GradientCache::nearest(const at::Tensor& tokens) {
  if (!on_host(tokens)) return nearest_on_device(tokens);
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  std::pair<Place, int64_t> best{entries_.end(), -1};
  for (Place entry = entries_.begin(); entry != entries_.end(); ++entry) {
    if (entry->values.empty() || entry->tokens.device() != tokens.device()) continue;
    const int64_t* others = entry->tokens.const_data_ptr<int64_t>();
    const int64_t length = std::min(tokens.size(0), entry->tokens.size(0));
    // It must be right where the best one so far ends, which rules out most without reading them.
    if (best.second >= 0 && (length <= best.second || others[best.second] != ids[best.second])) continue;
    const int64_t prefix = std::mismatch(ids, ids + length, others).first - ids;
    if (prefix > best.second) best = {entry, prefix};
  }
  return {best.first, std::max<int64_t>(0, best.second)};
}

std::pair<GradientCache::Place, int64_t> GradientCache::nearest_on_device(const at::Tensor& tokens) {
  std::vector<Place> candidates;
  std::vector<at::Tensor> heads;
  std::vector<int64_t> lengths, offsets, ranks;
  int64_t total = 0;
  for (Place entry = entries_.begin(); entry != entries_.end(); ++entry) {
    if (entry->values.empty() || entry->tokens.device() != tokens.device()) continue;
    const int64_t length = std::min(tokens.size(0), entry->tokens.size(0));
    candidates.push_back(entry);
    heads.push_back(entry->tokens.narrow(0, 0, length));
    lengths.push_back(length);
    offsets.push_back(total);
    total += length;
  }
  if (candidates.empty()) return {entries_.end(), 0};
  const auto count = static_cast<int64_t>(candidates.size());
  for (int64_t i = 0; i < count; ++i) ranks.push_back(count - 1 - i);

  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (longest == 0) return {candidates.front(), 0};

  // One row per candidate; beyond its end it reads other tokens, which count as different.
  const c10::Device device = tokens.device();
  const at::Tensor position = at::arange(longest, tokens.options());
  const at::Tensor place = (to_device(offsets, device).unsqueeze(1) + position).clamp_max(total - 1);
  const at::Tensor differs = at::cat(heads).index({place}).ne(tokens.narrow(0, 0, longest))
                                 .logical_or_(position.ge(to_device(lengths, device).unsqueeze(1)));
  const at::Tensor prefixes = at::where(differs, position, longest).amin(1);
  // One number says both: the most recently used comes first and so has the highest rank among equals.
  const int64_t score = (prefixes * count + to_device(ranks, device)).max().item<int64_t>();
  return {candidates[static_cast<size_t>(count - 1 - score % count)], score / count};
}

at::Tensor GradientCache::changed_positions(const at::Tensor& tokens, const at::Tensor& others) const {
  const int64_t length = std::min(tokens.size(0), others.size(0));
  if (!on_host(tokens)) return tokens.narrow(0, 0, length).ne(others.narrow(0, 0, length)).nonzero().flatten();
  const int64_t* a = tokens.const_data_ptr<int64_t>();
  const int64_t* b = others.const_data_ptr<int64_t>();
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < length; ++i) {
    if (a[i] != b[i]) positions.push_back(i);
  }
  at::Tensor result = at::empty({static_cast<int64_t>(positions.size())}, tokens.options());
  std::copy(positions.begin(), positions.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

void GradientCache::touch(Place entry) { entries_.splice(entries_.begin(), entries_, entry); }

// Moves the one entry of `entry` to the front and makes room for it; it fits into the budget.
void GradientCache::add(Entries& entry, Entries& dropped) {
  buckets_.emplace(entry.front().hash, entry.begin());
  bytes_ += entry.front().bytes;
  entries_.splice(entries_.begin(), entry);
  while (bytes_ > max_bytes_) {
    remove(std::prev(entries_.end()), dropped);
    ++evictions_;
  }
}

void GradientCache::remove(Place entry, Entries& dropped) {
  const auto [begin, end] = buckets_.equal_range(entry->hash);
  buckets_.erase(std::find_if(begin, end, [&](const auto& candidate) { return candidate.second == entry; }));
  bytes_ -= entry->bytes;
  dropped.splice(dropped.end(), entries_, entry);
}

}  // namespace nabla_fast
