// The index of everything native. Schemas, fake kernels and autograd formulas live in Python, so that the operators
// exist without this library; here only kernels are added to them, and either side may be loaded first.
#include <torch/library.h>

#include "cpu/operators.h"

TORCH_LIBRARY_IMPL(nabla_fast, CPU, m) {
  m.impl("token_diff", &nabla_fast::cpu::token_diff);
  m.impl("relaxed_stats", &nabla_fast::cpu::relaxed_stats);
}

// Read through ctypes by the environment report: plain C, because it must answer before any operator is called.
extern "C" __attribute__((visibility("default"))) const char* nabla_fast_build_info() {
  return "{\"torch\": \"" NABLA_FAST_TORCH_VERSION "\", \"compiler\": \"" NABLA_FAST_COMPILER
         "\", \"cuda_architectures\": \"" NABLA_FAST_CUDA_ARCHITECTURES "\"}";
}
