#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace modeltorch {

/// RmsNorm of rows on CUDA, with the sum before it where `other` is given: sum = x + other, y = norm(sum).
///
/// | tensor          | shape        | dtype |
/// |-----------------|--------------|-------|
/// | x, other, sum, y | [rows, size] | T    |
/// | gamma           | [size]       | T     |
struct NormRows {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t size = 0;
  const void* x = nullptr;
  const void* other = nullptr;
  const void* gamma = nullptr;
  float epsilon = 0.0f;
  void* sum = nullptr;
  void* y = nullptr;
};

/// `stream` is a cudaStream_t.
void norm_rows(const NormRows& args, void* stream);

}  // namespace modeltorch
