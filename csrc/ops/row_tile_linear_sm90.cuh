#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ops/hopper.cuh"
#include "ops/pairs.cuh"
#include "ops/ptx.cuh"

/// Linear maps of 9 to 128 rows for Hopper. The matrix units take the weights as their left operand: a
/// warpgroup holds 64 rows of the weights times all rows of x ("tokens"). One warp copies, up to five
/// warpgroups multiply. The blocks of a cluster share k and add up through each other's shared memory.
namespace modeltorch::row_tiles {

inline constexpr int kDepth = 64;  ///< columns of k in a stage: 128 bytes
inline constexpr int kMaxStages = 16;
inline constexpr int kHeaderBytes = 1024;  ///< for the barriers; the stages behind it stay aligned

/// Warpgroups that multiply, at most: their sums must fit in registers.
constexpr int most_groups(int tokens) {
  return tokens <= 64 ? 5 : 3;
}

/// A launch. A unit is a row of y^T: a row of the weights, or with `gated` one of gate and one of up.
struct Work {
  CUtensorMap weight[3];  ///< of each part; gated: one map that finds eight rows of gate, then eight of up
  CUtensorMap x;
  const void* bias[3];  ///< gated: of gate and of up
  int part_tile[3];     ///< first tile of each part
  int part_unit[4];     ///< first unit of each part, and the end
  const void* residual;
  void* y;
  int rows, units, steps;  ///< steps: of kDepth columns, in all of k
  int tiles, tile_units;
  int groups;           ///< warpgroups that multiply
  int splits;           ///< blocks of a cluster
  int boxes, box_rows;  ///< copies of one stage's weights, and rows of each
  int weight_bytes, stage_bytes, stages;
  int residual_offset;  ///< in shared memory: 16 bytes a thread for every 16 tokens that a block finishes
  bool gated, flipped;  ///< flipped: the map finds up first
  bool vectors;         ///< rows of y and residual begin on 16 bytes
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Barriers {
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint64_t joined;  ///< the sums of the other blocks are here
};

/// The place of this block: which part of k.
struct Seat {
  int split, cluster, clusters;
  int first_step, steps;

  __device__ explicit Seat(const Work& w) {
    split = blockIdx.x % w.splits;
    cluster = blockIdx.x / w.splits;
    clusters = gridDim.x / w.splits;
    first_step = w.steps * split / w.splits;
    steps = w.steps * (split + 1) / w.splits - first_step;
  }

  __device__ int tile(int round) const { return cluster + round * clusters; }

  /// Blocks that begin elsewhere do not all wait for the same part of x.
  __device__ int column(int round, int step) const {
    return (first_step + (step + tile(round)) % steps) * kDepth;
  }
};

/// A tile: `row` is its first row in its part, `unit` in y.
struct Tile {
  int part, row, unit, units;

  __device__ Tile(const Work& w, int index) {
    part = (index >= w.part_tile[1]) + (index >= w.part_tile[2]);
    row = (index - w.part_tile[part]) * w.tile_units;
    unit = w.part_unit[part] + row;
    units = min(w.tile_units, w.part_unit[part + 1] - unit);  // none or fewer: behind the last tile
  }
};

/// The thread that copies.
template <int kTokens>
struct Producer {
  const Work& w;
  const Seat& seat;
  Barriers& barriers;
  unsigned char* memory;
  int round = 0, step = 0;
  hopper::Ring ring;

  __device__ unsigned char* stage() const { return memory + kHeaderBytes + ring.stage * w.stage_bytes; }

  __device__ void load_weights() {
    const Tile tile(w, seat.tile(round));
    const int column = seat.column(round, step);
    uint64_t* const full = &barriers.full[ring.stage];
    hopper::barrier_expect(full, (w.boxes * w.box_rows + kTokens) * kDepth * 2);
    if (w.gated) {
      hopper::stream_box(stage(), &w.weight[0], full, column, 0, 0, tile.row / 8);
    } else {
      for (int i = 0; i < w.boxes; ++i) {
        hopper::stream_box(stage() + i * w.box_rows * kDepth * 2, &w.weight[tile.part], full, column,
                           tile.row + i * w.box_rows);
      }
    }
  }

  __device__ void load_x() {
    hopper::copy_box(stage() + w.weight_bytes, &w.x, &barriers.full[ring.stage], seat.column(round, step), 0);
  }

  __device__ void advance() {
    ring.advance(w.stages);
    if (++step == seat.steps) {
      step = 0;
      ++round;
    }
  }

