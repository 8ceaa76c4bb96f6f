#pragma once

// decode_stack: attention of one sequence, key-value head and part of the context by the first eight warps of
// a block, with the pieces of decode_attention_kernel.cuh. The keys and values of the next layer that lie in
// the cache are on their way while the blocks still work on this one.

#include "ops/decode_attention_kernel.cuh"
#include "ops/decode_stack_exchange.cuh"
#include "ops/decode_stack_ring.cuh"

namespace modeltorch::stack {

template <int kD>
using AttentionShape = DecodeShape<kD, 8, 2>;
/// In shared memory; cos and sin of the token lie behind what the shape needs.
template <int kD>
inline constexpr int kAttentionBytes = AttentionShape<kD>::kSentStateOffset + 2 * kD * 2;

/// What join_splits needs of shared memory.
inline constexpr int kJoinBytes = kStackConsumers * 24;

#if MODELTORCH_PTX_HOPPER

/// What attention hands to o, where it is whole: x of o.
template <class T>
__device__ __forceinline__ T* attended(const StackParams& p) {
  return static_cast<T*>(const_cast<void*>(p.linear[kStackO].x));
}

template <class T, int kD>
struct Attention {
  using Shape = AttentionShape<kD>;

  const StackParams& p;
  const DecodeAttentionParams& a;
  decode::Place place;
  char* shared;   // of attention
  int tile, end;  // of this warp
  int64_t slot;
  int rows[Shape::kStages], next_row;  // of the cache, of the tiles that come first

  /// `runs`: false in warps that never do.
  __device__ Attention(const StackParams& p, int unit, char* shared, bool runs)
      : p(p),
        a(p.attention),
        place(a, unit % a.splits, unit / a.splits % a.kv_heads, 0, unit / a.splits / a.kv_heads),
        shared(shared) {
    if (!runs) return;
    const int tiles = (place.length + kDecodeTokens - 1) / kDecodeTokens;
    const int workers = a.splits * Shape::kWarps, worker = place.split * Shape::kWarps + threadIdx.x / 32;
    tile = static_cast<int>(static_cast<int64_t>(tiles) * worker / workers);
    end = static_cast<int>(static_cast<int64_t>(tiles) * (worker + 1) / workers);
    slot = place.length ? a.slots[place.sequence] : -1;
    if (slot < -1 || slot >= static_cast<int64_t>(a.blocks) * a.block_size) {
      if (threadIdx.x == 0) *a.fault = 1;
      slot = -1;
    }
    for (int i = 0; i < Shape::kStages; ++i) rows[i] = tile + i < end ? find_row(a, place, tile + i) : -1;
    next_row = tile + Shape::kStages < end ? find_row(a, place, tile + Shape::kStages) : -1;
    T* turn = reinterpret_cast<T*>(shared + Shape::kSentStateOffset);
    for (int i = threadIdx.x; i < 2 * kD; i += Shape::kThreads) {
      const void* from = i < kD ? a.cos : a.sin;
      turn[i] = static_cast<const T*>(from)[static_cast<int64_t>(place.sequence) * kD + i % kD];
    }
  }

  /// With the caches of a layer.
  __device__ DecodeAttentionParams of(const StackLayer& layer) const {
    DecodeAttentionParams with = a;
    with.k_cache = layer.k_cache;
    with.v_cache = layer.v_cache;
    return with;
  }

  __device__ char* ring() const { return shared + threadIdx.x / 32 * Shape::kRingBytes; }

  /// Starts to load the first tiles of a layer.
  __device__ void prefetch(const StackLayer& layer) {
#pragma unroll
    for (int i = 0; i < Shape::kStages; ++i) {
      if (tile + i < end)
        decode::load_tile<T, Shape>(of(layer), place, rows[i],
                                    ptx::shared_address(ring()) + i * Shape::kTileBytes);
      ptx::commit_copies();
    }
  }

