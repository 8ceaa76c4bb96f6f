#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/hopper.cuh"
#include "ops/pairs.cuh"
#include "ops/prefill_attention_mma.cuh"
#include "ops/prefill_tiles.cuh"
#include "ops/ptx.cuh"

/// Causal attention for Hopper: one warpgroup lends its registers to the others and feeds them with bulk
/// copies, the others multiply with wgmma. They take turns on the tensor cores: while one multiplies, the
/// others are at their softmax; and a warpgroup starts the scores of the next keys before it weighs the
/// values of the last.
namespace modeltorch::prefill {

/// The tensors of a launch as the copy engine sees them: [heads][head_size / 64][tokens][64].
struct Sm90Maps {
  CUtensorMap q, k, v;
};

/// What a block works on: 64 query rows a warpgroup against kKeys keys at a time.
template <class T, int kHead_, int kConsumers_>
struct Sm90Tile {
  static constexpr int kHead = kHead_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Together no more than the block starts with: 65536 / kThreads, rounded down to a multiple of 8, a thread.
  static constexpr int kFewRegisters = 32;
  static constexpr int kManyRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kSlice = 128;  ///< bytes of a row of 64 columns
  static constexpr int kQueryBytes = kRows * kHead * 2;
  static constexpr int kKeyBytes = kKeys * kHead * 2;
  static constexpr int kBytes = kStages * (kQueryBytes + 2 * kKeyBytes) + 1024;  // 1024: to align the first
};

/// What the warps of a block share beside the tiles: barriers, and which tile each buffer of queries belongs
/// to.
struct Sm90Shared {
  static constexpr int kStages = 2;
  uint64_t q_full[kStages], q_empty[kStages];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  PrefillTile tile[kStages];  ///< length 0: no more work
  int head[kStages];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using hopper::Ring;

/// The work of a block: items of falling weight, dealt to and fro so that no block gets the heavier end each
/// time.
struct Sm90Work {
  int head, order;
  __device__ static bool get(int round, int heads, int items, Sm90Work& work) {
    const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int item = round * gridDim.x + place;
    work.head = item % heads;
    work.order = item / heads;
    return round * static_cast<int>(gridDim.x) < items && item < items;
  }
};

/// One thread that keeps the copies ahead of the consumers.
template <class T, class Tile>
struct Sm90Producer {
  const Sm90Maps& maps;
  Sm90Shared& shared;
  unsigned char* q;
  unsigned char* k;
  unsigned char* v;
  Ring q_ring, ring;

  /// Hands the consumers a tile, as soon as they are done with the queries that lie in its buffer.
  __device__ void announce(const PrefillTile& tile, int head, int bytes) {
    hopper::barrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1);
    shared.tile[q_ring.stage] = tile;
    shared.head[q_ring.stage] = head;
    hopper::barrier_expect(&shared.q_full[q_ring.stage], bytes);
  }

  __device__ void load_tile(const PrefillTile& tile, int head, int kv_head) {
    using namespace hopper;
    const int last = (min(tile.first + Tile::kRows, tile.length) - 1) / Tile::kKeys;
    announce(tile, head, Tile::kQueryBytes);
    copy_box(q + q_ring.stage * Tile::kQueryBytes, &maps.q, &shared.q_full[q_ring.stage], 0,
             tile.start + tile.first, 0, head);
    q_ring.advance(Tile::kStages);
    for (int block = last; block >= 0; --block) {
      const int row = tile.start + block * Tile::kKeys;
      barrier_wait(&shared.k_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(&shared.k_full[ring.stage], Tile::kKeyBytes);
      copy_box(k + ring.stage * Tile::kKeyBytes, &maps.k, &shared.k_full[ring.stage], 0, row, 0, kv_head);
      barrier_wait(&shared.v_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(&shared.v_full[ring.stage], Tile::kKeyBytes);
      copy_box(v + ring.stage * Tile::kKeyBytes, &maps.v, &shared.v_full[ring.stage], 0, row, 0, kv_head);
      ring.advance(Tile::kStages);
    }
  }
};

/// One consumer warpgroup. Its 64 rows lie in the registers as mma.sync has them: a lane holds rows lane / 4
/// and lane / 4 + 8 of its warp's 16, and of every eight columns the two from 2 * (lane % 4) on.
template <class T, class Tile>
struct Sm90Consumer {
  static constexpr int kScores = Tile::kKeys / 2;
  Sm90Shared& shared;
  const unsigned char* q;
  unsigned char* k;
  unsigned char* v;
  int group;  ///< which of the consumers
  float scale_log2;
  int head;  ///< of the current tile
  Ring q_ring, k_ring, v_ring;
  float out[Tile::kHead / 2];
  float scores[kScores];
  uint32_t weights[kScores / 8][4];
  float maximum[2], sum[2], rescale[2];

  /// Named barriers 1.. pass the tensor cores round; 8.. are a warpgroup's own.
  __device__ void take_turn() const { hopper::named_wait(1 + group, 256); }
  __device__ void pass_turn() const { hopper::named_arrive(1 + (group + 1) % Tile::kConsumers, 256); }

  /// Starts scores = q . k^T.
  __device__ void score() {
    using namespace hopper;
    const uint64_t a = operand(q + q_ring.stage * Tile::kQueryBytes + group * 64 * Tile::kSlice);
    const uint64_t b = operand(k + k_ring.stage * Tile::kKeyBytes);
    wgmma_pin(scores);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < Tile::kHead / 16; ++d) {
      const int a_at = d / 4 * Tile::kRows * Tile::kSlice + d % 4 * 32;
      const int b_at = d / 4 * Tile::kKeys * Tile::kSlice + d % 4 * 32;
      wgmma<T>(scores, a + (a_at >> 4), b + (b_at >> 4), d > 0);
    }
    wgmma_commit();
  }

  /// Starts out = or += weights . v.
  __device__ void weigh(bool add) {
    using namespace hopper;
    const uint64_t b = operand(v + v_ring.stage * Tile::kKeyBytes, Tile::kKeys * Tile::kSlice);
    wgmma_pin(out);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 16; ++n) {
      wgmma_across<T>(out, weights[n], b + (n * 16 * Tile::kSlice >> 4), n > 0 || add);
    }
    wgmma_commit();
  }

