#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace modeltorch {

/// C = A . op(B) + bias, all row-major with the given row strides (in elements); sums in float32 or better.
struct GemmArgs {
  DType dtype = DType::kFloat32;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const void* a = nullptr;  ///< [m, k]
  int64_t a_stride = 0;
  const void* b = nullptr;  ///< [n, k] if b_transposed, else [k, n]; rows are dense
  bool b_transposed = true;
  const void* bias = nullptr;  ///< [n] or null
  void* c = nullptr;           ///< [m, n]
  int64_t c_stride = 0;
};

using GemmFunction = void (*)(const GemmArgs&);

/// Installs the library that computes big products. Called once, at load.
void set_gemm(GemmFunction function);

/// Computes `args` with the installed library, or with a plain loop where none was installed.
void gemm(const GemmArgs& args);

}  // namespace modeltorch
