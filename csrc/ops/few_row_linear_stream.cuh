#pragma once

// The kernel of few_row_linear on Hopper. A cluster of blocks owns a range of units (rows of the weights;
// with swiglu pairs of rows) and each of its blocks a slice of k, so that every multiprocessor streams the
// same number of bytes and nothing is summed through global memory. One warp of a block only issues bulk
// copies of the rows of the weights into a ring of stages in shared memory; it starts before the kernels in
// front are done, because weights do not depend on them. Eight warps multiply: they share out the units, the
// tokens and the columns of a stage, and add their sums up through shared memory in a fixed order at the end
// of a tile.

#include <cuda.h>

#include <climits>

#include "ops/decode_ptx.cuh"

namespace modeltorch {

inline constexpr int kStreamConsumers = 256;  // threads that multiply
inline constexpr int kStreamThreads = kStreamConsumers + 32;
inline constexpr int kStreamBox = 64;  // columns of one copy: 128 bytes, the widest swizzle
inline constexpr int kStreamMaxStages = 16;
inline constexpr int kStreamHeaderBytes = 512;  // barriers and partial sums of squares

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

/// How the eight warps share a tile of [16 * kMI * kWM rows of weights, 8 * kNI * kWN tokens].
template <int kMIv, int kNIv, int kWMv, int kWNv, bool kResidentv>
struct StreamShape {
  static constexpr int kMI = kMIv, kNI = kNIv, kWM = kWMv, kWN = kWNv;
  static constexpr int kWK = 8 / (kWM * kWN);
  static constexpr int kM = 16 * kMI * kWM;
  static constexpr int kN = 8 * kNI * kWN;
  static constexpr int kRedPitch = kM + 4;  // floats; writes and reads of the sums meet no bank twice
  static constexpr int kRedBuffers = kN <= 16 ? 2 : 1;
  static constexpr int kRedBytes = kRedBuffers * kWK * kN * kRedPitch * 4;
  static constexpr bool kResident = kResidentv;  // x lies in shared memory as a whole, normalised there
};

#if MODELTORCH_PTX_HOPPER

namespace stream {

/// The tiles of one cluster and the chunks of one block: what both sides of the ring walk. No cluster has
/// units of two parts.
struct Walk {
  int part, begin, count, tiles;  // units of the cluster, tiles
  int k_begin, k_end, chunks;     // columns of the block

  __device__ Walk(const StreamParams& p, int group, int rank) {
    part = (group >= p.group_begin[1]) + (group >= p.group_begin[2]);
    const int first = pick(p.part_begin, part),
              end = part < 2 ? min(p.units, p.part_begin[part + 1]) : p.units;
    const int first_group = pick(p.group_begin, part);
    const int groups = (part < 2 ? min(p.groups, p.group_begin[part + 1]) : p.groups) - first_group;
    const int64_t units = end - first;
    group -= first_group;
    begin = first + static_cast<int>(units * group / groups);
    count = first + static_cast<int>(units * (group + 1) / groups) - begin;
    tiles = (count + p.tile_units - 1) / p.tile_units;
    k_begin = min(p.k, rank * p.slice);
    k_end = min(p.k, k_begin + p.slice);
    chunks = (k_end - k_begin + p.chunk - 1) / p.chunk;
  }

  __device__ static int pick(const int (&begin)[3], int part) {
    return part == 0 ? begin[0] : part == 1 ? begin[1] : begin[2];
  }