  __device__ int total() const {
    return (w.tiles - seat.cluster + seat.clusters - 1) / seat.clusters * seat.steps;
  }

  /// Before the kernels in front are done: weights do not depend on them.
  __device__ void begin() {
    for (int i = min(total(), w.stages); i > 0; --i, advance()) load_weights();
  }

  __device__ void run() {
    const int all = total(), first = min(all, w.stages);
    ptx::wait_for_dependencies();
    round = step = 0;
    ring = {};
    for (int i = 0; i < first; ++i, advance()) load_x();
    for (int i = first; i < all; ++i, advance()) {
      hopper::barrier_wait(&barriers.empty[ring.stage], ring.parity ^ 1);
      load_weights();
      load_x();
    }
    ptx::launch_dependents();  // now, so that their first loads fill the gap that this kernel's end leaves
  }
};

/// Tells the thread that copies that this warp has read a stage.
__device__ inline void release(const Work& w, Barriers& barriers, hopper::Ring& ring) {
  if (threadIdx.x % 32 == 0) hopper::barrier_arrive(&barriers.empty[ring.stage]);
  ring.advance(w.stages);
}

/// sum = one warpgroup's rows of a tile, this block's columns.
template <class T, int kTokens>
__device__ inline void multiply_tile(const Work& w, const Seat& seat, Barriers& barriers,
                                     const unsigned char* stages, float (&sum)[kTokens / 2],
                                     hopper::Ring& ring) {
  using namespace hopper;
  const uint64_t a = operand(stages + warpgroup() * 64 * kDepth * 2), b = operand(stages + w.weight_bytes);
  hopper::Ring done = ring;
  for (int step = 0; step < seat.steps; ++step) {
    barrier_wait(&barriers.full[ring.stage], ring.parity);
    const int stage = ring.stage * (w.stage_bytes >> 4);
    wgmma_pin(sum);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      wgmma<T>(sum, a + stage + (i * 32 >> 4), b + stage + (i * 32 >> 4), i > 0 || step > 0);
    }
    wgmma_commit();
    ring.advance(w.stages);
    if (step > 0) {
      wgmma_wait<1>();
      release(w, barriers, done);
    }
  }
  wgmma_wait<0>();
  wgmma_pin(sum);
  release(w, barriers, done);
}

/// Tokens go by eights. Those that a block finishes, an even number.
template <int kTokens>
struct Finish {
  int share, first, last;
  __device__ Finish(const Work& w, int split) {
    share = (kTokens / 16 + w.splits - 1) / w.splits * 2;
    first = min(split * share, kTokens / 8);
    last = min(first + share, kTokens / 8);
  }
};

/// Adds up the sums of the blocks that share k. Every block sends the others what they finish, in the order
/// in which their threads hold it.
template <int kTokens>
__device__ inline void join(const Work& w, const Seat& seat, Barriers& barriers, unsigned char* received,
                            float (&sum)[kTokens / 2]) {
  const Finish<kTokens> mine(w, seat.split);
  const int threads = w.groups * 128;
  int split = 0, left = mine.share;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    if (split != seat.split) {
      const int slot = seat.split - (seat.split > split);
      const int at = (slot * mine.share + mine.share - left) * threads + static_cast<int>(threadIdx.x);
      hopper::send(hopper::shared_address(received) + at * 16, &barriers.joined, split,
                   float4{sum[j * 4], sum[j * 4 + 1], sum[j * 4 + 2], sum[j * 4 + 3]});
    }
    if (--left == 0) {
      left = mine.share;
      ++split;
    }
  }
  hopper::barrier_wait(&barriers.joined, 0);
  const float4* const from = reinterpret_cast<const float4*>(received) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    if (j < mine.first || j >= mine.last) continue;
    for (int slot = 0; slot < w.splits - 1; ++slot) {
      const float4 other = from[(slot * mine.share + j - mine.first) * threads];
      sum[j * 4] += other.x;
      sum[j * 4 + 1] += other.y;
      sum[j * 4 + 2] += other.z;
      sum[j * 4 + 3] += other.w;
    }
  }
}

/// Transposes an 8 x 8 matrix of floats over a warp: lane l holds two columns, from l % 4 * 2 on, of row l
/// / 4.
__device__ inline float2 transpose(float first, float second) {
  const uint32_t a = __float_as_uint(first), b = __float_as_uint(second);
  const uint32_t low = hopper::transpose_halves(__byte_perm(a, b, 0x5410));
  const uint32_t high = hopper::transpose_halves(__byte_perm(a, b, 0x7632));
  return {__uint_as_float(__byte_perm(low, high, 0x5410)), __uint_as_float(__byte_perm(low, high, 0x7632))};
}

