// The CUDA operators as plain C functions with raw pointers: nabla_fast/ops/cuda.py calls them through ctypes, because
// a library that serves CPU builds of torch too cannot link to torch's CUDA libraries.
//
// Every function returns a cudaError_t, launches on `stream` of device `device` and does not wait. What the operators
// mean stands in nabla_fast/ops/reference.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arguments.h"

#define NABLA_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// Whether the library holds code for the device: cudaSuccess or cudaErrorNoKernelImageForDevice, say.
NABLA_FAST_EXPORT int nabla_fast_cuda_check(int device);
NABLA_FAST_EXPORT const char* nabla_fast_cuda_error(int error);

// old, new: (rows, columns) int64, any strides (in elements); first, count: (rows) int64, contiguous.
NABLA_FAST_EXPORT int nabla_fast_cuda_token_diff(const int64_t* old_tokens, int64_t old_row, int64_t old_column,
                                                 const int64_t* new_tokens, int64_t new_row, int64_t new_column,
                                                 int64_t* first, int64_t* count, int64_t rows, int64_t columns,
                                                 int device, cudaStream_t stream);

NABLA_FAST_EXPORT int nabla_fast_cuda_plan_latents(int64_t rows, int64_t vocabulary, int64_t type, int64_t hidden,
                                                   int device, DtoPlan* plan);
NABLA_FAST_EXPORT int nabla_fast_cuda_plan_logits(int64_t rows, int64_t vocabulary, int device, DtoPlan* plan);

// rows > 0, vocabulary > 0, and the plan for exactly these sizes.
NABLA_FAST_EXPORT int nabla_fast_cuda_dto_latents(const DtoRows* rows, const DtoHead* head, const DtoPlan* plan,
                                                  int device, cudaStream_t stream);
NABLA_FAST_EXPORT int nabla_fast_cuda_dto_logits(const DtoRows* rows, const DtoPlan* plan, int device,
                                                 cudaStream_t stream);
