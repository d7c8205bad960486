#include "checks.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <sstream>

namespace nabla_fast {
namespace {

// Bytes of storage that a dense tensor reaches into.
int64_t extent(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = tensor.storage_offset();
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

}  // namespace

bool any_double(std::initializer_list<at::Tensor> tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& x) { return x.scalar_type() == at::kDouble; });
}

std::string dtype_name(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

std::string dtype_name(const at::Tensor& tensor) { return dtype_name(tensor.scalar_type()); }

std::string Check::named(const char* argument, int64_t index) const {
  std::string text = std::string(name_) + ": " + argument;
  return index < 0 ? text : text + "[" + std::to_string(index) + "]";
}

void Check::memory(const at::Tensor& tensor, const char* argument, int64_t index) const {
  TORCH_CHECK_TYPE(tensor.defined(), named(argument, index), " must be a tensor, got none");
  TORCH_CHECK_TYPE(!tensor.is_nested(), named(argument, index), " must be a dense tensor, got a nested one");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, named(argument, index), " must be a dense tensor, got layout ",
                   tensor.layout());
  // The tensors of a tracing mode name the device of what they stand for.
  TORCH_CHECK(tensor.device().is_cpu() && tensor.key_set().has_backend(c10::BackendComponent::CPUBit),
              named(argument, index), " must be on the CPU, got a tensor on ",
              tensor.device().is_cpu() ? "no device (a fake tensor)" : tensor.device().str());
  // Sharding and off-loading wrappers empty a tensor's storage and leave its shape.
  const auto held = static_cast<int64_t>(tensor.storage().nbytes());
  TORCH_CHECK(extent(tensor) <= held, named(argument, index), " must have storage for all of its elements, which take ",
              extent(tensor), " bytes, got ", held);
}

void Check::shape(const at::Tensor& tensor, const char* argument, std::initializer_list<Size> sizes,
                  int64_t index) const {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (const Size& size : sizes) {
    fits = fits && (size.letter || tensor.size(axis) == size.size);
    ++axis;
  }
  if (fits) return;
  std::ostringstream wanted;
  for (const Size& size : sizes) {
    if (wanted.tellp() > 0) wanted << ", ";
    size.letter ? wanted << size.letter : wanted << size.size;
  }
  TORCH_CHECK(false, named(argument, index), " must have shape (", wanted.str(), sizes.size() == 1 ? ",)" : ")",
              ", got ", tensor.sizes());
}

void Check::floats(const at::Tensor& tensor, const char* argument, std::initializer_list<Size> sizes,
                   int64_t index) const {
  memory(tensor, argument, index);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   named(argument, index),
                   " must be of a float dtype (torch.float32, torch.float64, torch.bfloat16 or ",
                   "torch.float16), got ", dtype_name(tensor));
  shape(tensor, argument, sizes, index);
}

void Check::integers(const at::Tensor& tensor, const char* argument, std::initializer_list<Size> sizes) const {
  memory(tensor, argument);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, named(argument, -1), " must be int64, got ", dtype_name(tensor));
  shape(tensor, argument, sizes, -1);
}

void Check::tokens(const at::Tensor& tensor, const char* argument, int64_t rows, int64_t vocabulary) const {
  integers(tensor, argument, {rows});
  const int64_t* ids = tensor.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = ids[row * tensor.stride(0)];
    TORCH_CHECK_INDEX(token >= 0 && token < vocabulary, named(argument, -1), " must be in [0, ", vocabulary, "), got ",
                      token, " at ", row);
  }
}

void Check::table(const at::Tensor& tensor, const char* argument, Size entries, Size width, int64_t index) const {
  floats(tensor, argument, {entries, width}, index);
  TORCH_CHECK(tensor.size(0) > 0, named(argument, index), " must have at least one vocabulary entry, got shape ",
              tensor.sizes());
}

void Check::logits(const at::Tensor& z) const {
  floats(z, "z", {"N", "V"});
  TORCH_CHECK(z.size(1) > 0, name_, ": z must have at least one vocabulary entry, got shape ", z.sizes());
}

void Check::product(const at::Tensor& rows, const char* rows_argument, const at::Tensor& entries,
                    const char* table_argument) const {
  floats(rows, rows_argument, {"N", "d"});
  table(entries, table_argument, "V", rows.size(1));
}

void Check::tables(at::TensorList tables, int64_t entries) const {
  for (size_t i = 0; i < tables.size(); ++i) table(tables[i], "tables", entries, "d_k", static_cast<int64_t>(i));
}

void Check::vectors_and_tables(at::TensorList vectors, at::TensorList tables, int64_t rows, int64_t entries) const {
  TORCH_CHECK(vectors.size() == tables.size() && !tables.empty(), name_, ": vectors and tables must be as many and at ",
              "least one, got ", vectors.size(), " and ", tables.size());
  this->tables(tables, entries);
  for (size_t i = 0; i < tables.size(); ++i) {
    floats(vectors[i], "vectors", {rows, tables[i].size(1)}, static_cast<int64_t>(i));
  }
}

double Check::inverse_of(double tau) const {
  // Rows of float32 are scaled by 1 / tau in units of log2: neither may be zero or infinite.
  constexpr double kLog2OfE = 1.4426950408889634;
  TORCH_CHECK_VALUE(
      tau > 0 && std::isnormal(static_cast<float>(1 / tau)) && std::isnormal(static_cast<float>(kLog2OfE / tau)), name_,
      ": tau must be positive and finite, with 1 / tau in float32's range, got ", tau);
  return 1 / tau;
}

}  // namespace nabla_fast
