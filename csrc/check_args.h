// Tensors that arrive in an operator: the dtypes we know, and one wording for every error.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>

#include "table.h"

namespace fca {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Surfaces in Python as RuntimeError with exactly this text (no file, no line).
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline DType floating_dtype(const Tensor& tensor, const char* name, int64_t index = -1) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::F64;
    case ScalarType::Float:
      return DType::F32;
    case ScalarType::BFloat16:
      return DType::BF16;
    case ScalarType::Half:
      return DType::F16;
    default:
      break;
  }
  if (index >= 0) fail(name, "[", index, "] must be float64, float32, bfloat16 or float16");
  fail(name, " must be float64, float32, bfloat16 or float16");
}

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return "float64";
    case DType::F32:
      return "float32";
    case DType::BF16:
      return "bfloat16";
    default:
      return "float16";
  }
}

// A float64 or int64 or bool buffer whose layout is a contract between Python and this file's caller.
inline void check_buffer(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name) {
  check(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  check(tensor.numel() == numel, name, " must hold ", numel, " elements, got ", tensor.numel());
  check(tensor.is_contiguous(), name, " must be contiguous");
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fca
