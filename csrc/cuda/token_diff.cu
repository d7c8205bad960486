#include "launch.cuh"
#include "launchers.h"
#include "token_diff.cuh"

using namespace nabla_fast::cuda;

int nabla_fast_cuda_check(int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, token_diff_kernel);
  }
  cudaGetLastError();  // an answer, not a failure that the next launch should report
  return error;
}

const char* nabla_fast_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int nabla_fast_cuda_token_diff(const int64_t* old_tokens, int64_t old_row, int64_t old_column,
                               const int64_t* new_tokens, int64_t new_row, int64_t new_column, int64_t* first,
                               int64_t* count, int64_t rows, int64_t columns, int device, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  NABLA_FAST_TRY(cudaSetDevice(device));
  const Tokens before{old_tokens, old_row, old_column}, after{new_tokens, new_row, new_column};
  constexpr size_t kShared = 2 * sizeof(long long) * (kDiffThreads / 32);
  token_diff_kernel<<<static_cast<unsigned>(rows), kDiffThreads, kShared, stream>>>(before, after, first, count,
                                                                                    columns);
  return cudaGetLastError();
}
