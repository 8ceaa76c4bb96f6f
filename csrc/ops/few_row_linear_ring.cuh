#pragma once

// What the two kernels of few_row_linear on Hopper share: the launch's parameters, the walk over tiles and
// chunks, and the thread that fills the ring of stages in shared memory.
//
// A cluster of blocks owns a range of units (rows of the weights; with swiglu pairs of rows) and each of its
// blocks a slice of k, so that every multiprocessor streams the same number of bytes and nothing is summed
// through global memory. One thread of a block only issues copies of boxes of the weights; it starts before
// the kernels in front are done, because weights do not depend on them.

#include <cuda.h>

#include <climits>

#include "ops/ptx.cuh"

namespace modeltorch {

inline constexpr int kStreamConsumers = 256;  // threads that multiply
inline constexpr int kStreamThreads = kStreamConsumers + 32;
inline constexpr int kStreamBox = 64;  // columns of one copy: 128 bytes, the widest swizzle
inline constexpr int kStreamMaxStages = 16;
inline constexpr int kStreamSquaresOffset = 512;  // sums of squares of each warp and row, behind the barriers
inline constexpr int kStreamHeaderBytes = kStreamSquaresOffset + 8 * 8 * 4;

/// What a launch fixes. Offsets are bytes of shared memory from its start.
struct StreamParams {
  CUtensorMap weight[3];  // of each part, boxes of [tile_units, kStreamBox]; swiglu: gate, up
  CUtensorMap x_map;      // boxes of [rows, kStreamBox]
  const void* bias[3];
  int part_begin[3];   // first unit of a part; INT_MAX where there is none
  int group_begin[3];  // first cluster of a part; INT_MAX where there is none
  const void* x;
  const void* gamma;
  const void* residual;
  void* y;
  float epsilon;
  int k, rows, units, swiglu;
  int cluster, groups;                 // blocks of a cluster, clusters
  int tile_units;                      // most units of a tile
  int slice;                           // columns of k of one block of the cluster, a multiple of kStreamBox
  int chunk;                           // columns of a stage, a multiple of kStreamBox
  int stages, stage_bytes, box_bytes;  // box_bytes: of one side's weights in a stage, one box
  int x_box_bytes;                     // of x in a stage, one box
  int x_pitch;                         // of a row of the resident x
  int red_offset, x_offset, gamma_offset, ring_offset;
};

#if MODELTORCH_PTX_HOPPER

namespace stream {

/// The tiles of one cluster and the chunks of one block: what both sides of the ring walk. No cluster has
/// units of two parts.
struct Walk {
  int part, begin, count, tiles;  // units of the cluster, tiles
  int k_begin, k_end, chunks;     // columns of the block
  int first_chunk;                // where its walk over them begins

  /// `rotate`: each cluster begins elsewhere, so that not all of them read the same part of x at once.
  __device__ Walk(const StreamParams& p, int group, int rank, bool rotate) {
    part = (group >= p.group_begin[1]) + (group >= p.group_begin[2]);
    const int first = pick(p.part_begin, part),
              end = part < 2 ? min(p.units, p.part_begin[part + 1]) : p.units;
    const int first_group = pick(p.group_begin, part);
    const int groups = (part < 2 ? min(p.groups, p.group_begin[part + 1]) : p.groups) - first_group;
    const uint32_t units = end - first;
    group -= first_group;
    begin = first + static_cast<int>(units * group / groups);
    count = first + static_cast<int>(units * (group + 1) / groups) - begin;
    tiles = (count + p.tile_units - 1) / p.tile_units;
    k_begin = min(p.k, rank * p.slice);
    k_end = min(p.k, k_begin + p.slice);
    chunks = (k_end - k_begin + p.chunk - 1) / p.chunk;
    first_chunk = rotate && chunks > 1 ? (begin / p.tile_units) % chunks : 0;
  }

  /// The first column, from k_begin, of the chunk that comes at place `at` of the walk.
  __device__ int column(const StreamParams& p, int at) const {
    at += first_chunk;
    return (at >= chunks ? at - chunks : at) * p.chunk;
  }

  __device__ static int pick(const int (&begin)[3], int part) {
    return part == 0 ? begin[0] : part == 1 ? begin[1] : begin[2];
  }

  __device__ int first_unit(int tile) const {
    return begin + static_cast<int>(static_cast<uint32_t>(count) * tile / tiles);
  }
};

/// A place in the ring.
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

struct Barriers {
  uint32_t base;

