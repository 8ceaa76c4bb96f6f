#pragma once

// One cluster of blocks serves one sequence and one key-value head (with up to 16 of its query heads): each
// block takes a part of the context, each of its four warps a part of that, sixteen tokens at a time through
// a ring of its own in shared memory. The new token never goes through the cache: the first warp of the first
// block starts from it. Warps meet in shared memory, blocks through the shared memory of their cluster, in a
// fixed order.

#include "ops/ptx.cuh"

namespace modeltorch {

inline constexpr int kDecodeTokens = 16;  // of a tile
inline constexpr int kDecodeHeads = 16;   // query heads of a block, at most
inline constexpr int kDecodeMaxSplits = 16;

struct DecodeAttentionParams {
  const void *qkv, *cos, *sin;
  void *k_cache, *v_cache, *y;
  const int32_t *block_tables, *slots, *seq_len;
  int32_t* fault;
  int64_t table_width;
  int heads, kv_heads, block_size, blocks, splits, head_tiles;
  int block_shift;   // log2 of block_size, or -1
  float scale_log2;  // scale * log2(e)
};

/// Sizes in shared memory for one head size, number of warps and stages of each warp's ring.
template <int kDv, int kWarpsv, int kStagesv>
struct DecodeShape {
  static constexpr int kD = kDv;
  static constexpr int kWarps = kWarpsv;
  static constexpr int kStages = kStagesv;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPitch = kD * 2 + 16;  // bytes of a row; eight rows meet no bank twice
  static constexpr int kTileBytes = 2 * kDecodeTokens * kPitch;
  static constexpr int kSumPitch = kD + 8;  // floats
  static constexpr int kSumBytes = kDecodeHeads * kSumPitch * 4;
  static constexpr int kRingBytes =
      kStages * kTileBytes > kSumBytes ? kStages * kTileBytes : kSumBytes;  // of a warp
  static constexpr int kQueryOffset = kWarps * kRingBytes;
  static constexpr int kNewKeyOffset = kQueryOffset + kDecodeHeads * kPitch;
  static constexpr int kNewValueOffset = kNewKeyOffset + kPitch;
  static constexpr int kStateOffset = kNewValueOffset + kPitch;  // float [warps][2][heads]: maxima and sums
  // What the blocks of the cluster send: their maxima and sums, and their parts of the outputs that are
  // joined here.
  static constexpr int kSentStateOffset = kStateOffset + kWarps * 2 * kDecodeHeads * 4;
  static constexpr int kSentOffset = kSentStateOffset + kDecodeMaxSplits * 2 * kDecodeHeads * 4;
  static constexpr int kAllBytes = kSentOffset + (kDecodeHeads * kD / 4 + kDecodeMaxSplits) * 16;

  static int bytes(int splits) { return splits > 1 ? kAllBytes : kSentStateOffset; }
};

namespace decode {

/// What a block works on.
struct Place {
  int split, kv_head, head, heads, sequence;  // head: the first of `heads` query heads
  int length, cached;                         // context, and how much of it lies in the cache

  __device__ explicit Place(const DecodeAttentionParams& p)
      : Place(p, blockIdx.x, blockIdx.y / p.head_tiles, blockIdx.y % p.head_tiles, blockIdx.z) {}

