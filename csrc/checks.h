// What every native entry verifies before it reads memory, a few comparisons per argument and call. A refusal is one
// sentence that names the operator, the argument, what would be accepted and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace nabla_fast {

// A size that an argument's shape must have, or the letter of one that it may choose.
struct Size {
  Size(int64_t size) : size(size) {}  // NOLINT: sizes are written as numbers
  Size(const char* letter) : letter(letter) {}

  const char* letter = nullptr;
  int64_t size = -1;
};

class Check {
 public:
  explicit Check(const char* name) : name_(name) {}

  // The operator's.
  const char* name() const { return name_; }

  // A dense tensor of the CPU that holds all of its memory. `index` is the argument's place in a list, -1 for none.
  void memory(const at::Tensor& tensor, const char* argument, int64_t index = -1) const;

  // float32, float64, bfloat16 or float16, of some shape.
  void floats(const at::Tensor& tensor, const char* argument, std::initializer_list<Size> shape,
              int64_t index = -1) const;

  // int64, of some shape.
  void integers(const at::Tensor& tensor, const char* argument, std::initializer_list<Size> shape) const;

  // int64 (rows,), every one in [0, vocabulary).
  void tokens(const at::Tensor& tensor, const char* argument, int64_t rows, int64_t vocabulary) const;

  // A head or table (V, d), V >= 1.
  void table(const at::Tensor& tensor, const char* argument, Size entries, Size width, int64_t index = -1) const;

  // Logits z (N, V), V >= 1.
  void logits(const at::Tensor& z) const;

  // Rows (N, d) and the table (V, d), V >= 1, that they are multiplied with.
  void product(const at::Tensor& rows, const char* rows_argument, const at::Tensor& table,
               const char* table_argument) const;

  // Tables (entries, d_k).
  void tables(at::TensorList tables, int64_t entries) const;

  // As many vectors (rows, d_k) as tables (entries, d_k), and at least one of each.
  void vectors_and_tables(at::TensorList vectors, at::TensorList tables, int64_t rows, int64_t entries) const;

  // 1 / tau.
  double inverse_of(double tau) const;

 private:
  std::string named(const char* argument, int64_t index) const;
  void shape(const at::Tensor& tensor, const char* argument, std::initializer_list<Size> sizes, int64_t index) const;

  const char* name_;
};

// Whether one of the tensors is float64; then sums are float64 too.
bool any_double(std::initializer_list<at::Tensor> tensors);

// "torch.float32"
std::string dtype_name(at::ScalarType dtype);
std::string dtype_name(const at::Tensor& tensor);

}  // namespace nabla_fast