  /// Gives the buffer of a ring back; every warp does, for itself.
  __device__ static void release(uint64_t (&empty)[Tile::kStages], Ring& ring) {
    if (threadIdx.x % 32 == 0) hopper::barrier_arrive(&empty[ring.stage]);
    ring.advance(Tile::kStages);
  }

  /// Hides keys behind their row; `ahead` is the first row of the warpgroup less the first key.
  __device__ void mask(int ahead) {
    const int lane = threadIdx.x % 32;
    const int own = ahead + threadIdx.x % 128 / 32 * 16 + lane / 4 - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + i % 2 > own + i / 2 % 2 * 8) scores[i] = -INFINITY;
    }
  }

  /// Scores to weights, still float32; `rescale` says what older sums must be multiplied by.
  __device__ void soften() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = maximum[half], other = -INFINITY;  // two chains: shorter waits
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) {
        top = fmaxf(top, scores[i]);
        other = fmaxf(other, scores[i + 1]);
      }
      top = fmaxf(top, other);
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float shift = top == -INFINITY ? 0.0f : top * scale_log2;
      rescale[half] = exp2_fast(maximum[half] * scale_log2 - shift);
      maximum[half] = top;
      float added = 0.0f, too = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) {
        scores[i] = exp2_fast(scores[i] * scale_log2 - shift);
        scores[i + 1] = exp2_fast(scores[i + 1] * scale_log2 - shift);
        added += scores[i];
        too += scores[i + 1];
      }
      sum[half] = sum[half] * rescale[half] + (added + too);
    }
  }

  /// Weights to T, in the order in which wgmma takes them.
  __device__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  /// Values behind the end of the sequence become zeros: their weights are zero, but they may be NaN.
  __device__ void clear_values(int from) {
    constexpr int kPieces = Tile::kSlice / 16;
    unsigned char* const data = v + v_ring.stage * Tile::kKeyBytes;
    for (int i = from * kPieces + threadIdx.x % 128; i < Tile::kKeys * kPieces; i += 128) {
#pragma unroll
      for (int slice = 0; slice < Tile::kHead / 64; ++slice) {
        *reinterpret_cast<uint4*>(data + slice * Tile::kKeys * Tile::kSlice + i * 16) = uint4{};
      }
    }
    hopper::proxy_fence();
    hopper::named_wait(8 + group, 128);
  }

  /// The first block of keys, at the diagonal.
  __device__ void begin(int ahead) {
    using namespace hopper;
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
    barrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
    score();
    wgmma_wait<0>();
    wgmma_pin(scores);
    release(shared.k_empty, k_ring);
    mask(ahead);
    soften();
    round_weights();
  }

  /// Scores of the next block under way together with the values of the one before.
  template <bool kMask>
  __device__ void step(bool add, int ahead) {
    using namespace hopper;
    barrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
    take_turn();
    score();
    barrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
    weigh(add);
    pass_turn();
    wgmma_wait<1>();
    wgmma_pin(scores);
    release(shared.k_empty, k_ring);
    if constexpr (kMask) mask(ahead);
    soften();
    wgmma_wait<0>();
    wgmma_pin(out);
    release(shared.v_empty, v_ring);
#pragma unroll
    for (int i = 0; i < Tile::kHead / 2; ++i) out[i] *= rescale[i / 2 % 2];
    round_weights();
  }

  /// Waits for the next tile and its queries.
  __device__ PrefillTile next() {
    hopper::barrier_wait(&shared.q_full[q_ring.stage], q_ring.parity);
    head = shared.head[q_ring.stage];
    return shared.tile[q_ring.stage];
  }

  /// All keys of one tile.
  __device__ void run(const PrefillTile& tile) {
    using namespace hopper;
    const int last = (min(tile.first + Tile::kRows, tile.length) - 1) / Tile::kKeys;
    const int row = tile.first + group * 64;
    begin(row - last * Tile::kKeys);
    if (last == 0) release(shared.q_empty, q_ring);
    barrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
    if ((last + 1) * Tile::kKeys > tile.length) clear_values(tile.length - last * Tile::kKeys);
    int block = last - 1;
    for (; block >= 0 && (block + 1) * Tile::kKeys > tile.first; --block) {
      step<true>(block < last - 1, row - block * Tile::kKeys);
      if (block == 0) release(shared.q_empty, q_ring);
    }
    for (; block >= 0; --block) {
      step<false>(block < last - 1, 0);
      if (block == 0) release(shared.q_empty, q_ring);
    }
    barrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
    weigh(last > 0);
    wgmma_wait<0>();
    wgmma_pin(out);
    release(shared.v_empty, v_ring);
  }

  /// Writes the rows of the warpgroup that are below `rows`; y is its row 0. The four lanes of a row exchange
  /// columns first, so that each writes 16 bytes.
  __device__ void store(T* y, int64_t stride, int rows) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = 1.0f / total;
      const int row = threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * half;
