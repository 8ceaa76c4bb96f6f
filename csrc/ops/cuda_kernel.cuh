#pragma once

// What the CUDA kernels of the operations share: element types, launches, sums of a warp and of a block.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "core/check.h"
#include "device/cuda.h"
#include "graph/kernel.h"

namespace modeltorch {

inline constexpr int kWarpSize = 32;

template <class T>
__device__ __forceinline__ float to_float(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(value);
  if constexpr (std::is_same_v<T, __half>) return __half2float(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

/// As many elements as one load or store of 16 bytes takes.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}

template <class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

/// The sum over a block of whole warps, in every thread. A block calls it once.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float partial[kWarpSize];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  value = warp_sum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + expf(-x));
}

/// True if rows of `count` elements that begin at these addresses can be read 16 bytes at a time.
template <class T, class... Pointers>
bool packs_fit(int64_t count, Pointers... pointers) {
  return count % Pack<T>::kSize == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline cudaStream_t stream_of(const KernelArgs& args) {
  return static_cast<cudaStream_t>(args.stream);
}

/// Throws what the last launch was refused for.
inline void check_launch(const char* kernel) {
  check_cuda(cudaGetLastError(), kernel);
}

/// Blocks for `count` items of which each takes `per_block`, at most `most`: kernels loop over the rest.
inline unsigned blocks_for(int64_t count, int64_t per_block, int64_t most = INT32_MAX) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

/// Calls `body` with a null pointer of the CUDA type of `dtype`.
template <class Body>
void for_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<__half*>(nullptr));
    default:
      fail(ErrorKind::kNotImplemented, "CUDA computes in float32, bfloat16 or float16, got ", dtype);
  }
}

template <class Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

/// The element type that a kernel computes in: that of its first output, or of its first input.
inline DType cuda_dtype(const KernelSetup& setup) {
  const DType dtype = setup.outputs.empty() ? setup.inputs[0].dtype : setup.outputs[0].dtype;
  for_type(dtype, [](auto) {});
  return dtype;
}

/// A kernel of one operation: its parameters, its session, its element type.
template <class Op>
class CudaKernel : public Kernel {
 public:
  explicit CudaKernel(const KernelSetup& setup)
      : op_(dynamic_cast<const Op&>(setup.operation)),
        session_(cuda_session(setup)),
        dtype_(cuda_dtype(setup)) {}

 protected:
  Op op_;
  CudaSession& session_;
  DType dtype_;
};

/// Registers the class `KernelOf` as Op's kernel: `const bool registered = register_cuda<Add, AddCuda>();`
template <class Op, class KernelOf>
bool register_cuda() {
  return register_kernel(
      Op::kName, DeviceType::kCuda,
      [](const KernelSetup& setup) -> std::unique_ptr<Kernel> { return std::make_unique<KernelOf>(setup); });
}

}  // namespace modeltorch