  /// Rotates the query heads into shared memory; the last split also the new key, takes the new value, and
  /// writes both to the cache. Rows of padding are waited for like others.
  __device__ void fetch_new_token(const StackLayer& layer) {
    constexpr int kHalf = kD / 2, kVectors = kHalf / 8;
    const T* row = static_cast<const T*>(p.linear[kStackQkv].y) +
                   static_cast<int64_t>(place.sequence) * (a.heads + 2 * a.kv_heads) * kD;
    const bool owner = place.split == a.splits - 1;
    const int64_t cache_offset = (slot * a.kv_heads + place.kv_head) * kD;
    auto vector = [](void* to) -> uint4& { return *static_cast<uint4*>(to); };
    const int head = threadIdx.x / kVectors, column = threadIdx.x % kVectors * 8;
    if (head < place.heads + owner) {
      const bool key = head == place.heads;
      const T* from = row + (key ? a.heads + place.kv_head : place.head + head) * kD + column;
      uint4 low = exchange::load(from), high = exchange::load(from + kHalf);
      exchange::Patience patience;
      while (exchange::has_empty_half(low) || exchange::has_empty_half(high)) {
        patience.spend();
        low = exchange::load(from);
        high = exchange::load(from + kHalf);
      }
      char* turn = shared + Shape::kSentStateOffset + column * 2;
      decode::rotate<T>(low, high, {vector(turn), vector(turn + kD)},
                        {vector(turn + kD * 2), vector(turn + kD * 3)});
      char* to =
          shared + (key ? Shape::kNewKeyOffset : Shape::kQueryOffset + head * Shape::kPitch) + column * 2;
      vector(to) = low;
      vector(to + kHalf * 2) = high;
      if (key && slot >= 0) {
        vector(static_cast<T*>(layer.k_cache) + cache_offset + column) = low;
        vector(static_cast<T*>(layer.k_cache) + cache_offset + column + kHalf) = high;
      }
    }
    const int i = Shape::kThreads - 1 - threadIdx.x;
    if (!owner || i >= kD / 8) return;
    const uint4 value = exchange::wait_for(row + (a.heads + a.kv_heads + place.kv_head) * kD + i * 8);
    vector(shared + Shape::kNewValueOffset + i * 16) = value;
    if (slot >= 0) vector(static_cast<T*>(layer.v_cache) + cache_offset + i * 8) = value;
  }

  __device__ void add_tiles(const StackLayer& layer, decode::State<Shape>& state) {
    const int lane = threadIdx.x & 31;
    const uint32_t ring_address = ptx::shared_address(ring());
    const uint32_t query = ptx::shared_address(shared + Shape::kQueryOffset) +
                           min(lane % 16, place.heads - 1) * Shape::kPitch + lane / 16 * 16;
    int row = next_row;
    for (int at = tile, stage = 0; at < end; ++at) {
      ptx::wait_for_copies<Shape::kStages - 1>();
      __syncwarp();
      const int tokens = place.length - at * kDecodeTokens;
      const int here = stage * Shape::kTileBytes;
      if (tokens <= kDecodeTokens) decode::place_new_token<Shape>(shared, ring() + here, tokens - 1);
      decode::add_tile<T, Shape>(a, state, query, ring_address + here, tokens);
      __syncwarp();
      if (at + Shape::kStages < end) decode::load_tile<T, Shape>(of(layer), place, row, ring_address + here);
      if (at + Shape::kStages + 1 < end) row = find_row(a, place, at + Shape::kStages + 1);
      ptx::commit_copies();
      if (++stage == Shape::kStages) stage = 0;
    }
    ptx::wait_for_copies<0>();
    __syncwarp();
  }

  /// Joins the warps and hands the result on: halves if this block has the whole context, else sums, their
  /// maximum and the sum of the weights.
  __device__ void join() const {
    constexpr int kVectors = kD / 4;
    const float* scalars = reinterpret_cast<const float*>(shared + Shape::kStateOffset);
    const int64_t first = static_cast<int64_t>(place.sequence) * a.heads + place.head;
    for (int v = threadIdx.x; v < place.heads * kVectors; v += Shape::kThreads) {
      const int head = v / kVectors, column = v % kVectors;
      const decode::Merge<Shape::kWarps> merge(Shape::kWarps, [&](int warp, int what) {
        return scalars[(warp * 2 + what) * kDecodeHeads + head];
      });
      const char* out = shared + head * Shape::kSumPitch * 4 + column * 16;
      float4 sum{};
#pragma unroll
      for (int warp = 0; warp < Shape::kWarps; ++warp) {
        const float4 part = *reinterpret_cast<const float4*>(out + warp * Shape::kRingBytes);
        sum.x += merge.factor[warp] * part.x;
        sum.y += merge.factor[warp] * part.y;
        sum.z += merge.factor[warp] * part.z;
        sum.w += merge.factor[warp] * part.w;
      }
      if (a.splits == 1) {
        const float by = place.length ? merge.sum : 1;
        exchange::store(attended<T>(p) + (first + head) * kD + column * 4,
                        uint2{ptx::pack<T>(sum.x / by, sum.y / by), ptx::pack<T>(sum.z / by, sum.w / by)});
        continue;
      }
      const int64_t part = (first + head) * a.splits + place.split;
      exchange::store(p.parts + part * kD + column * 4,
                      uint4{__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z),
                            __float_as_uint(sum.w)});
      if (column == 0)
        exchange::store(p.states + part, uint2{__float_as_uint(merge.maximum), __float_as_uint(merge.sum)});
    }
  }

  /// One layer, whose first tiles are on their way; `next` may be null.
  __device__ void run(const StackLayer& layer, const StackLayer* next) {
    fetch_new_token(layer);
    ptx::barrier_sync(kStackAttending, Shape::kThreads);
    decode::State<Shape> state;
    add_tiles(layer, state);
    decode::store_state(state, place.heads, shared);
    ptx::barrier_sync(kStackAttending, Shape::kThreads);
    join();
    ptx::barrier_sync(kStackAttending, Shape::kThreads);
    if (next) prefetch(*next);
  }
};