#pragma unroll
      for (int d = 0; d < Tile::kHead / 32; ++d) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = (d * 4 + i) * 4 + 2 * half;
          word[i] = pack<T>(out[at] * inverse, out[at + 1] * inverse);
        }
        transpose_quad(word);
        if (row < rows) {
          *reinterpret_cast<uint4*>(y + row * stride + d * 32 + quad * 8) =
              uint4{word[0], word[1], word[2], word[3]};
        }
      }
    }
  }
};

template <class Tile>
__device__ inline void init_barriers(Sm90Shared& shared) {
  using namespace hopper;
  constexpr int kWarps = 4 * Tile::kConsumers;
  for (int stage = 0; stage < Tile::kStages; ++stage) {
    barrier_init(&shared.q_full[stage], 1);
    barrier_init(&shared.q_empty[stage], kWarps);
    barrier_init(&shared.k_full[stage], 1);
    barrier_init(&shared.k_empty[stage], kWarps);
    barrier_init(&shared.v_full[stage], 1);
    barrier_init(&shared.v_empty[stage], kWarps);
  }
  barrier_init_fence();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// `items` bounds tiles times heads; blocks go through them until none is left.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    sm90_prefill_kernel(const Launch<T> launch, const __grid_constant__ Sm90Maps maps, int items) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  extern __shared__ unsigned char memory[];
  __shared__ Sm90Shared shared;
  unsigned char* const q = memory + (1024 - shared_address(memory) % 1024) % 1024;
  unsigned char* const k = q + Tile::kStages * Tile::kQueryBytes;
  unsigned char* const v = k + Tile::kStages * Tile::kKeyBytes;
  if (threadIdx.x == 0) init_barriers<Tile>(shared);
  ptx::begin_behind_the_kernel_in_front();
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_give<Tile::kFewRegisters>();
    if (threadIdx.x >= 32) return;
    Sm90Producer<T, Tile> producer{maps, shared, q, k, v};
    Sm90Work work;
    for (int round = 0; Sm90Work::get(round, launch.heads, items, work); ++round) {
      const PrefillTile tile =
          find_prefill_tile<Tile::kRows>(launch.seq_len, launch.sequences, launch.tokens, work.order);
      if (tile.length > 0 && threadIdx.x == 0) producer.load_tile(tile, work.head, work.head / launch.group);
      __syncwarp();
    }
    if (threadIdx.x == 0) producer.announce(PrefillTile{}, 0, 0);
  } else {
    registers_take<Tile::kManyRegisters>();
    const int group = warpgroup() - 1;
    Sm90Consumer<T, Tile> consumer{shared, q, k, v, group, launch.scale_log2, 0};
    if (group == Tile::kConsumers - 1) consumer.pass_turn();
    for (PrefillTile tile = consumer.next(); tile.length > 0; tile = consumer.next()) {
      consumer.run(tile);
      const int64_t row = tile.first + group * 64;
      consumer.store(launch.y + (tile.start + row) * launch.y_stride + consumer.head * Tile::kHead,
                     launch.y_stride, tile.length - static_cast<int>(row));
    }
    if (group == 0) consumer.take_turn();
  }
#endif
}

}  // namespace modeltorch::prefill
