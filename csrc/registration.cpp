// The index of everything native. Schemas, fake kernels and autograd formulas live in Python, so that the operators
// exist without this library; here only kernels are added to them, and either side may be loaded first.
#include <ATen/Version.h>
#include <torch/library.h>

#include <exception>
#include <string>

#include "cpu/operators.h"
#include "gradient_cache.h"

namespace {

#define NABLA_FAST_REGISTER(capability, name) m.impl("native_" #name, &nabla_fast::cpu::capability::name);
#define NABLA_FAST_REGISTER_DEFAULT(name, result, arguments) NABLA_FAST_REGISTER(DEFAULT, name)
#define NABLA_FAST_REGISTER_AVX2(name, result, arguments) NABLA_FAST_REGISTER(AVX2, name)
#define NABLA_FAST_REGISTER_AVX512(name, result, arguments) NABLA_FAST_REGISTER(AVX512, name)

// The list of operators stands in cpu/operators.h.
void register_cpu(torch::Library& m) {
#ifdef NABLA_FAST_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    NABLA_FAST_CPU_OPERATORS(NABLA_FAST_REGISTER_AVX512)
    return;
  }
  if (capability == "AVX2") {
    NABLA_FAST_CPU_OPERATORS(NABLA_FAST_REGISTER_AVX2)
    return;
  }
#endif
  NABLA_FAST_CPU_OPERATORS(NABLA_FAST_REGISTER_DEFAULT)
}

void register_gradient_cache(torch::Library& m) {
  using nabla_fast::GradientCache;
  m.class_<GradientCache>("GradientCache")
      .def(torch::init<int64_t>())
      .def("find", &GradientCache::find)
      .def("find_reward", &GradientCache::find_reward)
      .def("insert", &GradientCache::insert)
      .def("insert_reward", &GradientCache::insert_reward)
      .def("clear", &GradientCache::clear)
      .def("stats", &GradientCache::stats);
}

// What PyTorch has against the kernels' arguments: they are of another version than the schemas in Python. An exception
// that left the initialization of a library would end the process.
std::string& misfit() {
  static std::string text;
  return text;
}

}  // namespace

TORCH_LIBRARY_IMPL(nabla_fast, CPU, m) {
  try {
    register_cpu(m);
  } catch (const std::exception& error) {
    misfit() = error.what();
  }
}

TORCH_LIBRARY_FRAGMENT(nabla_fast, m) { register_gradient_cache(m); }

// Read through ctypes: plain C, because they must answer before any operator is called.
extern "C" __attribute__((visibility("default"))) const char* nabla_fast_misfit() { return misfit().c_str(); }

extern "C" __attribute__((visibility("default"))) const char* nabla_fast_build_info() {
  return "{\"torch\": \"" NABLA_FAST_TORCH_VERSION "\", \"compiler\": \"" NABLA_FAST_COMPILER
         "\", \"cuda_architectures\": \"" NABLA_FAST_CUDA_ARCHITECTURES "\"}";
}
