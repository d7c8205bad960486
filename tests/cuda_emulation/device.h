// A GPU on the host, slow and deterministic: every thread of a launch is a fiber, and all run in one thread of the host.
//
// It stands in for csrc/cuda/intrinsics.cuh, so that the kernels run as they are. It is stricter than a GPU where that
// finds mistakes: which fiber goes on is drawn at random, shared memory begins as NaN, asynchronous copies happen no
// earlier than they are waited for, and a barrier that not all threads reach stops the process.
#pragma once
#define NABLA_FAST_INTRINSICS

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct float2 {
  float x, y;
};

namespace nabla_fast::cuda {

using std::min;

struct Copy {
  uint4* to;
  const void* from;
  bool valid;
};

struct Fiber {
  int block, thread;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;              // not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, not done yet
  int shuffles = 0;
};

struct Barrier {
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

class Device {
 public:
  int threads = 0, cluster = 1;
  Fiber* current = nullptr;

  void run(int blocks, int threads_per_block, int cluster_size, int64_t shared_bytes, unsigned seed,
           std::function<void()> kernel) {
    threads = threads_per_block;
    cluster = cluster_size;
    kernel_ = std::move(kernel);
    random_.seed(seed);
    for (int block = 0; block < blocks; ++block) {
      shared_.emplace_back(static_cast<size_t>(shared_bytes + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u});
      for (int thread = 0; thread < threads; ++thread) {
        add_fiber(block, thread);
      }
    }
    warps_.resize(fibers_.size() / 32);
    words_.resize(fibers_.size());
    blocks_.resize(blocks);
    clusters_.resize(blocks / cluster);
    left_ = fibers_.size();
    while (left_ > 0) {
      if (stuck()) {
        std::fprintf(stderr, "emulated device: %zu threads wait for others that will not come\n", left_);
        std::abort();
      }
      draw();
      swapcontext(&scheduler_, &current->context);
    }
  }

  char* shared(int block) { return reinterpret_cast<char*>(shared_[block].data()); }

  void wait(Barrier& barrier, int expected) {
    barrier.waiting.push_back(current);
    if (++barrier.arrived == expected) {
      barrier.arrived = 0;
      release(barrier.waiting);
    }
    pause();
  }

  void wait_warp() { wait(warps_[global_thread() / 32], 32); }
  void wait_block() { wait(blocks_[current->block], threads); }
  void wait_cluster() { wait(clusters_[current->block / cluster], threads * cluster); }

  void wait_counter(unsigned* counter, unsigned target) {
    ++*counter;
    auto& waiting = counters_[counter];
    waiting.emplace_back(target, current);
    for (size_t i = 0; i < waiting.size();) {
      if (waiting[i].first <= *counter) {
        make_ready(waiting[i].second);
        waiting.erase(waiting.begin() + static_cast<long>(i));
      } else {
        ++i;
      }
    }
    pause();
  }

  // Two places per thread in turn, as one barrier per exchange asks for.
  uint64_t exchange(uint64_t word, int lane) {
    const int turn = current->shuffles++ % 2;
    words_[global_thread()][turn] = word;
    wait_warp();
    return words_[global_thread() / 32 * 32 + lane][turn];
  }

 private:
  size_t global_thread() const { return static_cast<size_t>(current->block) * threads + current->thread; }

  void add_fiber(int block, int thread) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = block;
    fiber->thread = thread;
    constexpr size_t kStack = 64 << 10;
    fiber->stack.reset(new char[kStack]);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = &scheduler_;
    makecontext(&fiber->context, &Device::enter, 0);
    make_ready(fiber.get());
    fibers_.push_back(std::move(fiber));
  }

  static void enter();

  void release(std::vector<Fiber*>& waiting) {
    for (Fiber* const fiber : waiting) {
      make_ready(fiber);
    }
    waiting.clear();
  }

  void make_ready(Fiber* fiber) { ready_[slow(*fiber)].push_back(fiber); }

