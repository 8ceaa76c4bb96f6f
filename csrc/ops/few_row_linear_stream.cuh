#pragma once

// few_row_linear on Hopper for up to eight rows of any length: x comes through the ring beside the weights,
// or lies in shared memory as a whole. Eight warps share out the units, the tokens and the columns of a
// stage, and add their sums up through shared memory in a fixed order at the end of a tile.

#include "ops/few_row_linear_ring.cuh"

namespace modeltorch {

/// How the eight warps share a tile of [16 * kMI * kWM rows of weights, 8 * kNI * kWN tokens].
template <int kMIv, int kNIv, int kWMv, int kWNv, bool kResidentv>
struct StreamShape {
  static constexpr int kMI = kMIv, kNI = kNIv, kWM = kWMv, kWN = kWNv;
  static constexpr int kWK = 8 / (kWM * kWN);
  static constexpr int kM = 16 * kMI * kWM;
  static constexpr int kN = 8 * kNI * kWN;
  static constexpr int kRedPitch = kM + 4;  // floats; writes and reads of the sums meet no bank twice
  static int red_bytes(int rows) { return kWK * rows * kRedPitch * 4; }
  static constexpr bool kResident = kResidentv;  // x lies in shared memory as a whole, normalised there
};

#if MODELTORCH_PTX_HOPPER

namespace stream {

/// Copies gamma to shared memory: before the wait, since it is cold and does not depend on anything.
template <class T>
__device__ __forceinline__ void fetch_gamma(const StreamParams& p, char* shared) {
  if (!p.gamma) return;
  const uint4* from = static_cast<const uint4*>(p.gamma);
  uint4* to = reinterpret_cast<uint4*>(shared + p.gamma_offset);
  for (int i = threadIdx.x; i < p.k / 8; i += kStreamConsumers) to[i] = __ldg(from + i);
}

/// Brings this block's slice of x to shared memory and, if there is a gamma (then the slice is all of k),
/// normalises it. Up to eight rows, so that every row has at least one warp.
template <class T>
__device__ __forceinline__ void fetch_x(const StreamParams& p, const Walk& walk, char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int row_warps = p.rows > 4 ? 1 : p.rows > 2 ? 2 : p.rows > 1 ? 4 : 8;
  const int row = warp / row_warps;
  const int step = row_warps * 32;
  const int first = (warp % row_warps) * 32 + lane;
  const int vectors = row < p.rows ? (walk.k_end - walk.k_begin) / 8 : 0;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) +
                                                     static_cast<int64_t>(row) * p.k + walk.k_begin);
  uint4* to = reinterpret_cast<uint4*>(shared + p.x_offset + row * p.x_pitch);
  // The weights beyond the end of k arrive as zeros; what they meet must be finite.
  const int length = walk.k_end - walk.k_begin;
  if (length % kStreamBox != 0 && threadIdx.x < p.rows * 8) {
    const int tail = length / kStreamBox * kStreamBox + threadIdx.x % 8 * 8;
    if (tail >= length) {
      *reinterpret_cast<uint4*>(shared + p.x_offset + threadIdx.x / 8 * p.x_pitch + tail * 2) = uint4{};
    }
  }
  constexpr int kBatch = 4;
  float squares = 0;
  for (int i = first; i < vectors; i += step * kBatch) {
    uint4 v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * step < vectors) v[j] = __ldcg(from + i + j * step);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * step >= vectors) break;
      to[i + j * step] = v[j];
      squares += ptx::sum_squares<T>(v[j]);
    }
  }
  if (p.gamma) {
    float* partial = reinterpret_cast<float*>(shared + kStreamSquaresOffset);
    for (int mask = 16; mask; mask /= 2) squares += __shfl_xor_sync(~0u, squares, mask);
    if (lane == 0) partial[warp] = squares;
    ptx::barrier_sync(1, kStreamConsumers);
    float sum = 0;
    for (int i = 0; i < row_warps; ++i) sum += partial[row * row_warps + i];
    const float factor = rsqrtf(sum / static_cast<float>(p.k) + p.epsilon);
    const uint4* gamma = reinterpret_cast<const uint4*>(shared + p.gamma_offset);
    for (int i = first; i < vectors; i += step) to[i] = ptx::scaled<T>(to[i], factor, gamma[i]);
  }
  ptx::barrier_sync(1, kStreamConsumers);
}

/// The place of a warp among the eight.
template <class Shape>
struct WarpPlace {
  int lane, k, m, n;  // k: which columns of a stage; m: first row of the tile; n: first token

  __device__ WarpPlace() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x & 31;
    k = warp % Shape::kWK;
    m = warp / Shape::kWK % Shape::kWM * (16 * Shape::kMI);
    n = warp / (Shape::kWK * Shape::kWM) * (8 * Shape::kNI);
  }
};

