#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace modeltorch {

/// SwiGLU of rows on CUDA: y[r, c] = silu(x[r, c]) * x[r, size + c] (+ residual[r, c]).
///
/// | tensor      | shape            | dtype |
/// |-------------|------------------|-------|
/// | x           | [rows, 2 * size] | T     |
/// | residual, y | [rows, size]     | T     |
///
/// residual may be null. `stream` is a cudaStream_t.
void swiglu_rows(DType dtype, const void* x, const void* residual, int64_t rows, int64_t size, void* y,
                 void* stream);

}  // namespace modeltorch
