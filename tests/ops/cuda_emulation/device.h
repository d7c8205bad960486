// A GPU on the host: every thread of a launch is a fiber, and all run in one thread of the host.
//
// It stands in for csrc/cuda/intrinsics.cuh, so that the kernels run as they are. It is stricter than a GPU where that
// finds mistakes: which fiber goes on is drawn at random, shared memory and scratch may not be read before they are
// written, asynchronous copies happen no earlier than they are waited for, and a launch fails if a barrier is not
// reached by all its threads or if two threads touch the same memory without a barrier between them (races.h).
//
// The kernels must be compiled with -fsanitize=thread, so that device.cpp hears of every read and write; nothing of
// this file is linked to the sanitizer's own library.
#pragma once
#define NABLA_FAST_INTRINSICS

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
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

// Global memory in which threads may meet.
struct Memory {
  const char* name;
  const void* begin;
  int64_t bytes;
  bool written;  // before the launch; otherwise nothing may be read that the kernel did not write
};

struct Launch {
  int blocks, threads, cluster;
  int64_t shared_bytes;
  std::vector<Memory> memory;
};

// 0, or 1 if the kernel did what it must not; `last_mistake` says what.
int launch(const Launch& shape, std::function<void()> kernel);
const char* last_mistake();

int thread_index();
int block_index();
int cluster_rank();
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
char* shared_memory();
char* shared_memory(int rank);  // of another block of the cluster

void block_sync();
void cluster_sync();
void counter_barrier(unsigned* counter, unsigned target);

uint64_t exchange(uint64_t word, int lane);

template <typename T>
T shuffle(T value, int lane) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = exchange(word, lane);
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

template <typename T>
const T* cluster_address(T* shared, int rank) {
  return reinterpret_cast<T*>(shared_memory(rank) + (reinterpret_cast<char*>(shared) - shared_memory()));
}

void copy_async(uint4* shared, const void* global, bool valid);
void commit_copies();
void finish_copies(size_t pending);

template <int kPending>
void wait_copies() {
  finish_copies(kPending);
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

}  // namespace nabla_fast::cuda