/// acc += this warp's columns of one stage. `w` and `x` are shared addresses of the stage's first box; `half`
/// is 16 if this lane loads the upper eight columns of a step (for w and x each).
template <class T, class Shape>
__device__ __forceinline__ void multiply_stage(const StreamParams& p, float (&acc)[Shape::kMI][Shape::kNI][4],
                                               uint32_t w, uint32_t x, const LaneRow (&w_row)[Shape::kMI],
                                               const LaneRow (&x_row)[(Shape::kNI + 1) / 2], uint32_t w_half,
                                               uint32_t x_half, int steps, int first_step, int m_tiles) {
  constexpr int kMI = Shape::kMI, kNI = Shape::kNI;
  const uint32_t box_bytes = p.swiglu ? 2 * p.box_bytes : p.box_bytes;
#pragma unroll 2
  for (int step = first_step; step < steps; step += Shape::kWK) {
    const uint32_t column = step % 4 * 32;
    const uint32_t w_box = w + step / 4 * box_bytes;
    uint32_t b[(kNI + 1) / 2][4];
#pragma unroll
    for (int j = 0; j < (kNI + 1) / 2; ++j) {
      const uint32_t from = Shape::kResident ? x + x_row[j].offset + step * 32 + x_half
                                             : x + step / 4 * p.x_box_bytes + x_row[j].offset +
                                                   ((column + x_half) ^ x_row[j].swizzle);
      if constexpr (kNI == 1) {
        uint32_t pair[2];
        ptx::load_matrix_x2(pair, from);
        b[0][0] = pair[0];
        b[0][1] = pair[1];
      } else {
        ptx::load_matrix_x4(b[j], from);
      }
    }
#pragma unroll
    for (int i = 0; i < kMI; ++i) {
      if (i >= m_tiles) break;
      uint32_t a[4];
      ptx::load_matrix_x4(a, w_box + w_row[i].offset + ((column + w_half) ^ w_row[i].swizzle));
#pragma unroll
      for (int j = 0; j < kNI; ++j)
        ptx::multiply_add<T>(acc[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

/// Stores the sums of all warps as red[k][token][row], for the tokens that exist.
template <class Shape>
__device__ __forceinline__ void store_sums(float* red, const float (&acc)[Shape::kMI][Shape::kNI][4],
                                           const WarpPlace<Shape>& warp, int tokens) {
  const int first = warp.n + warp.lane % 4 * 2;
  float* base = red + (warp.k * tokens + first) * Shape::kRedPitch + warp.m + warp.lane / 4;
#pragma unroll
  for (int j = 0; j < Shape::kNI; ++j) {
    if (first + j * 8 >= tokens) break;
    const bool both = first + j * 8 + 1 < tokens;
#pragma unroll
    for (int i = 0; i < Shape::kMI; ++i) {
      float* to = base + j * 8 * Shape::kRedPitch + i * 16;
      to[0] = acc[i][j][0];
      to[8] = acc[i][j][2];
      if (both) {
        to[Shape::kRedPitch] = acc[i][j][1];
        to[Shape::kRedPitch + 8] = acc[i][j][3];
      }
    }
  }
}

/// The sum over warps of one row of the tile and one token.
template <class Shape>
__device__ __forceinline__ float sum_warps(const float* red, int row, int token, int tokens) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < Shape::kWK; ++k) sum += red[(k * tokens + token) * Shape::kRedPitch + row];
  return sum;
}

}  // namespace stream

#endif  // MODELTORCH_PTX_HOPPER

/// Grid: cluster * groups blocks of kStreamThreads threads.
template <class T, class Shape>
__global__ void __launch_bounds__(kStreamThreads)
    few_row_linear_stream(const __grid_constant__ StreamParams p) {
#if MODELTORCH_PTX_HOPPER
  using namespace stream;
  extern __shared__ __align__(1024) char shared[];
  const int rank = p.cluster > 1 ? ptx::cluster_rank() : 0;
  const Walk walk(p, blockIdx.x / p.cluster, rank, !Shape::kResident);
  const Barriers barriers{ptx::shared_address(shared)};
  const uint32_t ring = ptx::shared_address(shared + p.ring_offset);
  const bool producer = threadIdx.x >= kStreamConsumers;

  ptx::launch_dependents();
  if (threadIdx.x == kStreamConsumers) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(barriers.full(i), 1);
      ptx::barrier_init(barriers.empty(i), 8);
    }
    ptx::barrier_init(barriers.ready(), p.cluster);
    ptx::barrier_init(barriers.done(), p.cluster);
    ptx::publish_barriers();
  }
  if (p.cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  if (producer) {
    if (threadIdx.x == kStreamConsumers) produce<Shape::kResident>(p, walk, barriers, ring);
    return;
  }

  if constexpr (Shape::kResident) fetch_gamma<T>(p, shared);
  ptx::wait_for_dependencies();
  if constexpr (Shape::kResident) fetch_x<T>(p, walk, shared);

  constexpr int kM = Shape::kM, kN = Shape::kN;
  const WarpPlace<Shape> warp;
  LaneRow x_row[(Shape::kNI + 1) / 2];
#pragma unroll
  for (int j = 0; j < (Shape::kNI + 1) / 2; ++j) {
    const int token = min(warp.n + j * 16 + warp.lane / 16 * 8 + warp.lane % 8, p.rows - 1);
    x_row[j] = LaneRow::in_box(token);
    if (Shape::kResident) x_row[j].offset = token * p.x_pitch;
  }
  const uint32_t x_half = warp.lane / 8 % 2 * 16, w_half = warp.lane / 16 * 16;
  const int sides = p.swiglu ? 2 : 1;
  float* red = reinterpret_cast<float*>(shared + p.red_offset);
  Stage stage;

  for (int tile = 0; tile < walk.tiles; ++tile) {
    const int unit = walk.first_unit(tile);
    const int units = walk.first_unit(tile + 1) - unit;
    const int tile_rows = p.swiglu ? 2 * units : units;
    const int m_tiles = min(Shape::kMI, (tile_rows - warp.m + 15) / 16);
    // One element a thread: its bias and residual travel while the sums are made.
    constexpr bool kEarly = kM * kN <= kStreamConsumers;
    const int my_unit = threadIdx.x % kM, my_token = threadIdx.x / kM;
    Extras extras;
    if (kEarly && my_unit < units && my_token < p.rows)
      extras = fetch_extras<T>(p, walk.part, unit + my_unit, my_token);

    float acc[Shape::kMI][Shape::kNI][4] = {};
    LaneRow w_row[Shape::kMI];
#pragma unroll
    for (int i = 0; i < Shape::kMI; ++i) {
      const int row = min(warp.m + i * 16 + warp.lane % 16, tile_rows - 1);
      const bool up = row >= units;
      w_row[i] = LaneRow::in_box(up ? row - units : row);
      if (up) w_row[i].offset += p.box_bytes;
    }
    for (int chunk = 0; chunk < walk.chunks; ++chunk) {
      const int column = walk.column(p, chunk);
      const int columns = min(p.chunk, walk.k_end - walk.k_begin - column);
      const uint32_t w = ring + stage.index * p.stage_bytes;
      const uint32_t x = Shape::kResident ? ptx::shared_address(shared + p.x_offset) + column * 2
                                          : w + p.chunk / kStreamBox * sides * p.box_bytes;
      ptx::barrier_wait(barriers.full(stage.index), stage.parity);
      multiply_stage<T, Shape>(p, acc, w, x, w_row, x_row, w_half, x_half, (columns + 15) / 16, warp.k,
                               m_tiles);
      __syncwarp();
      if (warp.lane == 0) ptx::barrier_arrive(barriers.empty(stage.index));
      stage.advance(p.stages);
    }

    if (tile > 0) ptx::barrier_sync(1, kStreamConsumers);  // the sums of the tile before are read
    store_sums<Shape>(red, acc, warp, p.rows);
    ptx::barrier_sync(1, kStreamConsumers);
    if (p.cluster == 1) {
#pragma unroll 4
      for (int e = threadIdx.x; e < kM * p.rows; e += kStreamConsumers) {
        const int u = e % kM, token = e / kM;
        if (u >= units) continue;
        if (!kEarly) extras = fetch_extras<T>(p, walk.part, unit + u, token);
        const float sum = sum_warps<Shape>(red, u, token, p.rows);
        const float up = p.swiglu ? sum_warps<Shape>(red, units + u, token, p.rows) : 0;
        write_element<T>(p, unit + u, token, sum, up, extras);
      }
      continue;
    }

    // The blocks of a cluster share the tokens out; each adds up the sums of all blocks in their order.
    if constexpr (Shape::kWK > 1) {
#pragma unroll 4
      for (int e = threadIdx.x; e < kM * p.rows; e += kStreamConsumers) {
        const int row = e % kM, token = e / kM;
        if (row < tile_rows) red[token * Shape::kRedPitch + row] = sum_warps<Shape>(red, row, token, p.rows);
      }
      ptx::barrier_sync(1, kStreamConsumers);
    }
    if (threadIdx.x < p.cluster) ptx::barrier_arrive_remote(barriers.ready(), threadIdx.x);
    ptx::barrier_wait_cluster(barriers.ready(), tile & 1);
    const uint32_t red_address = ptx::shared_address(red);
    for (int e = threadIdx.x; e < kM * kN / p.cluster; e += kStreamConsumers) {
      const int u = e % kM, token = e / kM * p.cluster + rank;
      if (u >= units || token >= p.rows) continue;
      extras = fetch_extras<T>(p, walk.part, unit + u, token);
      float sum = 0, up = 0;
      for (int from = 0; from < p.cluster; ++from) {
        const uint32_t address = red_address + (token * Shape::kRedPitch + u) * 4;
        sum += ptx::load_remote(address, from);
        if (p.swiglu) up += ptx::load_remote(address + units * 4, from);
      }
      write_element<T>(p, unit + u, token, sum, up, extras);
    }
    ptx::barrier_sync(1, kStreamConsumers);
    if (threadIdx.x < p.cluster) ptx::barrier_arrive_remote(barriers.done(), threadIdx.x);
    ptx::barrier_wait_cluster(barriers.done(), tile & 1);
  }
#endif
}

}  // namespace modeltorch
