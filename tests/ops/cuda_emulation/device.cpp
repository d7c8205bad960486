#include "device.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>

#include "races.h"

namespace nabla_fast::cuda {
namespace {

struct Copy {
  uint4* to;
  const void* from;
  bool valid;
};

struct Fiber {
  int block, thread;
  Clock clock;
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  bool begun = false;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;              // not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, not done yet
  int shuffles = 0;

  Actor actor() const { return {block, thread, clock}; }
};

struct Barrier {
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

// A counter's clock after each arrival: who waits for `target` arrivals knows what the first `target` knew, and nothing
// of those that happened to be there by chance.
struct Counter {
  std::vector<Clock> clocks;
  std::vector<std::pair<unsigned, Fiber*>> waiting;
};

// Between the blocks' shared memory, so that one does not run over into the next unseen.
constexpr int64_t kGap = 1024;

class Device {
 public:
  Device(const Launch& shape, unsigned seed, std::function<void()> kernel);
  void run();
  void enter();

  void wait_warp() { wait(warps_[global_thread() / 32], 32, false); }
  void wait_block() { wait(blocks_[current->block], shape.threads, true); }
  void wait_counter(unsigned* counter, unsigned target);
  uint64_t exchange(uint64_t word, int lane);
  char* shared(int block) { return reinterpret_cast<char*>(shared_.data()) + block * shared_stride_; }

  const Launch shape;
  Races races;
  Fiber* current = nullptr;

 private:
  size_t global_thread() const { return static_cast<size_t>(current->block) * shape.threads + current->thread; }
  void add_fiber(int block, int thread);
  void wait(Barrier& barrier, int expected, bool orders_memory);
  void draw();
  bool slow(const Fiber& fiber) const;
  void pause();
  [[noreturn]] void resume();
  bool stuck() const { return ready_[0].empty() && ready_[1].empty(); }
  void make_ready(Fiber* fiber) { ready_[slow(*fiber)].push_back(fiber); }
  void release(std::vector<Fiber*>& waiting) {
    for (Fiber* const fiber : waiting) {
      make_ready(fiber);
    }
    waiting.clear();
  }

