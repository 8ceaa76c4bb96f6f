#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>

namespace modeltorch {

/// Element types that a tensor may have at the door. Kernels exist for a subset of them; kOther stands for
/// the types that have no name here.
enum class DType : uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt8,
  kUInt8,
  kInt32,
  kInt64,
  kBool,
  kInt16,
  kFloat64,
  kComplex64,
  kComplex128,
  kOther,
};

/// Bytes of one element; 0 for kOther.
constexpr size_t dtype_size(DType dtype) {
  constexpr size_t kSizes[] = {4, 2, 2, 1, 1, 4, 8, 1, 2, 8, 8, 16, 0};
  return kSizes[static_cast<int>(dtype)];
}

/// The name that PyTorch prints, without its `torch.` prefix.
constexpr const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32",   "bfloat16",   "float16",      "int8",  "uint8",
                                    "int32",     "int64",      "bool",         "int16", "float64",
                                    "complex64", "complex128", "another dtype"};
  return kNames[static_cast<int>(dtype)];
}

inline std::ostream& operator<<(std::ostream& out, DType dtype) {
  return out << dtype_name(dtype);
}

}  // namespace modeltorch