  /// `tile`: which sixteen of the query heads of `kv_head`.
  __device__ Place(const DecodeAttentionParams& p, int split, int kv_head, int tile, int sequence)
      : split(split), kv_head(kv_head), sequence(sequence) {
    const int group = p.heads / p.kv_heads;
    head = kv_head * group + tile * kDecodeHeads;
    heads = min(kDecodeHeads, group - tile * kDecodeHeads);
    length = p.seq_len[sequence];
    const int64_t room = p.table_width * p.block_size;
    if (length > room || length < 0) {
      if (threadIdx.x == 0) *p.fault = 1;
      length = length < 0 ? 0 : static_cast<int>(room);
    }
    cached = max(length - 1, 0);
  }
};

/// The row of the cache, all blocks in one, of the token of a tile that this lane looks up; -1: beyond what
/// the cache holds, or in a bad block.
__device__ __forceinline__ int find_row(const DecodeAttentionParams& p, const Place& place, int tile) {
  const int token = tile * kDecodeTokens + (threadIdx.x & (kDecodeTokens - 1));
  if (token >= place.cached) return -1;
  const int entry = p.block_shift >= 0 ? token >> p.block_shift : token / p.block_size;
  const int block = __ldg(p.block_tables + place.sequence * p.table_width + entry);
  if (block >= 0 && block < p.blocks) return block * p.block_size + token - entry * p.block_size;
  *p.fault = 1;
  return -1;
}

/// Starts the copies of one tile of keys and values, of the rows that the lanes found. No row: zeros.
template <class T, class Shape>
__device__ __forceinline__ void load_tile(const DecodeAttentionParams& p, const Place& place, int row,
                                          uint32_t to) {
  const int lane = threadIdx.x & 31;
  constexpr int kVectors = Shape::kD / 8;
#pragma unroll
  for (int i = 0; i < kDecodeTokens * kVectors / 32; ++i) {
    const int vector = i * 32 + lane;
    const int at = vector / kVectors, column = vector % kVectors * 8;
    const int from = __shfl_sync(~0u, row, at);
    const int64_t offset =
        (static_cast<int64_t>(max(from, 0)) * p.kv_heads + place.kv_head) * Shape::kD + column;
    const uint32_t there = to + at * Shape::kPitch + column * 2;
    ptx::copy_async_16(there, static_cast<const T*>(p.k_cache) + offset, from >= 0);
    ptx::copy_async_16(there + kDecodeTokens * Shape::kPitch, static_cast<const T*>(p.v_cache) + offset,
                       from >= 0);
  }
}

/// Eight elements of both halves of a head, rotated: x * cos + cat(-x2, x1) * sin. cos and sin: of either
/// half.
template <class T>
__device__ __forceinline__ void rotate(uint4& low, uint4& high, const uint4 (&cos)[2],
                                       const uint4 (&sin)[2]) {
  auto turn = [](uint32_t& a, uint32_t& b, uint32_t ca, uint32_t cb, uint32_t sa, uint32_t sb) {
    const float2 x = ptx::unpack<T>(a), y = ptx::unpack<T>(b);
    const float2 cx = ptx::unpack<T>(ca), cy = ptx::unpack<T>(cb), sx = ptx::unpack<T>(sa),
                 sy = ptx::unpack<T>(sb);
    a = ptx::pack<T>(x.x * cx.x - y.x * sx.x, x.y * cx.y - y.y * sx.y);
    b = ptx::pack<T>(y.x * cy.x + x.x * sy.x, y.y * cy.y + x.y * sy.y);
  };
  turn(low.x, high.x, cos[0].x, cos[1].x, sin[0].x, sin[1].x);
  turn(low.y, high.y, cos[0].y, cos[1].y, sin[0].y, sin[1].y);
  turn(low.z, high.z, cos[0].z, cos[1].z, sin[0].z, sin[1].z);
  turn(low.w, high.w, cos[0].w, cos[1].w, sin[0].w, sin[1].w);
}

/// Rotates this block's query heads into shared memory. The last block of a cluster does the same with the
/// new key, takes the new value, and writes both to the cache if it is the one of its key-value head to do
/// so.
template <class T, class Shape>
__device__ __forceinline__ void fetch_new_token(const DecodeAttentionParams& p, const Place& place,
                                                char* shared) {
  constexpr int kD = Shape::kD, kHalf = kD / 2, kVectors = kHalf / 8;
  const T* row =
      static_cast<const T*>(p.qkv) + static_cast<int64_t>(place.sequence) * (p.heads + 2 * p.kv_heads) * kD;
  const T* cos = static_cast<const T*>(p.cos) + static_cast<int64_t>(place.sequence) * kD;
  const T* sin = static_cast<const T*>(p.sin) + static_cast<int64_t>(place.sequence) * kD;
  const bool owner = place.split == p.splits - 1;
  int64_t cache_row = -1;
  if (owner && blockIdx.y % p.head_tiles == 0) {
    cache_row = p.slots[place.sequence];
    if (cache_row < -1 || cache_row >= static_cast<int64_t>(p.blocks) * p.block_size) {
      *p.fault = 1;
      cache_row = -1;
    }
  }
  const int64_t cache_offset = (cache_row * p.kv_heads + place.kv_head) * kD;
  auto vector = [](void* to) -> uint4& { return *static_cast<uint4*>(to); };

  for (int i = threadIdx.x; i < (place.heads + owner) * kVectors; i += Shape::kThreads) {
    const int head = i / kVectors, column = i % kVectors * 8;
    const bool key = head == place.heads;
    const T* from =
        row + static_cast<int64_t>(key ? p.heads + place.kv_head : place.head + head) * kD + column;
    uint4 low = __ldcg(reinterpret_cast<const uint4*>(from));
    uint4 high = __ldcg(reinterpret_cast<const uint4*>(from + kHalf));
    auto halves = [&](const T* from, uint4(&to)[2]) {
      to[0] = __ldcg(reinterpret_cast<const uint4*>(from + column));
      to[1] = __ldcg(reinterpret_cast<const uint4*>(from + column + kHalf));
    };
    uint4 turn_cos[2], turn_sin[2];
    halves(cos, turn_cos);
    halves(sin, turn_sin);
    rotate<T>(low, high, turn_cos, turn_sin);
    char* to =
        shared + (key ? Shape::kNewKeyOffset : Shape::kQueryOffset + head * Shape::kPitch) + column * 2;
    vector(to) = low;
    vector(to + kHalf * 2) = high;
    if (key && cache_row >= 0) {
      vector(static_cast<T*>(p.k_cache) + cache_offset + column) = low;
      vector(static_cast<T*>(p.k_cache) + cache_offset + column + kHalf) = high;
    }
  }
  if (!owner) return;
  for (int i = Shape::kThreads - 1 - threadIdx.x; i < kD / 8; i += Shape::kThreads) {
    const uint4 value = __ldcg(reinterpret_cast<const uint4*>(
        row + static_cast<int64_t>(p.heads + p.kv_heads + place.kv_head) * kD + i * 8));
    vector(shared + Shape::kNewValueOffset + i * 16) = value;
    if (cache_row >= 0) vector(static_cast<T*>(p.v_cache) + cache_offset + i * 8) = value;
  }
}

/// The running softmax of one warp: rows lane / 4 and lane / 4 + 8 of the query heads.
template <class Shape>
struct State {
  float maximum[2] = {-INFINITY, -INFINITY};  // of scores times log2(e)
  float sum[2] = {};                          // of this lane's columns
  float out[Shape::kD / 8][4] = {};
};

/// Scores of sixteen tokens, unscaled. Two sums each, so that fewer multiplications wait for one another.
template <class T, class Shape>
__device__ __forceinline__ void score(float (&s)[2][4], uint32_t query, uint32_t keys) {
  float odd[2][4] = {};
#pragma unroll
  for (int i = 0; i < Shape::kD / 16; ++i) {
    float (&sums)[2][4] = i % 2 ? odd : s;
    uint32_t q[4], k[4];
    ptx::load_matrix_x4(q, query + i * 32);
    ptx::load_matrix_x4(k, keys + i * 32);
    ptx::multiply_add<T>(sums[0], q, k[0], k[1]);
    ptx::multiply_add<T>(sums[1], q, k[2], k[3]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i / 4][i % 4] += odd[i / 4][i % 4];
}

/// Puts the new token into row `row` of a tile.
template <class Shape>
__device__ __forceinline__ void place_new_token(char* shared, char* tile, int row) {
  for (int i = threadIdx.x & 31; i < Shape::kD / 8; i += 32) {
    uint4* to = reinterpret_cast<uint4*>(tile + row * Shape::kPitch) + i;
    *to = reinterpret_cast<const uint4*>(shared + Shape::kNewKeyOffset)[i];
    to[kDecodeTokens * Shape::kPitch / 16] =
        reinterpret_cast<const uint4*>(shared + Shape::kNewValueOffset)[i];
  }
  __syncwarp();
}

/// Adds one tile of which the first `tokens` count.
template <class T, class Shape>
__device__ __forceinline__ void add_tile(const DecodeAttentionParams& p, State<Shape>& state, uint32_t query,
                                         uint32_t tile, int tokens) {
  const int lane = threadIdx.x & 31;
  float s[2][4] = {};
  score<T, Shape>(s, query, tile + (lane / 16 * 8 + lane % 8) * Shape::kPitch + lane / 8 % 2 * 16);
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float maximum = state.maximum[r];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float& x = s[j / 2][2 * r + j % 2];
      x = j / 2 * 8 + lane % 4 * 2 + j % 2 < tokens ? x * p.scale_log2 : -INFINITY;
      maximum = fmaxf(maximum, x);
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
    factor[r] = exp2f(state.maximum[r] - maximum);
    state.maximum[r] = maximum;
    state.sum[r] *= factor[r];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float& x = s[j / 2][2 * r + j % 2];
      x = exp2f(x - maximum);
      state.sum[r] += x;
    }
  }
  const uint32_t weights[4] = {ptx::pack<T>(s[0][0], s[0][1]), ptx::pack<T>(s[0][2], s[0][3]),
                               ptx::pack<T>(s[1][0], s[1][1]), ptx::pack<T>(s[1][2], s[1][3])};
  const uint32_t values = tile + (kDecodeTokens + lane % 16) * Shape::kPitch + lane / 16 * 16;
#pragma unroll
  for (int i = 0; i < Shape::kD / 16; ++i) {
    uint32_t v[4];
    ptx::load_matrix_x4_transposed(v, values + i * 32);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float (&out)[4] = state.out[2 * i + j];
      out[0] *= factor[0];
      out[1] *= factor[0];
      out[2] *= factor[1];
      out[3] *= factor[1];
      ptx::multiply_add<T>(out, weights, v[2 * j], v[2 * j + 1]);
    }
  }
}

