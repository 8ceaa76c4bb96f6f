#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace modeltorch {

/// A linear map of many rows on Hopper cards, with what surrounds it in a decoder layer:
///
///     y = x . weight^T [+ residual]
///     y = silu(x . gate^T) * (x . up^T)        silu(a) = a / (1 + exp(-a))
///
/// | tensor           | shape     | dtype | note                                                    |
/// |------------------|-----------|-------|---------------------------------------------------------|
/// | x                | [rows, k] | T     |                                                         |
/// | weight, gate, up | [n, k]    | T     | gate and up may be the halves of one packed [2 * n, k]  |
/// | residual         | [rows, n] | T     | may be null, and may be y; null with gate and up        |
/// | y                | [rows, n] | T     | every row of the bucket is written                      |
///
/// T is bfloat16 or float16; sums and silu are float32, and nothing is rounded before y. A row of y depends
/// on its own row of x only. docs/cuda-prefill.md has the figures beside cuBLASLt's.
struct ManyRowLinear {
  DType dtype = DType::kBFloat16;
  int64_t rows = 0;  ///< of the bucket
  int64_t k = 0;
  int64_t n = 0;
  const void* x = nullptr;
  const void* weight = nullptr;  ///< gate if there is an up
  const void* up = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
};

/// Whether many_row_linear can do this on the current device: compute capability 9.0, n and k multiples of 8,
/// tensors on 16 bytes.
bool many_row_linear_fits(const ManyRowLinear& linear);

/// The share of the card's work that goes into y, from 0 to 1: what is lost are tiles that reach over an edge
/// and processors that have nothing to do in the last round. A library that splits sums is ahead where this
/// is low.
double many_row_linear_yield(const ManyRowLinear& linear);

/// Launches on `stream`, a cudaStream_t of the current device. Throws Error if the launch fails.
void many_row_linear(const ManyRowLinear& linear, void* stream);

}  // namespace modeltorch
