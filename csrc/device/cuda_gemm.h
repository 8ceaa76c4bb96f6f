#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/gemm.h"

namespace modeltorch {

/// A product for cuBLASLt: C = A . op(B) + bias + residual.
struct CudaGemmArgs : GemmArgs {
  const void* residual = nullptr;  ///< [m, n] or null
  int64_t residual_stride = 0;
  int64_t bucket_m = 0;       ///< the most rows of the plan: the algorithm is chosen for these
  void* workspace = nullptr;  ///< kCudaGemmWorkspace bytes
};

inline constexpr size_t kCudaGemmWorkspace = size_t{32} << 20;

/// cuBLASLt on one device. Algorithms are chosen once for each shape; float32 is never computed in tf32.
class CudaGemm {
 public:
  CudaGemm();
  ~CudaGemm();
  CudaGemm(const CudaGemm&) = delete;
  CudaGemm& operator=(const CudaGemm&) = delete;

  /// Launches the product on `stream` (a cudaStream_t). Returns false where the library has no algorithm for
  /// it, having launched nothing.
  bool run(const CudaGemmArgs& args, void* stream);

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace modeltorch
