#pragma once

// few_row_linear on Hopper for up to eight rows and a k that is not too long: every lane holds the elements
// of x that it multiplies in registers, straight from global memory. What is on the way from the end of the
// kernel in front to the end of this one is one load, the multiplications and one barrier. The norm costs
// nothing there: x * gamma is multiplied, and the factor of the row, from sums of squares that each warp
// makes of its columns, comes at the end.

#include "ops/few_row_linear_ring.cuh"

namespace modeltorch {

/// `kGroupsv`: groups of 32 columns of one warp, at most; k is at most 256 times as much.
template <int kGroupsv>
struct DirectShape {
  static constexpr int kGroups = kGroupsv;
  static constexpr int kMI = 2;
  static constexpr int kM = 16 * kMI;
  static constexpr int kN = 8;
  static constexpr int kWK = 8;
  static constexpr int kRedPitch = kM + 4;

  static constexpr bool kResident = true;
  static int red_bytes(int rows) { return kWK * rows * kRedPitch * 4; }
};

#if MODELTORCH_PTX_HOPPER

namespace direct {

using namespace stream;

/// x * gamma must not leave the range of the type; half floats therefore carry a power of two less.
template <class T>
inline constexpr float kRange = 1.0f;
template <>
inline constexpr float kRange<__half> = 1.0f / 32;

/// Brings this lane's elements of gamma to shared memory, where this warp reads them.
template <int kGroups>
__device__ __forceinline__ void fetch_gamma(const StreamParams& p, char* shared, int column) {
  if (!p.gamma) return;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int at = column + i * 256;
    if (lane < 4 && at < p.k) {
      *reinterpret_cast<uint4*>(shared + p.gamma_offset + at * 2) =
          __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(p.gamma) + at * 2));
    }
  }
  __syncwarp();
}

/// Loads this lane's elements of x: of token lane / 4, eight columns of each of the warp's groups.
template <class T, int kGroups>
__device__ __forceinline__ void fetch_x(const StreamParams& p, uint4 (&x)[kGroups], int column) {
  const int token = (threadIdx.x & 31) / 4;
  const T* from = static_cast<const T*>(p.x) + static_cast<int64_t>(token) * p.k + column;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const bool exists = token < p.rows && column + i * 256 < p.k;
    x[i] = exists ? __ldcg(reinterpret_cast<const uint4*>(from + i * 256)) : uint4{};
  }
}

/// x *= gamma, and this warp's sums of squares of x go to shared memory.
template <class T, int kGroups>
__device__ __forceinline__ void apply_gamma(const StreamParams& p, uint4 (&x)[kGroups], char* shared,
                                            int column) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  float squares = 0;
  auto apply = [&](uint32_t& pair, uint32_t by) {
    const float2 a = ptx::unpack<T>(pair), b = ptx::unpack<T>(by);
    squares = fmaf(a.x, a.x, fmaf(a.y, a.y, squares));
    pair = ptx::pack<T>(a.x * b.x * kRange<T>, a.y * b.y * kRange<T>);
  };
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (column + i * 256 >= p.k) break;
    const uint4 g = *reinterpret_cast<const uint4*>(shared + p.gamma_offset + (column + i * 256) * 2);
    apply(x[i].x, g.x);
    apply(x[i].y, g.y);
    apply(x[i].z, g.z);
    apply(x[i].w, g.w);
  }
  squares += __shfl_xor_sync(~0u, squares, 1);
  squares += __shfl_xor_sync(~0u, squares, 2);
  if (lane % 4 == 0) reinterpret_cast<float*>(shared + kStreamSquaresOffset)[warp * 8 + lane / 4] = squares;
}

/// The factor of the norm of row `token`.
template <class T>
__device__ __forceinline__ float norm_factor(const StreamParams& p, const char* shared, int token) {
  if (!p.gamma) return 1;
  float squares = 0;
  for (int warp = 0; warp < 8; ++warp) {
    squares += reinterpret_cast<const float*>(shared + kStreamSquaresOffset)[warp * 8 + token];
  }
  return rsqrtf(squares / static_cast<float>(p.k) + p.epsilon) / kRange<T>;
}

/// The rows of a tile that this lane reads: lane / 4 and every eighth after it.
struct LaneRows {
  LaneRow of[4];

  __device__ LaneRows(const StreamParams& p, int units, int rows) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min((threadIdx.x & 31) / 4 + i * 8, rows - 1);
      const bool up = row >= units;
      of[i] = LaneRow::in_box(up ? row - units : row);
      if (up) of[i].offset += p.box_bytes;
    }
  }
};

/// acc += one group of 32 columns. The order of the columns inside a group is the same in x and in the
/// weights, and otherwise does not matter: lane % 4 takes eight in a row.
template <class T>
__device__ __forceinline__ void multiply_group(float (&acc)[2][2][4], const char* box, uint32_t column,
                                               const LaneRows& rows, const uint4& x, bool second) {
  auto load = [&](int i) {
    return *reinterpret_cast<const uint4*>(box + rows.of[i].offset + (column ^ rows.of[i].swizzle));
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i == 1 && !second) break;
    const uint4 low = load(2 * i), high = load(2 * i + 1);
    const uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
    ptx::multiply_add<T>(acc[i][0], a, x.x, x.y);
    ptx::multiply_add<T>(acc[i][1], b, x.z, x.w);
  }
}