/// Writes the state of this warp to where its ring was.
template <class Shape>
__device__ __forceinline__ void store_state(State<Shape>& state, int heads, char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  float* out = reinterpret_cast<float*>(shared + warp * Shape::kRingBytes);
  float* scalars = reinterpret_cast<float*>(shared + Shape::kStateOffset) + warp * 2 * kDecodeHeads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int head = lane / 4 + 8 * r;
    if (head >= heads) continue;
    if (lane % 4 == 0) {
      scalars[head] = state.maximum[r];
      scalars[kDecodeHeads + head] = sum;
    }
#pragma unroll
    for (int i = 0; i < Shape::kD / 8; ++i) {
      *reinterpret_cast<float2*>(out + head * Shape::kSumPitch + i * 8 + lane % 4 * 2) = {
          state.out[i][2 * r], state.out[i][2 * r + 1]};
    }
  }
}

/// Weights of several partial softmaxes in their union, and the union's maximum and sum.
template <int kParts>
struct Merge {
  float factor[kParts], maximum = -INFINITY, sum = 0;

  template <class Load>
  __device__ Merge(int parts, Load load) {
    float sums[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      factor[i] = i < parts ? load(i, 0) : -INFINITY;
      sums[i] = i < parts ? load(i, 1) : 0;
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) maximum = fmaxf(maximum, factor[i]);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      factor[i] = maximum == -INFINITY ? 0 : exp2f(factor[i] - maximum);
      sum += factor[i] * sums[i];
    }
  }
};

