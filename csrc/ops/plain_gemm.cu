#include "ops/plain_gemm.h"

#include "ops/cuda_kernel.cuh"

namespace modeltorch {
namespace {

constexpr int kTile = 16;

template <class T>
__global__ void __launch_bounds__(kTile* kTile) gemm_kernel(const CudaGemmArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile + threadIdx.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  if (row >= args.m || column >= args.n) return;
  const T* a = static_cast<const T*>(args.a) + row * args.a_stride;
  const T* b = static_cast<const T*>(args.b) + (args.b_transposed ? column * args.k : column);
  const int64_t step = args.b_transposed ? 1 : args.n;
  float sum = 0.0f;
  for (int64_t at = 0; at < args.k; ++at) sum += to_float(a[at]) * to_float(b[at * step]);
  if (args.bias != nullptr) sum += to_float(static_cast<const T*>(args.bias)[column]);
  if (args.residual != nullptr)
    sum += to_float(static_cast<const T*>(args.residual)[row * args.residual_stride + column]);
  static_cast<T*>(args.c)[row * args.c_stride + column] = from_float<T>(sum);
}

}  // namespace

void plain_gemm(const CudaGemmArgs& args, void* stream) {
  if (args.m == 0 || args.n == 0) return;
  constexpr int64_t kMostRows = int64_t{65535} * kTile;
  check(args.m <= kMostRows, "a product of ", args.m, " rows is too large, the most is ", kMostRows);
  const dim3 grid(blocks_for(args.n, kTile), blocks_for(args.m, kTile));
  for_type(args.dtype, [&](auto type) {
    gemm_kernel<Pointee<decltype(type)>>
        <<<grid, dim3(kTile, kTile), 0, static_cast<cudaStream_t>(stream)>>>(args);
    check_launch("plain_gemm");
  });
}

}  // namespace modeltorch