/// A warp takes back what the block of this unit handed on.
template <class T, int kD>
__device__ __forceinline__ void take_back_attended(const StackParams& p, int unit) {
  const DecodeAttentionParams& a = p.attention;
  const int split = unit % a.splits, kv_head = unit / a.splits % a.kv_heads,
            sequence = unit / a.splits / a.kv_heads, heads = a.heads / a.kv_heads;
  const int64_t first = static_cast<int64_t>(sequence) * a.heads + kv_head * heads;
  constexpr uint2 kPair{exchange::kNothing, exchange::kNothing};
  for (int v = threadIdx.x % 32; v < heads * kD / 4; v += 32) {
    if (a.splits == 1) {
      exchange::store(attended<T>(p) + first * kD + v * 4, kPair);
      continue;
    }
    const int64_t part = (first + v / (kD / 4)) * a.splits + split;
    const int column = v % (kD / 4);
    exchange::store(p.parts + part * kD + column * 4, uint4{kPair.x, kPair.x, kPair.x, kPair.x});
    if (column == 0) exchange::store(p.states + part, kPair);
  }
}

/// Some splits of one row and head, merged: of four columns of the output.
struct Merged {
  float maximum = -INFINITY, sum = 0;
  float4 out{};

  __device__ void add(float most, float weights, const float4& part) {
    const float next = fmaxf(maximum, most);
    if (next == -INFINITY) return;
    const float keep = exp2f(maximum - next), factor = exp2f(most - next);
    sum = sum * keep + weights * factor;
    out = {out.x * keep + part.x * factor, out.y * keep + part.y * factor, out.z * keep + part.z * factor,
           out.w * keep + part.w * factor};
    maximum = next;
  }

  /// Waits for up to four splits: `first`, `first + step` and so on, those below `end`.
  template <int kD>
  __device__ void wait_and_add(const StackParams& p, int64_t row, int column, int first, int step, int end) {
    constexpr int kBatch = 4;
    uint2 state[kBatch];
    uint4 part[kBatch];
    exchange::Patience patience;
    bool missing = true;
    while (missing) {
      patience.spend();
      missing = false;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t at = row * p.attention.splits + min(first + i * step, end - 1);
        state[i] = exchange::load_pair(p.states + at);
        part[i] = exchange::load(p.parts + at * kD + column * 4);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        missing |= state[i].x == exchange::kNothing || state[i].y == exchange::kNothing ||
                   exchange::has_empty_word(part[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * step >= end) break;
      add(__uint_as_float(state[i].x), __uint_as_float(state[i].y),
          {__uint_as_float(part[i].x), __uint_as_float(part[i].y), __uint_as_float(part[i].z),
           __uint_as_float(part[i].w)});
    }
  }

  template <class T>
  __device__ uint2 quotient() const {
    const float by = 1 / (sum == 0 ? 1 : sum);  // 0: padding
    return {ptx::pack<T>(out.x * by, out.y * by), ptx::pack<T>(out.z * by, out.w * by)};
  }
};

/// Merges the splits of one row and head for all blocks.
template <class T, int kD>
__device__ __forceinline__ void join_splits(const StackParams& p, int row, char* shared) {
  constexpr int kVectors = kD / 4,
                kLanes = kStackConsumers / kVectors;  // lanes: threads that share the splits
  const int splits = p.attention.splits, column = threadIdx.x % kVectors, lane = threadIdx.x / kVectors;
  float2* states = reinterpret_cast<float2*>(shared);
  float4* outs = reinterpret_cast<float4*>(shared + kStackConsumers * 8);
  Merged merged;
  for (int split = lane; split < splits; split += 4 * kLanes)
    merged.wait_and_add<kD>(p, row, column, split, kLanes, splits);
  ptx::barrier_sync(kStackJoining, kStackConsumers);  // whatever was in shared memory has been read
  states[threadIdx.x] = {merged.maximum, merged.sum};
  outs[threadIdx.x] = merged.out;
  ptx::barrier_sync(kStackJoining, kStackConsumers);
  if (lane > 0) return;
  for (int i = 1; i < min(kLanes, splits); ++i) {
    const float2 state = states[i * kVectors + column];
    merged.add(state.x, state.y, outs[i * kVectors + column]);
  }
  exchange::store(attended<T>(p) + static_cast<int64_t>(row) * kD + column * 4, merged.quotient<T>());
}

/// A warp takes back what join_splits handed on.
template <class T, int kD>
__device__ __forceinline__ void take_back_joined(const StackParams& p, int row) {
  if (threadIdx.x % 32 < kD / 4) {
    exchange::store(attended<T>(p) + static_cast<int64_t>(row) * kD + threadIdx.x % 32 * 4,
                    uint2{exchange::kNothing, exchange::kNothing});
  }
}

#endif  // MODELTORCH_PTX_HOPPER

}  // namespace modeltorch::stack
