#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ops/hopper.cuh"
#include "ops/pairs.cuh"
#include "ops/ptx.cuh"

/// Matrix products of many rows for Hopper. Two blocks of a cluster share the weights of a tile: each brings
/// half of them for both, and its own 128 rows. In a block one warp copies and two warpgroups multiply 64
/// rows each.
namespace modeltorch::many_rows {

/// `kWide` columns of weights; with kGated the first half of them gate, the second up, and y has half as
/// many.
template <class T_, bool kGated_, int kWide_, int kStages_>
struct Tile {
  using T = T_;
  static constexpr bool kGated = kGated_;
  static constexpr int kWide = kWide_;
  static constexpr int kStages = kStages_;
  static constexpr int kColumns = kGated ? kWide / 2 : kWide;  ///< of y
  static constexpr int kRows = 128;
  static constexpr int kDepth = 64;  ///< summands of a stage: 128 bytes
  static constexpr int kThreads = 384;
  static constexpr int kRowBytes = kRows * kDepth * 2;
  static constexpr int kHalfBytes = kWide / 2 * kDepth * 2;
  static constexpr int kStageBytes = kRowBytes + 2 * kHalfBytes;
  static constexpr int kBytes = kStages * kStageBytes + 1024;  // 1024: to align the first
  static_assert(kColumns % 32 == 0 && kHalfBytes % 1024 == 0);
};

/// A launch. Tiles are walked `band` pairs of row tiles at a time along all columns, so that the rows of a
/// band stay in L2 while the weights stream by.
struct Work {
  CUtensorMap x;
  CUtensorMap weights[2];  ///< what the first and the second block of a cluster read
  int pairs;               ///< row tiles, two by two
  int tiles;               ///< column tiles
  int band;
  int steps;  ///< of kDepth summands
  int rows, columns;
  const void* residual;
  void* y;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A pair of row tiles and a column tile.
struct Place {
  int pair, tile;
  __device__ static Place get(const Work& work, int index) {
    const int of_band = work.band * work.tiles;
    const int first = index / of_band * work.band;
    const int height = min(work.band, work.pairs - first);
    const int rest = index % of_band;
    return {first + rest % height, rest / height};
  }
};

template <class Tile>
struct Barriers {
  uint64_t full[Tile::kStages], empty[Tile::kStages];
};

/// One thread that keeps copies under way.
template <class Tile>
__device__ inline void produce(const Work& work, Barriers<Tile>& barriers, unsigned char* stages) {
  using namespace hopper;
  const int rank = cluster_rank();
  const CUtensorMap* const weight = &work.weights[rank];
  Ring ring;
  for (int index = blockIdx.x / 2; index < work.pairs * work.tiles; index += gridDim.x / 2) {
    const Place place = Place::get(work, index);
    const int row = (place.pair * 2 + rank) * Tile::kRows;
    const int column = place.tile * Tile::kColumns + (Tile::kGated ? 0 : rank * Tile::kWide / 2);
    for (int step = 0; step < work.steps; ++step) {
      uint64_t* const full = &barriers.full[ring.stage];
      unsigned char* const stage = stages + ring.stage * Tile::kStageBytes;
      barrier_wait(&barriers.empty[ring.stage], ring.parity ^ 1);
      barrier_expect(full, Tile::kStageBytes);
      copy_box(stage, &work.x, full, step * Tile::kDepth, row);
      copy_box_to_all(stage + Tile::kRowBytes + rank * Tile::kHalfBytes, weight, full, step * Tile::kDepth,
                      column, 3);
      ring.advance(Tile::kStages);
    }
  }
}

/// Starts one stage's products of a warpgroup.
template <class Tile>
__device__ inline void multiply(float (&sum)[Tile::kWide / 2], uint64_t a, uint64_t b, bool add) {
  using namespace hopper;
  wgmma_pin(sum);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < Tile::kDepth / 16; ++i) {
    wgmma<typename Tile::T>(sum, a + (i * 32 >> 4), b + (i * 32 >> 4), i > 0 || add);
  }
  wgmma_commit();
}

/// Tells both blocks of the cluster that this warp has read a stage.
template <class Tile>
__device__ inline void release(Barriers<Tile>& barriers, hopper::Ring& ring) {
  const int lane = threadIdx.x % 32;
  if (lane < 2) hopper::barrier_arrive(&barriers.empty[ring.stage], lane);
  ring.advance(Tile::kStages);
}

__device__ inline float gated(float gate, float up) {
  constexpr float kLog2E = 1.44269504088896340736f;
  return __fdividef(gate, 1.0f + exp2_fast(-kLog2E * gate)) * up;
}

/// Where a warpgroup's [64, kColumns] of y lie.
template <class T>
struct Target {
  T* y;
  const T* residual;  ///< or null
  int64_t stride;
  int rows, columns;  ///< how many of them are there
};

/// Adds the residual to the sums of rows lane / 4 + 8 * half. All loads start before the first is needed: y
/// may be the residual, so the compiler would move none over a store.
template <class Tile, class T>
__device__ inline void add_residual(float (&sum)[Tile::kWide / 2], const Target<T>& target, int row,
                                    int half) {
  constexpr int kPairs = Tile::kWide / 8;
  const int quad = threadIdx.x % 4;
  const T* const from = target.residual + row * target.stride;
  uint32_t pairs[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int column = i * 8 + quad * 2;
    pairs[i] = column < target.columns ? *reinterpret_cast<const uint32_t*>(from + column) : 0u;
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float2 value = unpack<T>(pairs[i]);
    sum[i * 4 + 2 * half] += value.x;
    sum[i * 4 + 2 * half + 1] += value.y;
  }
}

/// Two columns of one row as T.
template <class Tile>
__device__ inline uint32_t round_pair(const float (&sum)[Tile::kWide / 2], int at) {
  if constexpr (Tile::kGated) {
    constexpr int kUp = Tile::kWide / 4;
    return pack<typename Tile::T>(gated(sum[at], sum[kUp + at]), gated(sum[at + 1], sum[kUp + at + 1]));
  } else {
    return pack<typename Tile::T>(sum[at], sum[at + 1]);
  }
}

/// Writes a warpgroup's part of y; the four lanes of a row exchange columns, so that each writes 16 bytes.
template <class Tile, class T>
__device__ inline void store(float (&sum)[Tile::kWide / 2], const Target<T>& target) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * half;
    if constexpr (!Tile::kGated) {
      if (target.residual != nullptr && row < target.rows) add_residual<Tile>(sum, target, row, half);
    }
#pragma unroll
    for (int run = 0; run < Tile::kColumns / 32; ++run) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = round_pair<Tile>(sum, (run * 4 + i) * 4 + 2 * half);
      transpose_quad(word);
      const int column = run * 32 + quad * 8;
      if (row < target.rows && column < target.columns) {
        *reinterpret_cast<uint4*>(target.y + row * target.stride + column) =
            uint4{word[0], word[1], word[2], word[3]};
      }
    }
  }
}

