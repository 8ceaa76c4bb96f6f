#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>

namespace modeltorch {

/// Element types that a tensor may have at the door. Kernels exist for a subset of them; kOther stands for
/// the types that no operation takes (float64, complex, ...).
enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8, kInt32, kInt64, kBool, kOther };

/// Bytes of one element.
constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kInt64:
      return 8;
    default:
      return 1;
  }
}

/// The name that PyTorch prints, without its `torch.` prefix.
constexpr const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {
      "float32", "bfloat16", "float16", "int8", "uint8", "int32", "int64", "bool", "an unsupported type "};
  return kNames[static_cast<int>(dtype)];
}

inline std::ostream& operator<<(std::ostream& out, DType dtype) {
  return out << dtype_name(dtype);
}

}  // namespace modeltorch
