#pragma once

// few_row_linear on devices before Hopper.

#include "ops/ptx.cuh"

namespace modeltorch {

/// What the simple kernel reads of a FewRowLinear; x is normalised already.
struct SimpleLinearParams {
  const void* weight[3];
  const void* bias[3];
  int part_begin[3];
  const void* x;
  const void* residual;
  void* y;
  int k, rows, units, swiglu;
};

/// One warp a unit of the output, eight rows of x at a time.
template <class T>
__global__ void __launch_bounds__(256) few_row_linear_simple(const __grid_constant__ SimpleLinearParams p) {
  const int lane = threadIdx.x % 32;
  const int unit = blockIdx.x * 8 + threadIdx.x / 32;
  if (unit >= p.units) return;
  constexpr int kRows = 8;
  const int sides = p.swiglu ? 2 : 1;
  for (int first = 0; first < p.rows; first += kRows) {
    float sums[2][kRows] = {};
    for (int side = 0; side < sides; ++side) {
      const int part = p.swiglu ? side : (unit >= p.part_begin[1]) + (unit >= p.part_begin[2]);
      const int begin = p.swiglu ? 0 : p.part_begin[part];
      const T* weight = static_cast<const T*>(p.weight[part]) + static_cast<int64_t>(unit - begin) * p.k;
      const float bias = p.bias[part] ? ptx::to_float(static_cast<const T*>(p.bias[part])[unit - begin]) : 0;
      for (int i = lane * 8; i < p.k; i += 256) {
        const uint4 w = *reinterpret_cast<const uint4*>(weight + i);
        for (int row = 0; row < kRows; ++row) {
          if (first + row >= p.rows) break;
          const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) +
                                                          static_cast<int64_t>(first + row) * p.k + i);
          const uint32_t ws[] = {w.x, w.y, w.z, w.w}, xs[] = {x.x, x.y, x.z, x.w};
          for (int j = 0; j < 4; ++j) {
            const float2 a = ptx::unpack<T>(ws[j]), b = ptx::unpack<T>(xs[j]);
            sums[side][row] += a.x * b.x + a.y * b.y;
          }
        }
      }
      for (int row = 0; row < kRows; ++row) {
        for (int mask = 16; mask; mask /= 2) sums[side][row] += __shfl_xor_sync(~0u, sums[side][row], mask);
        sums[side][row] += bias;
      }
    }
    if (lane != 0) continue;
    for (int row = 0; row < kRows && first + row < p.rows; ++row) {
      const int64_t at = static_cast<int64_t>(first + row) * p.units + unit;
      float value = sums[0][row];
      if (p.swiglu) value = value / (1.0f + __expf(-value)) * sums[1][row];
      if (p.residual) value += ptx::to_float(static_cast<const T*>(p.residual)[at]);
      static_cast<T*>(p.y)[at] = ptx::from_float<T>(value);
    }
  }
}

}  // namespace modeltorch
