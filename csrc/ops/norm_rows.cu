#include "ops/norm_rows.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "ops/cuda_kernel.cuh"
#include "ops/launch.cuh"
#include "ops/ptx.cuh"

namespace modeltorch {
namespace {

constexpr int kMostThreads = 512;

// A block a row. The sum is rounded before it is squared, as it is when two nodes compute this.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    norm_kernel(const T* x, const T* other, const T* gamma, float epsilon, int64_t size, T* sum, T* y) {
  ptx::begin_behind_the_kernel_in_front();
  const int64_t row = blockIdx.x * size;
  float squares = 0.0f;
  for (int64_t at = threadIdx.x; at < size; at += blockDim.x) {
    T value = x[row + at];
    if (other != nullptr) {
      value = from_float<T>(to_float(value) + to_float(other[row + at]));
      sum[row + at] = value;
    }
    squares += to_float(value) * to_float(value);
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(size) + epsilon);
  const T* normed = other == nullptr ? x : sum;
  for (int64_t at = threadIdx.x; at < size; at += blockDim.x) {
    y[row + at] = from_float<T>(to_float(normed[row + at]) * scale * to_float(gamma[at]));
  }
}

// The same 16 bytes at a time; a thread keeps its part of the row, and of gamma, in registers.
template <class T, int kPacks>
__global__ void __launch_bounds__(kMostThreads)
    norm_packs_kernel(const T* x, const T* other, const T* gamma, float epsilon, int64_t size, T* sum, T* y) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t row = blockIdx.x * size;
  Pack<T> held[kPacks], factors[kPacks];
  float squares = 0.0f;
  ptx::launch_dependents();
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {  // weights are there before the kernel in front has ended
    const int64_t at = (pack * blockDim.x + threadIdx.x) * kSize;
    if (at < size) factors[pack] = load_pack(gamma + at);
  }
  ptx::wait_for_dependencies();
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t at = (pack * blockDim.x + threadIdx.x) * kSize;
    if (at >= size) continue;
    held[pack] = load_pack(x + row + at);
    if (other != nullptr) {
      const Pack<T> addend = load_pack(other + row + at);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        held[pack].values[i] = from_float<T>(to_float(held[pack].values[i]) + to_float(addend.values[i]));
      store_pack(sum + row + at, held[pack]);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float value = to_float(held[pack].values[i]);
      squares += value * value;
    }
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(size) + epsilon);
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const int64_t at = (pack * blockDim.x + threadIdx.x) * kSize;
    if (at >= size) continue;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float value = to_float(held[pack].values[i]) * scale * to_float(factors[pack].values[i]);
      held[pack].values[i] = from_float<T>(value);
    }
    store_pack(y + row + at, held[pack]);
  }
}

template <class T>
void launch(const NormRows& args, cudaStream_t stream) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* other = static_cast<const T*>(args.other);
  const auto* gamma = static_cast<const T*>(args.gamma);
  auto* sum = static_cast<T*>(args.sum);
  auto* y = static_cast<T*>(args.y);
  constexpr int64_t kSize = Pack<T>::kSize;
  const auto blocks = static_cast<unsigned>(args.rows);
  const bool aligned = packs_fit<T>(args.size, x, other, gamma, sum, y);
  const int64_t packs = args.size / kSize;
  const auto with = [&](auto kernel, int64_t items) {
    const int64_t warps = divide_up(items, kWarpSize);
    const auto threads = static_cast<int>(std::min<int64_t>(warps * kWarpSize, kMostThreads));
    allow_shared_memory(kernel, 0);
    launch_kernel(kernel, {dim3(blocks), threads}, stream, "norm_rows", x, other, gamma, args.epsilon,
                  args.size, sum, y);
  };
  if (aligned && packs <= kMostThreads) {
    with(norm_packs_kernel<T, 1>, packs);
  } else if (aligned && packs <= 4 * kMostThreads) {
    with(norm_packs_kernel<T, 4>, (packs + 3) / 4);
  } else {
    with(norm_kernel<T>, args.size);
  }
}

}  // namespace

void norm_rows(const NormRows& args, void* stream) {
  if (args.rows == 0 || args.size == 0) return;
  for_type(args.dtype,
           [&](auto type) { launch<Pointee<decltype(type)>>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace modeltorch
