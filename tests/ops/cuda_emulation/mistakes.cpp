// Small kernels with one mistake each, to show that the emulated device finds it, and the same without the mistake.
#include <string>

#include "device.h"

using namespace nabla_fast::cuda;

namespace {

constexpr int kBlocks = 3, kThreads = 64;

int global[kBlocks * kThreads];
unsigned counter;
int sink;  // so that no read is left out
uint4 source;

int neighbour() { return (thread_index() + 1) % kThreads; }
int* slots() { return reinterpret_cast<int*>(shared_memory()); }

// Every thread tells its neighbour a number, twice.
void tell(bool barrier_before_read, bool barrier_before_write) {
  for (int round = 0; round < 2; ++round) {
    slots()[thread_index()] = round;
    if (barrier_before_read) {
      block_sync();
    }
    sink += slots()[neighbour()];
    if (barrier_before_write) {
      block_sync();
    }
  }
}

void tell_by_shuffle() {
  slots()[thread_index()] = 1;
  shuffle(0, 0);
  sink += slots()[thread_index() ^ 1];
}

// Every block tells all others a number.
void tell_blocks(unsigned arrivals) {
  if (thread_index() == 0) {
    global[block_index()] = 1;
  }
  counter_barrier(&counter, arrivals);
  for (int block = 0; block < kBlocks; ++block) {
    sink += load_shared_by_blocks(global + block);
  }
}

void copy(bool wait_before_read) {
  uint4* const to = reinterpret_cast<uint4*>(shared_memory()) + thread_index() % 16;
  if (thread_index() < 16) {
    copy_async(to, &source, true);
    commit_copies();
    if (wait_before_read) {
      wait_copies<0>();
    }
    sink += static_cast<int>(to->x);
  }
}

void copy_over(bool barrier) {
  uint4* const to = reinterpret_cast<uint4*>(shared_memory());
  slots()[thread_index()] = 1;
  sink += slots()[thread_index()];
  if (barrier) {
    block_sync();
  }
  if (thread_index() == 0) {
    for (int i = 0; i < 16; ++i) {
      copy_async(to + i, &source, true);
    }
    commit_copies();
    wait_copies<0>();
  }
}

void meet(bool all) {
  if (all || thread_index() > 0) {
    block_sync();
  }
}

void read_slot(int i, bool write_first) {
  if (write_first) {
    slots()[i * kThreads + thread_index()] = 1;
  }
  sink += slots()[i * kThreads + thread_index()];
}

}  // namespace

// What the device says of one of them; empty if it finds nothing wrong.
extern "C" const char* nabla_fast_test_mistake(const char* name, bool mistaken) {
  const std::string kind = name;
  std::function<void()> kernel;
  if (kind == "no barrier before a read") {
    kernel = [&] { tell(!mistaken, true); };
  } else if (kind == "no barrier before a write") {
    kernel = [&] { tell(true, !mistaken); };
  } else if (kind == "a shuffle for a barrier") {
    kernel = [&] { mistaken ? tell_by_shuffle() : tell(true, true); };
  } else if (kind == "one block too few") {
    kernel = [&] { tell_blocks(mistaken ? kBlocks - 1 : kBlocks); };
  } else if (kind == "one block too many") {
    kernel = [&] { tell_blocks(mistaken ? kBlocks + 1 : kBlocks); };
  } else if (kind == "a copy not waited for") {
    kernel = [&] { copy(!mistaken); };
  } else if (kind == "a copy over what is read") {
    kernel = [&] { copy_over(!mistaken); };
  } else if (kind == "a thread misses the barrier") {
    kernel = [&] { meet(!mistaken); };
  } else if (kind == "memory that nobody wrote") {
    kernel = [&] { read_slot(0, !mistaken); };
  } else if (kind == "memory past the end") {
    kernel = [&] { read_slot(mistaken ? 1 : 0, true); };
  } else {
    return "no such kernel";
  }
  counter = 0;
  const Memory memory{"global memory", global, sizeof(global), false};
  launch({kBlocks, kThreads, kThreads * sizeof(int), {memory}}, kernel);
  return last_mistake();
}