  __device__ uint32_t full(int stage) const { return base + stage * 8; }
  __device__ uint32_t empty(int stage) const { return base + (kStreamMaxStages + stage) * 8; }
  __device__ uint32_t ready() const {
    return base + 2 * kStreamMaxStages * 8;
  }  // sums of a cluster are written
  __device__ uint32_t done() const { return ready() + 8; }  // and read
};

/// The thread that fills the ring. A stage holds the boxes of the first side (with swiglu: of gate), those of
/// up, and those of x.
template <bool kResident>
__device__ __forceinline__ void produce(const StreamParams& p, const Walk& walk, Barriers barriers,
                                        uint32_t ring) {
  const uint64_t once = ptx::evict_first_policy(), often = ptx::evict_normal_policy();
  const int total = walk.tiles * walk.chunks;
  const int sides = p.swiglu ? 2 : 1;
  const int part_begin = Walk::pick(p.part_begin, walk.part);
  const CUtensorMap* map = &p.weight[walk.part];
  const int box_rows = sides * p.tile_units + (kResident ? 0 : p.rows);

  auto load_weights = [&](int tile, int chunk, int stage) {
    const int column = walk.k_begin + walk.column(p, chunk);
    const int boxes = (min(p.chunk, walk.k_end - column) + kStreamBox - 1) / kStreamBox;
    const int row = walk.first_unit(tile) - part_begin;
    ptx::barrier_expect(barriers.full(stage), boxes * box_rows * kStreamBox * 2);
    uint32_t to = ring + stage * p.stage_bytes;
    for (int box = 0; box < boxes; ++box, to += sides * p.box_bytes) {
      ptx::tensor_copy(to, map, column + box * kStreamBox, row, barriers.full(stage), once);
      if (sides == 2) {
        ptx::tensor_copy(to + p.box_bytes, &p.weight[1], column + box * kStreamBox, row, barriers.full(stage),
                         once);
      }
    }
  };
  auto load_x = [&](int chunk, int stage) {
    const int column = walk.k_begin + walk.column(p, chunk);
    const int boxes = (min(p.chunk, walk.k_end - column) + kStreamBox - 1) / kStreamBox;
    const uint32_t to = ring + stage * p.stage_bytes + p.chunk / kStreamBox * sides * p.box_bytes;
    for (int box = 0; box < boxes; ++box) {
      ptx::tensor_copy(to + box * p.x_box_bytes, &p.x_map, column + box * kStreamBox, 0, barriers.full(stage),
                       often);
    }
  };

  const int first = min(total, p.stages);
  int tile = 0, chunk = 0;
  auto advance = [&] {
    if (++chunk == walk.chunks) {
      chunk = 0;
      ++tile;
    }
  };
  for (int item = 0; item < first; ++item, advance()) load_weights(tile, chunk, item);
  if constexpr (!kResident) {
    ptx::wait_for_dependencies();
    for (int item = 0; item < first; ++item) load_x(item % walk.chunks, item);
  }
  Stage stage;
  for (int item = first; item < total; ++item, advance()) {
    ptx::barrier_wait(barriers.empty(stage.index), stage.parity);
    load_weights(tile, chunk, stage.index);
    if constexpr (!kResident) load_x(chunk, stage.index);
    stage.advance(p.stages);
  }
}

/// Where this lane's row begins in a box, and how its 16-byte columns are permuted there.
struct LaneRow {
  uint32_t offset = 0, swizzle = 0;

  /// Row `row` of a box of 128-byte rows.
  __device__ static LaneRow in_box(int row) {
    return {static_cast<uint32_t>(row * 128), static_cast<uint32_t>(row % 8 * 16)};
  }
};

__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + __expf(-x));
}

/// Bias and residual of one element of y, fetched before the sums are there.
struct Extras {
  float bias = 0, bias_up = 0, residual = 0;
};

template <class T>
__device__ __forceinline__ void fetch_bias(const StreamParams& p, int part, int unit, Extras& extras) {
  const void* bias = part == 0 ? p.bias[0] : part == 1 ? p.bias[1] : p.bias[2];
  if (bias)
    extras.bias = ptx::to_float(__ldg(static_cast<const T*>(bias) + unit - Walk::pick(p.part_begin, part)));
  if (p.swiglu && p.bias[1]) extras.bias_up = ptx::to_float(__ldg(static_cast<const T*>(p.bias[1]) + unit));
}

template <class T>
__device__ __forceinline__ void fetch_residual(const StreamParams& p, int unit, int token, Extras& extras) {
  if (!p.residual) return;
  const uint16_t bits =
      __ldcg(static_cast<const unsigned short*>(p.residual) + static_cast<int64_t>(token) * p.units + unit);
  extras.residual = ptx::to_float(*reinterpret_cast<const T*>(&bits));
}

template <class T>
__device__ __forceinline__ Extras fetch_extras(const StreamParams& p, int part, int unit, int token) {
  Extras extras;
  fetch_bias<T>(p, part, unit, extras);
  fetch_residual<T>(p, unit, token, extras);
  return extras;
}

template <class T>
__device__ __forceinline__ void write_element(const StreamParams& p, int unit, int token, float sum, float up,
                                              const Extras& e) {
  float value = sum + e.bias;
  if (p.swiglu) value = silu(value) * (up + e.bias_up);
  static_cast<T*>(p.y)[static_cast<int64_t>(token) * p.units + unit] = ptx::from_float<T>(value + e.residual);
}

}  // namespace stream

#endif  // MODELTORCH_PTX_HOPPER

}  // namespace modeltorch