  const std::function<void()> kernel_;
  std::mt19937 random_;
  jmp_buf scheduler_;
  const int64_t shared_stride_;
  std::vector<uint4> shared_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_[2];  // the slow ones come second
  std::vector<Barrier> warps_, blocks_;
  std::vector<std::array<uint64_t, 2>> words_;
  std::map<unsigned*, Counter> counters_;
  std::vector<int> inside_;   // threads of each block that have not left
  std::vector<Clock> exits_;  // what a block's threads knew when they left
  size_t left_;
  uint64_t draws_ = 0;
  static constexpr uint64_t kWhile = 1 << 16;
};

Device* device = nullptr;
std::string mistake;

Device::Device(const Launch& launch_shape, unsigned seed, std::function<void()> kernel)
    : shape(launch_shape),
      kernel_(std::move(kernel)),
      random_(seed),
      shared_stride_((shape.shared_bytes + 15) / 16 * 16 + kGap),
      shared_(static_cast<size_t>(shape.blocks * shared_stride_ / 16), uint4{~0u, ~0u, ~0u, ~0u}),
      warps_(shape.blocks * shape.threads / 32),
      blocks_(shape.blocks),
      words_(shape.blocks * shape.threads),
      inside_(shape.blocks, shape.threads),
      exits_(shape.blocks, Clock(shape.blocks)),
      left_(static_cast<size_t>(shape.blocks) * shape.threads) {
  for (const Memory& memory : shape.memory) {
    races.watch(memory.name, memory.begin, memory.bytes, memory.written);
  }
  races.watch("shared memory", shared(0), shape.blocks * shared_stride_, false);
  for (int block = 0; block < shape.blocks; ++block) {
    const Clock nothing(shape.blocks, 1);
    races.end({block, 0, nothing}, shared(block) + shape.shared_bytes, shared_stride_ - shape.shared_bytes);
    for (int thread = 0; thread < shape.threads; ++thread) {
      add_fiber(block, thread);
    }
  }
}

void Device::run() {
  while (left_ > 0 && races.mistake.empty()) {
    if (stuck()) {
      races.mistake = std::to_string(left_) + " threads wait for others that will not come";
      return;
    }
    draw();
    if (_setjmp(scheduler_) == 0) {
      resume();
    }
  }
}

// Does not return. A jump, unlike swapcontext, asks nothing of the operating system.
void Device::resume() {
  if (current->begun) {
    _longjmp(current->place, 1);
  }
  current->begun = true;
  setcontext(&current->context);
  std::abort();
}

// The body of every fiber.
void Device::enter() {
  kernel_();
  Fiber& self = *current;
  join(exits_[self.block], self.clock);
  if (--inside_[self.block] == 0) {
    exits_[self.block][self.block] = UINT32_MAX;
    races.end({self.block, self.thread, exits_[self.block]}, shared(self.block), shape.shared_bytes);
  }
  --left_;
  _longjmp(scheduler_, 1);
}

void Device::add_fiber(int block, int thread) {
  auto fiber = std::make_unique<Fiber>();
  fiber->block = block;
  fiber->thread = thread;
  fiber->clock.assign(shape.blocks, 0);
  constexpr size_t kStack = 64 << 10;
  fiber->stack.reset(new char[kStack]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;  // `enter` jumps away
  makecontext(&fiber->context, [] { device->enter(); }, 0);
  make_ready(fiber.get());
  fibers_.push_back(std::move(fiber));
}

void Device::wait(Barrier& barrier, int expected, bool orders_memory) {
  barrier.waiting.push_back(current);
  if (++barrier.arrived == expected) {
    if (orders_memory) {
      Clock clock(shape.blocks);
      for (const Fiber* const fiber : barrier.waiting) {
        join(clock, fiber->clock);
      }
      ++clock[current->block];
      for (Fiber* const fiber : barrier.waiting) {
        fiber->clock = clock;
      }
    }
    barrier.arrived = 0;
    release(barrier.waiting);
  }
  pause();
}

void Device::wait_counter(unsigned* address, unsigned target) {
  Counter& counter = counters_[address];
  Clock clock = counter.clocks.empty() ? Clock(shape.blocks) : counter.clocks.back();
  join(clock, current->clock);
  counter.clocks.push_back(clock);
  *address = static_cast<unsigned>(counter.clocks.size());
  counter.waiting.emplace_back(target, current);
  for (size_t i = 0; i < counter.waiting.size();) {
    const auto [wanted, fiber] = counter.waiting[i];
    if (wanted <= counter.clocks.size()) {
      if (wanted > 0) {
        join(fiber->clock, counter.clocks[wanted - 1]);
      }
      make_ready(fiber);
      counter.waiting.erase(counter.waiting.begin() + static_cast<long>(i));
    } else {
      ++i;
    }
  }
  pause();
}

// Two places per thread in turn, as one barrier per exchange asks for.
uint64_t Device::exchange(uint64_t word, int lane) {
  const int turn = current->shuffles++ % 2;
  words_[global_thread()][turn] = word;
  wait_warp();
  return words_[global_thread() / 32 * 32 + lane][turn];
}

// Which fiber goes on: one drawn at random. For a while some warps and some blocks go on only when no other can: wrong
// numbers show when somebody is far behind.
void Device::draw() {
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

bool Device::slow(const Fiber& fiber) const {
  const auto hash = [&](uint64_t who) {
    return ((who + 1) * 0x9e3779b97f4a7c15u ^ draws_ / kWhile * 0xc2b2ae3d27d4eb4fu) * 0x165667b19e3779f9u >> 40;
  };
  const uint64_t warp = static_cast<uint64_t>(fiber.block) * 32 + fiber.thread / 32;
  return hash(warp) % 3 == 0 || hash(~static_cast<uint64_t>(fiber.block)) % 3 == 0;
}

// After a mistake nobody goes on: what follows means nothing.
void Device::pause() {
  Fiber* const self = current;
  if (_setjmp(self->place) != 0) {
    return;
  }
  if (stuck() || !races.mistake.empty()) {
    _longjmp(scheduler_, 1);
  }
  draw();
  resume();
}

void heard(const void* address, int64_t bytes, bool writes) {
  if (device != nullptr && device->current != nullptr) {
    if (writes) {
      device->races.write(device->current->actor(), address, bytes);
    } else {
      device->races.read(device->current->actor(), address, bytes);
    }
  }
}

}  // namespace

int launch(const Launch& shape, std::function<void()> kernel) {
  static unsigned seed = 0;
  Device machine(shape, ++seed, std::move(kernel));
  device = &machine;
  machine.run();
  device = nullptr;
  mistake = machine.races.mistake;
  return !mistake.empty();
}

const char* last_mistake() { return mistake.c_str(); }

int thread_index() { return device->current->thread; }
int block_index() { return device->current->block; }
char* shared_memory() { return device->shared(block_index()); }
void block_sync() { device->wait_block(); }
uint64_t exchange(uint64_t word, int lane) { return device->exchange(word, lane); }

void counter_barrier(unsigned* counter, unsigned target) {
  block_sync();
  if (thread_index() == 0) {
    device->wait_counter(counter, target);
  }
  block_sync();
}

void copy_async(uint4* shared, const void* global, bool valid) {
  Fiber& self = *device->current;
  device->races.begin_copy(self.actor(), shared, sizeof(uint4));
  self.copies.push_back({shared, global, valid});
}

void commit_copies() {
  Fiber& self = *device->current;
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void finish_copies(size_t pending) {
  Fiber& self = *device->current;
  for (; self.groups.size() > pending; self.groups.pop_front()) {
    for (const Copy& copy : self.groups.front()) {
      *copy.to = {0, 0, 0, 0};
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, sizeof(uint4));
      }
      device->races.end_copy(self.actor(), copy.to, sizeof(uint4));
    }
  }
}

}  // namespace nabla_fast::cuda

// What the compiler calls before the reads and writes of the kernels.
extern "C" {

#define NABLA_FAST_HEAR(bytes)                                                                         \
  void __tsan_read##bytes(void* address) { nabla_fast::cuda::heard(address, bytes, false); }           \
  void __tsan_write##bytes(void* address) { nabla_fast::cuda::heard(address, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* address) { nabla_fast::cuda::heard(address, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* address) { nabla_fast::cuda::heard(address, bytes, true); }

NABLA_FAST_HEAR(1)
NABLA_FAST_HEAR(2)
NABLA_FAST_HEAR(4)
NABLA_FAST_HEAR(8)
NABLA_FAST_HEAR(16)

void __tsan_read_range(void* address, long bytes) { nabla_fast::cuda::heard(address, bytes, false); }
void __tsan_write_range(void* address, long bytes) { nabla_fast::cuda::heard(address, bytes, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