/// Where a warp's sums go in y: four 8 x 8 matrices at a time, each of eight tokens and eight units, of which
/// the lanes of a token exchange columns so that each writes 16 bytes.
template <class T>
struct Target {
  const Work& w;
  int unit, end;    ///< of this warp's first unit; of the tile's last
  int first, last;  ///< tokens, by eights, that this block finishes
  int lane = threadIdx.x % 32;

  template <int kTokens>
  __device__ Target(const Work& w, const Tile& tile, const Finish<kTokens>& mine)
      : w(w),
        unit(tile.unit + static_cast<int>(threadIdx.x) / 32 * (w.gated ? 8 : 16)),
        end(tile.unit + tile.units),
        first(mine.first),
        last(mine.last) {}

  /// Where the i-th of the four matrices lies: gated, they are of four times eight tokens; otherwise of twice
  /// eight tokens and twice eight units.
  __device__ int group_of(int group, int i) const { return group + (w.gated ? i : i / 2); }
  __device__ int unit_of(int i) const { return unit + (w.gated ? 0 : i % 2 * 8); }

  __device__ bool has(int group) const {
    return group >= first && group < last && group * 8 + lane / 4 < w.rows;
  }
  __device__ int64_t at(int group, int from_unit) const {
    return static_cast<int64_t>(group * 8 + lane / 4) * w.units + from_unit;
  }

  /// Starts to bring what this lane needs of the residual to its own places in shared memory.
  __device__ void fetch(unsigned char* memory) const {
    uint32_t to = hopper::shared_address(memory + w.residual_offset) + threadIdx.x * 16;
    const int quad = lane % 4;
    for (int group = first; group < last; group += 2, to += w.groups * 128 * 16) {
      const int of = group_of(group, quad), from = unit_of(quad);
      const bool valid = has(of) && from < end;
      ptx::copy_async_16(to, static_cast<const T*>(w.residual) + (valid ? at(of, from) : 0), valid);
    }
    ptx::commit_copies();
  }

  /// Pairs of T of four matrices of the residual; `memory` is null if they were not fetched.
  __device__ void read(int group, const unsigned char* memory, uint32_t (&pair)[4]) const {
    const int quad = lane % 4;
    if (w.vectors) {
      const int place = (group - first) / 2 * w.groups * 128 + static_cast<int>(threadIdx.x);
      const uint4 v = *reinterpret_cast<const uint4*>(memory + w.residual_offset + place * 16);
      pair[0] = v.x, pair[1] = v.y, pair[2] = v.z, pair[3] = v.w;
      transpose_quad(pair);
      return;
    }
    for (int i = 0; i < 4; ++i) {
      const int of = group_of(group, i), from = unit_of(i) + quad * 2;
      pair[i] = 0;
      if (!has(of)) continue;
      const auto* const bits = static_cast<const unsigned short*>(w.residual) + at(of, from);
      if (from < end) pair[i] = __ldcg(bits);
      if (from + 1 < end) pair[i] |= static_cast<uint32_t>(__ldcg(bits + 1)) << 16;
    }
  }

  __device__ void write(int group, uint32_t (&pair)[4]) const {
    T* const y = static_cast<T*>(w.y);
    const int quad = lane % 4;
    if (w.vectors) {
      transpose_quad(pair);
      const int of = group_of(group, quad), from = unit_of(quad);
      if (has(of) && from < end)
        *reinterpret_cast<uint4*>(y + at(of, from)) = uint4{pair[0], pair[1], pair[2], pair[3]};
      return;
    }
    for (int i = 0; i < 4; ++i) {
      const int of = group_of(group, i), from = unit_of(i) + quad * 2;
      if (!has(of)) continue;
      auto* const bits = reinterpret_cast<unsigned short*>(y) + at(of, from);
      if (from < end) bits[0] = static_cast<unsigned short>(pair[i]);
      if (from + 1 < end) bits[1] = static_cast<unsigned short>(pair[i] >> 16);
    }
  }
};

/// silu(gate) * up
__device__ inline float gated(float gate, float up) {
  constexpr float kLog2E = 1.44269504088896340736f;
  return __fdividef(gate, 1.0f + exp2_fast(-kLog2E * gate)) * up;
}

