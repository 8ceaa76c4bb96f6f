#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

/// 16-bit floats two by two, as the tensor cores and their accumulators have them.
namespace modeltorch {

/// Two floats as two T in one register, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

/// The reverse of pack.
template <class T>
__device__ inline float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

/// 2^x of the special function unit; 2^-inf is 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Transposes four words over four neighbouring lanes: word[i] of lane j becomes word[j] of lane i. Lanes
/// that each hold two columns of every eight then hold eight columns side by side, 16 bytes.
__device__ inline void transpose_quad(uint32_t (&word)[4]) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, quad & 1 ? word[i] : word[i + 1], 1);
    (quad & 1 ? word[i] : word[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, quad & 2 ? word[i] : word[i + 2], 2);
    (quad & 2 ? word[i] : word[i + 2]) = other;
  }
}

}  // namespace modeltorch