  // Which fiber goes on: one drawn at random. For a while some warps and some blocks go on only when no other can: a
  // missing barrier shows when somebody is far behind.
  void draw() {
    if (++draws_ % kWhile == 0) {
      std::vector<Fiber*> all;
      all.swap(ready_[0]);
      all.insert(all.end(), ready_[1].begin(), ready_[1].end());
      ready_[1].clear();
      release(all);
    }
    auto& ready = ready_[ready_[0].empty()];
    std::swap(ready[random_() % ready.size()], ready.back());
    current = ready.back();
    ready.pop_back();
  }

  bool stuck() const { return ready_[0].empty() && ready_[1].empty(); }

  bool slow(const Fiber& fiber) const {
    const auto hash = [&](uint64_t who) {
      return ((who + 1) * 0x9e3779b97f4a7c15u ^ draws_ / kWhile * 0xc2b2ae3d27d4eb4fu) * 0x165667b19e3779f9u >> 40;
    };
    const uint64_t warp = static_cast<uint64_t>(fiber.block) * 32 + fiber.thread / 32;
    return hash(warp) % 3 == 0 || hash(~static_cast<uint64_t>(fiber.block)) % 3 == 0;
  }

  void pause() {
    Fiber* const self = current;
    if (stuck()) {
      swapcontext(&self->context, &scheduler_);
      return;
    }
    draw();
    if (current != self) {
      swapcontext(&self->context, &current->context);
    }
  }

  std::function<void()> kernel_;
  std::mt19937 random_;
  ucontext_t scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_[2];  // the slow ones come second
  std::vector<std::vector<uint4>> shared_;
  std::vector<Barrier> warps_, blocks_, clusters_;
  std::vector<std::array<uint64_t, 2>> words_;
  std::map<unsigned*, std::vector<std::pair<unsigned, Fiber*>>> counters_;
  size_t left_ = 0;
  uint64_t draws_ = 0;
  static constexpr uint64_t kWhile = 1 << 16;
};

inline Device* device = nullptr;

inline void Device::enter() {
  device->kernel_();
  --device->left_;
}

template <typename Kernel>
void launch(int blocks, int threads, int cluster, int64_t shared_bytes, unsigned seed, Kernel kernel) {
  Device machine;
  device = &machine;
  machine.run(blocks, threads, cluster, shared_bytes, seed, kernel);
  device = nullptr;
}

inline int thread_index() { return device->current->thread; }
inline int block_index() { return device->current->block; }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline void block_sync() { device->wait_block(); }
inline char* shared_memory() { return device->shared(block_index()); }

template <typename T>
T shuffle(T value, int lane) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = device->exchange(word, lane);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <typename T>
T shuffle_xor(T value, int offset) {
  return shuffle(value, lane_index() ^ offset);
}

template <typename T>
T load_shared_by_blocks(const T* address) {
  return *address;
}

inline void copy_async(uint4* shared, const void* global, bool valid) {
  device->current->copies.push_back({shared, global, valid});
}

inline void commit_copies() {
  device->current->groups.push_back(std::move(device->current->copies));
  device->current->copies.clear();
}

template <int kPending>
void wait_copies() {
  auto& groups = device->current->groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      *copy.to = {0, 0, 0, 0};
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
  }
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float float_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline void counter_barrier(unsigned* counter, unsigned target) {
  block_sync();
  if (thread_index() == 0) {
    device->wait_counter(counter, target);
  }
  block_sync();
}

inline int cluster_rank() { return block_index() % device->cluster; }
inline void cluster_sync() { device->wait_cluster(); }

template <typename T>
const T* cluster_address(T* shared, int rank) {
  const int64_t offset = reinterpret_cast<char*>(shared) - shared_memory();
  const int block = block_index() / device->cluster * device->cluster + rank;
  return reinterpret_cast<T*>(device->shared(block) + offset);
}

}  // namespace nabla_fast::cuda