/// The two biases of a lane's rows, lane / 4 and lane / 4 + 8 of its warp's: of two units, or of gate and up.
template <class T>
__device__ inline float2 fetch_bias(const Work& w, const Tile& tile) {
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4;
  const auto load = [&](int part, int unit) {
    const T* const bias = static_cast<const T*>(w.bias[part]);
    return bias != nullptr && unit < tile.units ? ptx::to_float(__ldg(bias + tile.row + unit)) : 0.0f;
  };
  if (w.gated) return {load(0, warp * 8 + row), load(1, warp * 8 + row)};
  return {load(tile.part, warp * 16 + row), load(tile.part, warp * 16 + row + 8)};
}

/// Bias, activation and residual of a warpgroup's part of a tile, and the way to y.
template <class T, int kTokens>
__device__ inline void finish(const Work& w, const Target<T>& target, float2 bias,
                              const unsigned char* memory, const float (&sum)[kTokens / 2]) {
  constexpr int kGroups = kTokens / 8;
  if (w.gated) {
#pragma unroll
    for (int j = 0; j < kGroups; j += 4) {
      if (j + 4 <= target.first || j >= target.last) continue;
      uint32_t pair[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i >= kGroups) break;
        const float* const s = &sum[(j + i) * 4];
        const float first =
            w.flipped ? gated(s[2] + bias.x, s[0] + bias.y) : gated(s[0] + bias.x, s[2] + bias.y);
        const float second =
            w.flipped ? gated(s[3] + bias.x, s[1] + bias.y) : gated(s[1] + bias.x, s[3] + bias.y);
        pair[i] = hopper::transpose_halves(pack<T>(first, second));
      }
      target.write(j, pair);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroups; j += 2) {
    if (j < target.first || j >= target.last) continue;
    float2 value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const s = &sum[(j + i / 2) * 4 + i % 2 * 2];
      const float add = i % 2 ? bias.y : bias.x;
      value[i] = transpose(s[0] + add, s[1] + add);
    }
    uint32_t pair[4] = {};
    if (w.residual != nullptr) target.read(j, memory, pair);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 add = unpack<T>(pair[i]);
      pair[i] = pack<T>(value[i].x + add.x, value[i].y + add.y);
    }
    target.write(j, pair);
  }
}

/// The warpgroups that multiply.
template <class T, int kTokens>
__device__ inline void consume(const Work& w, const Seat& seat, Barriers& barriers, unsigned char* memory) {
  hopper::Ring ring;
  const Finish<kTokens> mine(w, seat.split);
  const bool fetches = w.residual != nullptr && w.vectors;
  for (int round = 0; seat.tile(round) < w.tiles; ++round) {
    const Tile tile(w, seat.tile(round));
    const Target<T> target(w, tile, mine);
    const float2 bias = fetch_bias<T>(w, tile);
    if (round == 0 && w.residual != nullptr) ptx::wait_for_dependencies();
    if (fetches) target.fetch(memory);
    float sum[kTokens / 2];
    multiply_tile<T, kTokens>(w, seat, barriers, memory + kHeaderBytes, sum, ring);
    if (w.splits > 1) {        // then this is the only tile
      hopper::cluster_wait();  // nobody reads stages any more
      join<kTokens>(w, seat, barriers, memory + kHeaderBytes, sum);
    }
    if (fetches) ptx::wait_for_copies<0>();
    finish<T, kTokens>(w, target, bias, memory, sum);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// Clusters of `splits` blocks, of 128 * groups + 32 threads each. Where k is split there are as many
/// clusters as tiles.
template <class T, int kTokens>
__global__ void __launch_bounds__(128 * most_groups(kTokens) + 32, 1)
    linear_kernel(const __grid_constant__ Work w) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  extern __shared__ __align__(1024) unsigned char memory[];
  Barriers& barriers = *reinterpret_cast<Barriers*>(memory);
  const Seat seat(w);
  const int consumers = w.groups * 128;
  const bool copies = threadIdx.x == consumers;
  Producer<kTokens> producer{w, seat, barriers, memory};
  if (copies) {
    for (int i = 0; i < w.stages; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], w.groups * 4);
    }
    barrier_init(&barriers.joined, 1);
    barrier_init_fence();
    const Finish<kTokens> mine(w, seat.split);
    barrier_expect(&barriers.joined, (w.splits - 1) * (mine.last - mine.first) * consumers * 16);
    producer.begin();
  }
  __syncthreads();
  if (w.splits > 1) cluster_wait();
  if (static_cast<int>(threadIdx.x) < consumers) {
    consume<T, kTokens>(w, seat, barriers, memory);
  } else {
    if (copies) producer.run();
    __syncwarp();
    if (w.splits > 1) cluster_wait();  // as those that multiply
  }
#endif
}

}  // namespace modeltorch::row_tiles
