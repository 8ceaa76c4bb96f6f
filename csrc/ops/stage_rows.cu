#include "ops/stage_rows.h"

#include "ops/cuda_kernel.cuh"

namespace modeltorch {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 64;

__global__ void __launch_bounds__(kThreads) stage_kernel(const StageRows stage) {
  const StageRows::Part& part = stage.parts[blockIdx.y];
  const auto* from = static_cast<const uint16_t*>(part.from);
  auto* to = static_cast<uint16_t*>(part.to);
  const int64_t count = part.padded_rows * part.padded_columns;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count; at += step) {
    const int64_t row = at / part.padded_columns;
    const int64_t column = at % part.padded_columns;
    uint16_t value = 0;
    if (row >= part.rows) {
      value = static_cast<uint16_t>(part.padding);
    } else if (column < part.columns) {
      value = from[row * part.columns + column];
    }
    to[at] = value;
  }
}

}  // namespace

void stage_rows(const StageRows& stage, void* stream) {
  if (stage.count == 0) return;
  int64_t largest = 0;
  for (int part = 0; part < stage.count; ++part) {
    const int64_t count = stage.parts[part].padded_rows * stage.parts[part].padded_columns;
    if (count > largest) largest = count;
  }
  const dim3 grid(blocks_for(largest, kThreads, kMostBlocks), stage.count);
  stage_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(stage);
  check_launch("stage_rows");
}

}  // namespace modeltorch
