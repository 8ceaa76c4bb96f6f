#pragma once

#include <cstdint>
#include <vector>

#include "device/cuda_gemm.h"

namespace modeltorch {

/// The products of a linear with one or more parts on CUDA, written side by side: y = cat_i(x . w_i^T + b_i)
/// (+ residual). Parts whose weights and biases follow each other in memory are one product.
///
/// | tensor      | shape              | dtype |
/// |-------------|--------------------|-------|
/// | x           | [rows, k]          | T     |
/// | w_i         | [n_i, k], [k, n_i] | T     |
/// | b_i         | [n_i] or null      | T     |
/// | residual, y | [rows, sum n_i]    | T     |
struct LinearProducts {
  struct Part {
    const void* weight = nullptr;
    const void* bias = nullptr;
    int64_t n = 0;
    bool transposed = true;  ///< [n, k]
  };

  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t bucket_rows = 0;  ///< the most that the plan has
  int64_t k = 0;
  const void* x = nullptr;
  std::vector<Part> parts;
  const void* residual = nullptr;
  void* y = nullptr;
  void* workspace = nullptr;  ///< kCudaGemmWorkspace bytes
};

/// `stream` is a cudaStream_t.
void linear_products(CudaGemm& gemm, const LinearProducts& args, void* stream);

}  // namespace modeltorch
