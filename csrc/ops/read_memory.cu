#include "ops/read_memory.h"

#include "ops/cuda_kernel.cuh"

namespace modeltorch {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 1024;

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* data, size_t count) {
  unsigned seen = 0;
  for (size_t at = blockIdx.x * size_t{kThreads} + threadIdx.x; at < count;
       at += size_t{kThreads} * gridDim.x) {
    const uint4 words = data[at];
    seen |= words.x | words.y | words.z | words.w;
  }
  // Never true of what the caller reads; without it the compiler would leave the loads out.
  if (seen == 0x5eed5eedu) __trap();
}

}  // namespace

void read_memory(const void* data, size_t bytes, void* stream) {
  const size_t count = bytes / sizeof(uint4);
  if (count == 0) return;
  read_kernel<<<blocks_for(static_cast<int64_t>(count), kThreads, kMostBlocks), kThreads, 0,
                static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(data), count);
  check_launch("read_memory");
}

}  // namespace modeltorch