template <class T>
__device__ __forceinline__ void store_quotient(T* to, float4 sum, float by) {
  *reinterpret_cast<uint2*>(to) = {ptx::pack<T>(sum.x / by, sum.y / by),
                                   ptx::pack<T>(sum.z / by, sum.w / by)};
}

/// Joins what the blocks of the cluster sent here.
template <class T, class Shape, int kMost>
__device__ __forceinline__ void join_splits(const DecodeAttentionParams& p, const Place& place,
                                            const char* shared, T* y, int vectors, int share) {
  constexpr int kVectors = Shape::kD / 4;
  const float* states = reinterpret_cast<const float*>(shared + Shape::kSentStateOffset);
  const float4* sent = reinterpret_cast<const float4*>(shared + Shape::kSentOffset);
  const int mine = min(share, vectors - place.split * share);
  for (int i = threadIdx.x; i < mine; i += Shape::kThreads) {
    const int v = place.split * share + i, head = v / kVectors;
    const Merge<kMost> merge(
        p.splits, [&](int split, int what) { return states[(split * 2 + what) * kDecodeHeads + head]; });
    float4 sum{};
#pragma unroll
    for (int split = 0; split < kMost; ++split) {
      if (split >= p.splits) break;
      const float4 part = sent[split * share + i];
      sum.x += merge.factor[split] * part.x;
      sum.y += merge.factor[split] * part.y;
      sum.z += merge.factor[split] * part.z;
      sum.w += merge.factor[split] * part.w;
    }
    store_quotient(y + v * 4, sum, merge.sum);
  }
}

