#include "ops/stage_rows.h"

#include <algorithm>

#include "ops/cuda_kernel.cuh"

namespace modeltorch {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 64;

__device__ __forceinline__ void copy_part(const StageRows::Part& part, int64_t first, int64_t step) {
  const auto* from = static_cast<const uint16_t*>(part.from);
  auto* to = static_cast<uint16_t*>(part.to);
  const int64_t count = part.padded_rows * part.padded_columns;
  for (int64_t at = first; at < count; at += step) {
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

__device__ __forceinline__ void gather_rows(const StageRows::Gather& gather, const StageRows::Part& numbers,
                                            int64_t first, int64_t step) {
  const auto* table = static_cast<const uint4*>(gather.table);
  auto* y = static_cast<uint4*>(gather.y);
  const int64_t packs = gather.row_bytes / static_cast<int64_t>(sizeof(uint4));
  const int64_t count = numbers.padded_rows * packs;
  for (int64_t at = first; at < count; at += step) {
    const int64_t row = at / packs;
    const int64_t number =
        row < numbers.rows ? static_cast<const int64_t*>(numbers.from)[row] : numbers.padding;
    const bool known = number >= 0 && number < gather.table_rows;
    if (!known && at % packs == 0) *gather.fault = 1;
    y[at] = known ? table[number * packs + at % packs] : uint4{};
  }
}

// Grid: blocks, parts and gathers.
__global__ void __launch_bounds__(kThreads) stage_kernel(const __grid_constant__ StageRows stage) {
  const int job = static_cast<int>(blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  if (job < stage.count) return copy_part(stage.parts[job], first, step);
  const StageRows::Gather& gather = stage.gathers[job - stage.count];
  gather_rows(gather, stage.parts[gather.part], first, step);
}

}  // namespace

void stage_rows(const StageRows& stage, void* stream) {
  if (stage.count == 0) return;
  int64_t largest = 0;
  for (int part = 0; part < stage.count; ++part) {
    largest = std::max(largest, stage.parts[part].padded_rows * stage.parts[part].padded_columns);
  }
  for (int index = 0; index < stage.gather_count; ++index) {
    const StageRows::Gather& gather = stage.gathers[index];
    largest = std::max(largest, stage.parts[gather.part].padded_rows * gather.row_bytes /
                                    static_cast<int64_t>(sizeof(uint4)));
  }
  const dim3 grid(blocks_for(largest, kThreads, kMostBlocks), stage.count + stage.gather_count);
  stage_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(stage);
  check_launch("stage_rows");
}

}  // namespace modeltorch
