// The device's own vocabulary, by name. A test that runs the kernels on the host brings its own version of this file.
#ifndef NABLA_FAST_INTRINSICS
#define NABLA_FAST_INTRINSICS

#include <cooperative_groups.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nabla_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int block_index() { return blockIdx.x; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

__device__ __forceinline__ void block_sync() { __syncthreads(); }

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int offset) {
  return __shfl_xor_sync(kAllLanes, value, offset);
}

template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

// Reads from the level-two cache, which all blocks share.
template <typename T>
__device__ __forceinline__ T load_shared_by_blocks(const T* address) {
  return __ldcg(address);
}

// Starts to copy 16 bytes into shared memory; zeros where not `valid`. The copying thread alone may read them after
// wait_copies.
__device__ __forceinline__ void copy_async(uint4* shared, const void* global, bool valid) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// One instruction each, exact to about 2 units in the last place; what is too small to be a normal number becomes 0.
__device__ __forceinline__ float approximate_exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ float approximate_reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ float approximate_sqrt(float x) {
  float out;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// One arrival at a counter that only grows; returns when `target` have come. What any thread of an arriving block wrote
// before is seen after. All blocks that arrive must be resident at the same time: cooperative launches only.
__device__ __forceinline__ void counter_barrier(unsigned* counter, unsigned target) {
  block_sync();
  if (thread_index() == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < target);
    __threadfence();
  }
  block_sync();
}

}  // namespace nabla_fast::cuda

#endif