template <class Tile>
__device__ inline Target<typename Tile::T> target_of(const Work& work, const Place& place, int row) {
  using T = typename Tile::T;
  const int column = place.tile * Tile::kColumns;
  const int64_t at = static_cast<int64_t>(row) * work.columns + column;
  const T* const residual = static_cast<const T*>(work.residual);
  return {static_cast<T*>(work.y) + at, residual == nullptr ? nullptr : residual + at, work.columns,
          work.rows - row, work.columns - column};
}

/// One of the two warpgroups that multiply.
template <class Tile>
__device__ inline void consume(const Work& work, Barriers<Tile>& barriers, const unsigned char* stages) {
  using namespace hopper;
  const int group = warpgroup() - 1;
  const uint64_t a = operand(stages + group * 64 * 128), b = operand(stages + Tile::kRowBytes);
  Ring ring, done;
  float sum[Tile::kWide / 2];
  for (int index = blockIdx.x / 2; index < work.pairs * work.tiles; index += gridDim.x / 2) {
    for (int step = 0; step < work.steps; ++step) {
      barrier_wait(&barriers.full[ring.stage], ring.parity);
      const int stage = ring.stage * (Tile::kStageBytes >> 4);
      multiply<Tile>(sum, a + stage, b + stage, step > 0);
      ring.advance(Tile::kStages);
      if (step > 0) {
        wgmma_wait<1>();
        release<Tile>(barriers, done);
      }
    }
    wgmma_wait<0>();
    wgmma_pin(sum);
    release<Tile>(barriers, done);
    const Place place = Place::get(work, index);
    const int row = (place.pair * 2 + cluster_rank()) * Tile::kRows + group * 64;
    store<Tile>(sum, target_of<Tile>(work, place, row));
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// Clusters of two blocks, which the launch asks for, go through the tiles until none is left.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) linear_kernel(const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  extern __shared__ unsigned char memory[];
  __shared__ Barriers<Tile> barriers;
  unsigned char* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(&barriers.full[stage], 1);
      barrier_init(&barriers.empty[stage], 16);  // the warps that multiply, of both blocks
    }
    barrier_init_fence();
  }
  ptx::begin_behind_the_kernel_in_front();
  cluster_wait();
  if (threadIdx.x < 128) {
    registers_give<40>();
    if (threadIdx.x == 0) produce<Tile>(work, barriers, stages);
  } else {
    registers_take<232>();
    consume<Tile>(work, barriers, stages);
  }
  __syncwarp();
  cluster_wait();  // a block must not leave while the other still writes to it
#endif
}

}  // namespace modeltorch::many_rows
