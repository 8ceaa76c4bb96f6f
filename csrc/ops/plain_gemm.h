#pragma once

#include <cstdint>

#include "device/cuda_gemm.h"

namespace modeltorch {

/// A product on CUDA that no library has an algorithm for: one thread an element, sums in float32.
/// `stream` is a cudaStream_t.
void plain_gemm(const CudaGemmArgs& args, void* stream);

}  // namespace modeltorch
