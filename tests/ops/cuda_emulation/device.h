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
  int blocks, threads;
  int64_t shared_bytes;
  std::vector<Memory> memory;
};

// 0, or 1 if the kernel did what it must not; `last_mistake` says what.
int launch(const Launch& shape, std::function<void()> kernel);
const char* last_mistake();

int thread_index();
int block_index();
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
char* shared_memory();

void block_sync();
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

void copy_async(uint4* shared, const void* global, bool valid);
void commit_copies();
void finish_copies(size_t pending);

template <int kPending>
void wait_copies() {
  finish_copies(kPending);
}

// Off by what a GPU may be off, up or down as the argument's bits have it, and 0 in place of the smallest numbers.
inline float approximately(float argument, double exact) {
  uint32_t bits;
  std::memcpy(&bits, &argument, 4);
  const float value =
      static_cast<float>(exact * (1 + ((bits * 2654435761u >> 16) % 2 ? 1 : -1) * std::ldexp(1.0, -22)));
  return std::fabs(value) < 1.17549435e-38f ? 0.0f : value;
}

inline float approximate_exp2(float x) { return approximately(x, std::exp2(static_cast<double>(x))); }
inline float approximate_reciprocal(float x) { return approximately(x, 1 / static_cast<double>(x)); }
inline float approximate_sqrt(float x) {
  return std::fabs(x) < 1.17549435e-38f ? 0.0f : approximately(x, std::sqrt(static_cast<double>(x)));
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