/// Joins the warps, then the blocks of the cluster, and writes y. Elements go by fours; block r of the
/// cluster joins the r-th share of them.
template <class T, class Shape>
__device__ __forceinline__ void join(const DecodeAttentionParams& p, const Place& place, char* shared) {
  constexpr int kVectors = Shape::kD / 4;
  const int vectors = place.heads * kVectors;
  [[maybe_unused]] const int share = (vectors + p.splits - 1) / p.splits;
  const float* scalars = reinterpret_cast<const float*>(shared + Shape::kStateOffset);
  T* y = static_cast<T*>(p.y) + (static_cast<int64_t>(place.sequence) * p.heads + place.head) * Shape::kD;
  for (int v = threadIdx.x; v < vectors; v += Shape::kThreads) {
    const int head = v / kVectors;
    const Merge<Shape::kWarps> merge(
        Shape::kWarps, [&](int warp, int what) { return scalars[(warp * 2 + what) * kDecodeHeads + head]; });
    const char* out = shared + head * Shape::kSumPitch * 4 + v % kVectors * 16;
    float4 sum{};
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) {
      const float4 part = *reinterpret_cast<const float4*>(out + warp * Shape::kRingBytes);
      sum.x += merge.factor[warp] * part.x;
      sum.y += merge.factor[warp] * part.y;
      sum.z += merge.factor[warp] * part.z;
      sum.w += merge.factor[warp] * part.w;
    }
    if (p.splits == 1) {
      store_quotient(y + v * 4, sum, merge.sum);
      continue;
    }
#if MODELTORCH_PTX_HOPPER
    ptx::store_remote(
        ptx::shared_address(shared + Shape::kSentOffset) + (place.split * share + v % share) * 16, v / share,
        sum);
    if (v % kVectors < p.splits) {
      const uint32_t to =
          ptx::shared_address(shared + Shape::kSentStateOffset) + (place.split * 2 * kDecodeHeads + head) * 4;
      ptx::store_remote(to, v % kVectors, merge.maximum);
      ptx::store_remote(to + kDecodeHeads * 4, v % kVectors, merge.sum);
    }
#endif
  }
#if MODELTORCH_PTX_HOPPER
  if (p.splits == 1) return;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (p.splits <= 8) {
    join_splits<T, Shape, 8>(p, place, shared, y, vectors, share);
  } else {
    join_splits<T, Shape, kDecodeMaxSplits>(p, place, shared, y, vectors, share);
  }
#endif
}

}  // namespace decode

/// Grid: (splits, kv_heads * head_tiles, sequences), clusters of `splits` blocks.
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
  using namespace decode;
  extern __shared__ __align__(128) char shared[];
  ptx::launch_dependents();
  const Place place(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int tiles = (place.length + kDecodeTokens - 1) / kDecodeTokens;
  const int workers = p.splits * Shape::kWarps, worker = place.split * Shape::kWarps + warp;
  int tile = static_cast<int>(static_cast<int64_t>(tiles) * worker / workers);
  const int end = static_cast<int>(static_cast<int64_t>(tiles) * (worker + 1) / workers);
  char* ring = shared + warp * Shape::kRingBytes;
  const uint32_t ring_address = ptx::shared_address(ring);

  for (int stage = 0; stage < Shape::kStages; ++stage) {
    if (tile + stage < end) {
      load_tile<T, Shape>(p, place, find_row(p, place, tile + stage),
                          ring_address + stage * Shape::kTileBytes);
    }
    ptx::commit_copies();
  }
  int next_row = find_row(p, place, tile + Shape::kStages);  // looked up a tile ahead
  ptx::wait_for_dependencies();
  if (place.length == 0) {
    if (place.split != 0) return;
    T* y = static_cast<T*>(p.y) + (static_cast<int64_t>(place.sequence) * p.heads + place.head) * Shape::kD;
    for (int e = threadIdx.x; e < place.heads * Shape::kD; e += Shape::kThreads) y[e] = ptx::from_float<T>(0);
    return;
  }
#if MODELTORCH_PTX_HOPPER
  if (p.splits > 1) ptx::cluster_arrive_relaxed();  // so that nobody sends to a block that has not begun
#endif
  fetch_new_token<T, Shape>(p, place, shared);
  __syncthreads();

  const uint32_t query = ptx::shared_address(shared + Shape::kQueryOffset) +
                         min(lane % 16, place.heads - 1) * Shape::kPitch + lane / 16 * 16;
  State<Shape> state;
  for (int stage = 0; tile < end; ++tile) {
    ptx::wait_for_copies<Shape::kStages - 1>();
    __syncwarp();
    const int tokens = place.length - tile * kDecodeTokens;
    const int here = stage * Shape::kTileBytes;
    if (tokens <= kDecodeTokens) place_new_token<Shape>(shared, ring + here, tokens - 1);
    add_tile<T, Shape>(p, state, query, ring_address + here, tokens);
    __syncwarp();
    if (tile + Shape::kStages < end) load_tile<T, Shape>(p, place, next_row, ring_address + here);
    next_row = find_row(p, place, tile + Shape::kStages + 1);
    ptx::commit_copies();
    if (++stage == Shape::kStages) stage = 0;
  }
  ptx::wait_for_copies<0>();
  __syncwarp();
  store_state(state, place.heads, shared);
#if MODELTORCH_PTX_HOPPER
  if (p.splits > 1) ptx::cluster_wait();
#endif
  __syncthreads();
  join<T, Shape>(p, place, shared);
}

}  // namespace modeltorch