/// Stores this warp's sums as red[warp][token][row].
__device__ __forceinline__ void store_sums(float* red, const float (&acc)[2][2][4], int tokens, int pitch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, token = lane % 4 * 2;
  float* to = red + (warp * tokens + token) * pitch + lane / 4;
  if (token >= tokens) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    to[i * 16] = acc[i][0][0] + acc[i][1][0];
    to[i * 16 + 8] = acc[i][0][2] + acc[i][1][2];
    if (token + 1 < tokens) {
      to[pitch + i * 16] = acc[i][0][1] + acc[i][1][1];
      to[pitch + i * 16 + 8] = acc[i][0][3] + acc[i][1][3];
    }
  }
}

}  // namespace direct

#endif  // MODELTORCH_PTX_HOPPER

/// Grid: groups blocks of kStreamThreads threads. No clusters.
template <class T, class Shape>
__global__ void __launch_bounds__(kStreamThreads)
    few_row_linear_direct(const __grid_constant__ StreamParams p) {
#if MODELTORCH_PTX_HOPPER
  using namespace direct;
  constexpr int kGroups = Shape::kGroups, kM = Shape::kM;
  extern __shared__ __align__(1024) char shared[];
  ptx::launch_dependents();
  const Walk walk(p, blockIdx.x, 0, false);
  const Barriers barriers{ptx::shared_address(shared)};
  char* ring = shared + p.ring_offset;
  if (threadIdx.x == kStreamConsumers) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(barriers.full(i), 1);
      ptx::barrier_init(barriers.empty(i), 8);
    }
    ptx::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= kStreamConsumers) {
    if (threadIdx.x == kStreamConsumers) produce<true>(p, walk, barriers, ptx::shared_address(ring));
    return;
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int column = warp * 32 + lane % 4 * 8;  // this lane's first
  const int my_unit = threadIdx.x % kM, my_token = threadIdx.x / kM;
  int unit = walk.first_unit(0), units = walk.first_unit(1) - unit;
  Extras extras;
  if (my_unit < units) fetch_bias<T>(p, walk.part, unit + my_unit, extras);
  fetch_gamma<kGroups>(p, shared, column);
  ptx::wait_for_dependencies();
  uint4 x[kGroups];
  fetch_x<T>(p, x, column);
  if (my_unit < units && my_token < p.rows) fetch_residual<T>(p, unit + my_unit, my_token, extras);
  if (p.gamma) apply_gamma<T>(p, x, shared, column);

  float* red = reinterpret_cast<float*>(shared + p.red_offset);
  const int groups = (p.k + 31) / 32;
  const int groups_a_chunk = p.chunk / 256;  // of this warp
  const uint32_t box_bytes = p.swiglu ? 2 * p.box_bytes : p.box_bytes;
  Stage stage;
  for (int tile = 0; tile < walk.tiles; ++tile) {
    if (tile > 0) {
      unit = walk.first_unit(tile);
      units = walk.first_unit(tile + 1) - unit;
      extras = Extras();
      if (my_unit < units && my_token < p.rows) {
        fetch_bias<T>(p, walk.part, unit + my_unit, extras);
        fetch_residual<T>(p, unit + my_unit, my_token, extras);
      }
    }
    const int rows = p.swiglu ? 2 * units : units;
    const LaneRows lane_rows(p, units, rows);
    float acc[2][2][4] = {};
    int left = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (i * 8 >= groups) break;  // the same for all warps: every stage is waited for and given back by all
      if (left == 0) {
        ptx::barrier_wait(barriers.full(stage.index), stage.parity);
        left = groups_a_chunk;
      }
      const int group = (groups_a_chunk - left) * 8 + warp;  // in the stage
      if (i * 8 + warp < groups) {
        const char* box = ring + stage.index * p.stage_bytes + group / 2 * box_bytes;
        multiply_group<T>(acc, box, group % 2 * 64 + lane % 4 * 16, lane_rows, x[i], rows > 16);
      }
      if (--left == 0 || (i + 1) * 8 >= groups) {
        left = 0;
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(barriers.empty(stage.index));
        stage.advance(p.stages);
      }
    }
    if (tile > 0) ptx::barrier_sync(1, kStreamConsumers);  // the sums of the tile before are read
    store_sums(red, acc, p.rows, Shape::kRedPitch);
    ptx::barrier_sync(1, kStreamConsumers);
    if (my_unit >= units || my_token >= p.rows) continue;
    const float factor = norm_factor<T>(p, shared, my_token);
    float sum = 0, up = 0;
#pragma unroll
    for (int k = 0; k < Shape::kWK; ++k) {
      const float* of = red + (k * p.rows + my_token) * Shape::kRedPitch + my_unit;
      sum += of[0];
      if (p.swiglu) up += of[units];
    }
    write_element<T>(p, unit + my_unit, my_token, sum * factor, up * factor, extras);
  }
#endif
}

}  // namespace modeltorch