  __device__ int first_unit(int tile) const {
    return begin + static_cast<int>(static_cast<int64_t>(count) * tile / tiles);
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
template <class Shape>
__device__ __forceinline__ void produce(const StreamParams& p, const Walk& walk, Barriers barriers,
                                        uint32_t ring) {
  const uint64_t once = ptx::evict_first_policy();
  const uint64_t keep = ptx::evict_last_policy();
  const int total = walk.tiles * walk.chunks;
  const int sides = p.swiglu ? 2 : 1;
  const int part_begin = Walk::pick(p.part_begin, walk.part);
  const CUtensorMap* map = &p.weight[walk.part];
  const int box_rows = sides * p.tile_units + (Shape::kResident ? 0 : p.rows);

  auto load_weights = [&](int tile, int chunk, int stage) {
    const int column = walk.k_begin + chunk * p.chunk;
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
    const int column = walk.k_begin + chunk * p.chunk;
    const int boxes = (min(p.chunk, walk.k_end - column) + kStreamBox - 1) / kStreamBox;
    const uint32_t to = ring + stage * p.stage_bytes + p.chunk / kStreamBox * sides * p.box_bytes;
    for (int box = 0; box < boxes; ++box) {
      ptx::tensor_copy(to + box * p.x_box_bytes, &p.x_map, column + box * kStreamBox, 0, barriers.full(stage),
                       keep);
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
  if constexpr (!Shape::kResident) {
    ptx::wait_for_dependencies();
    for (int item = 0; item < first; ++item) load_x(item % walk.chunks, item);
  }
  Stage stage;
  for (int item = first; item < total; ++item, advance()) {
    ptx::barrier_wait(barriers.empty(stage.index), stage.parity);
    load_weights(tile, chunk, stage.index);
    if constexpr (!Shape::kResident) load_x(chunk, stage.index);
    stage.advance(p.stages);
  }
}

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
      for (const uint32_t pair : {v[j].x, v[j].y, v[j].z, v[j].w}) {
        const float2 f = ptx::unpack<T>(pair);
        squares += f.x * f.x + f.y * f.y;
      }
    }
  }
  if (p.gamma) {
    float* partial = reinterpret_cast<float*>(shared + (2 * kStreamMaxStages + 2) * 8);
    for (int mask = 16; mask; mask /= 2) squares += __shfl_xor_sync(~0u, squares, mask);
    if (lane == 0) partial[warp] = squares;
    ptx::barrier_sync(1, kStreamConsumers);
    float sum = 0;
    for (int i = 0; i < row_warps; ++i) sum += partial[row * row_warps + i];
    const float factor = rsqrtf(sum / static_cast<float>(p.k) + p.epsilon);
    const uint4* gamma = reinterpret_cast<const uint4*>(shared + p.gamma_offset);
    for (int i = first; i < vectors; i += step) {
      uint4 v = to[i];
      const uint4 g = gamma[i];
      auto scale = [&](uint32_t& pair, uint32_t by) {
        const float2 a = ptx::unpack<T>(pair), b = ptx::unpack<T>(by);
        pair = ptx::pack<T>(a.x * factor * b.x, a.y * factor * b.y);
      };
      scale(v.x, g.x);
      scale(v.y, g.y);
      scale(v.z, g.z);
      scale(v.w, g.w);
      to[i] = v;
    }
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

/// Where this lane's row begins in a box, and how its 16-byte columns are permuted there.
struct LaneRow {
  uint32_t offset = 0, swizzle = 0;

  /// Row `row` of a box of 128-byte rows.
  __device__ static LaneRow in_box(int row) {
    return {static_cast<uint32_t>(row * 128), static_cast<uint32_t>(row % 8 * 16)};
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

/// Stores the sums of all warps as red[k][token][row].
template <class Shape>
__device__ __forceinline__ void store_sums(float* red, const float (&acc)[Shape::kMI][Shape::kNI][4],
                                           const WarpPlace<Shape>& warp) {
  float* base =
      red + (warp.k * Shape::kN + warp.n + warp.lane % 4 * 2) * Shape::kRedPitch + warp.m + warp.lane / 4;
#pragma unroll
  for (int i = 0; i < Shape::kMI; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kNI; ++j) {
      float* to = base + j * 8 * Shape::kRedPitch + i * 16;
      to[0] = acc[i][j][0];
      to[Shape::kRedPitch] = acc[i][j][1];
      to[8] = acc[i][j][2];
      to[Shape::kRedPitch + 8] = acc[i][j][3];
    }
  }
}

__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + __expf(-x));
}

/// Bias and residual of one element of y, fetched before the sums are there.
struct Extras {
  float bias = 0, bias_up = 0, residual = 0;
};

template <class T>
__device__ __forceinline__ Extras fetch_extras(const StreamParams& p, int part, int unit, int token) {
  Extras e;
  const void* bias = part == 0 ? p.bias[0] : part == 1 ? p.bias[1] : p.bias[2];
  if (bias)
    e.bias = ptx::to_float(__ldg(static_cast<const T*>(bias) + unit - Walk::pick(p.part_begin, part)));
  if (p.swiglu && p.bias[1]) e.bias_up = ptx::to_float(__ldg(static_cast<const T*>(p.bias[1]) + unit));
  if (p.residual) {
    const uint16_t bits =
        __ldcg(static_cast<const unsigned short*>(p.residual) + static_cast<int64_t>(token) * p.units + unit);
    e.residual = ptx::to_float(*reinterpret_cast<const T*>(&bits));
  }
  return e;
}

template <class T>
__device__ __forceinline__ void write_element(const StreamParams& p, int unit, int token, float sum, float up,
                                              const Extras& e) {
  float value = sum + e.bias;
  if (p.swiglu) value = silu(value) * (up + e.bias_up);
  static_cast<T*>(p.y)[static_cast<int64_t>(token) * p.units + unit] = ptx::from_float<T>(value + e.residual);
}

/// The sum over warps of one row of the tile and one token.
template <class Shape>
__device__ __forceinline__ float sum_warps(const float* red, int row, int token) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < Shape::kWK; ++k) sum += red[(k * Shape::kN + token) * Shape::kRedPitch + row];
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
  const Walk walk(p, blockIdx.x / p.cluster, rank);
  const Barriers barriers{ptx::shared_address(shared)};
  const uint32_t ring = ptx::shared_address(shared + p.ring_offset);
  const bool producer = threadIdx.x >= kStreamConsumers;

  if (threadIdx.x == kStreamConsumers) {
    for (int i = 0; i < p.stages; ++i) {
      ptx::barrier_init(barriers.full(i), 1);
      ptx::barrier_init(barriers.empty(i), 8);
    }
    ptx::barrier_init(barriers.ready(), p.cluster);
    ptx::barrier_init(barriers.done(), p.cluster);
    ptx::publish_barriers();
    ptx::launch_dependents();
  }
  if (p.cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  if (producer) {
    if (threadIdx.x == kStreamConsumers) produce<Shape>(p, walk, barriers, ring);
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
      const int column = chunk * p.chunk;
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

    if (Shape::kRedBuffers == 2)
      red = reinterpret_cast<float*>(shared + p.red_offset + (tile & 1) * (Shape::kRedBytes / 2));
    store_sums<Shape>(red, acc, warp);
    ptx::barrier_sync(1, kStreamConsumers);
    if (p.cluster == 1) {
#pragma unroll
      for (int e = threadIdx.x; e < kM * kN; e += kStreamConsumers) {
        const int u = e % kM, token = e / kM;
        if (u >= units || token >= p.rows) continue;
        if (!kEarly) extras = fetch_extras<T>(p, walk.part, unit + u, token);
        const float sum = sum_warps<Shape>(red, u, token);
        const float up = p.swiglu ? sum_warps<Shape>(red, units + u, token) : 0;
        write_element<T>(p, unit + u, token, sum, up, extras);
      }
      if (Shape::kRedBuffers == 1) ptx::barrier_sync(1, kStreamConsumers);
      continue;
    }

    // The blocks of a cluster share the tokens out; each adds up the sums of all blocks in their order.
    if constexpr (Shape::kWK > 1) {
      for (int e = threadIdx.x; e < kM * kN; e += kStreamConsumers) {
        const int row = e % kM, token = e / kM;
        if (row < tile_rows && token < p.rows)
          red[token * Shape::kRedPitch + row] = sum_warps<Shape>(red, row, token);
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
