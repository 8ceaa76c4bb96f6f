#pragma once

// decode_stack: the blocks of one launch, one a multiprocessor and all of them there at once, walk through
// the linears of all layers. In each, every warp multiplies its columns of x, which it holds in registers,
// with those of all rows of the block, as few_row_linear_direct.cuh does; the sums of the warps are added up
// in shared memory in a fixed order, and go to the other blocks by exchange.cuh.
//
// What has been handed on is taken back where every block has shown, by what it handed on since, that it has
// read it: in o what qkv and down wrote, in gate_up what attention wrote, in down what o wrote, and in qkv
// what gate_up wrote, for the last layer in the launch that follows.

#include "ops/decode_stack_attention.cuh"
#include "ops/decode_stack_exchange.cuh"
#include "ops/decode_stack_ring.cuh"

namespace modeltorch {
namespace stack {

// In a build that measures: thread 0 of every block notes its clock.
#ifdef MODELTORCH_STACK_STAMPS
#define MODELTORCH_STAMP(task, at) \
  if (p.stamps && threadIdx.x == 0) p.stamps[(int64_t{blockIdx.x} * 4 * p.layer_count + (task)) * 8 + (at)] = clock64()
#else
#define MODELTORCH_STAMP(task, at)
#endif

#if MODELTORCH_PTX_HOPPER

/// x * gamma must not leave the range of the type; half floats therefore carry a power of two less.
template <class T>
inline constexpr float kRange = 1.0f;
template <>
inline constexpr float kRange<__half> = 1.0f / 32;

__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + __expf(-x));
}

/// A warp of those that multiply.
template <class T>
struct Consumer {
  const StackParams& p;
  char* shared;
  char* base;  // of the ring
  const StackShare* shares;
  Ring ring;
  int warp, lane;
  int pass = 0;  // of all linears so far

  /// Of token lane / 4: eight columns of each group.
  using X = uint4[kStackGroups];

  /// `from`: the first column of this lane, from which on there are `columns`.
  __device__ void load_x(X& x, const T* from, int columns, bool wait) {
    const bool exists = lane / 4 < p.rows;
#pragma unroll
    for (int i = 0; i < kStackGroups; ++i) {
      x[i] = exists && i * kStackSpan < columns ? exchange::load(from + i * kStackSpan) : uint4{};
    }
    if (!wait) return;
    exchange::Patience patience;
    while (true) {
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kStackGroups; ++i) {
        if (exchange::has_empty_half(x[i])) {
          x[i] = exchange::load(from + i * kStackSpan);
          missing = true;
        }
      }
      if (!__any_sync(~0u, missing)) return;
      patience.spend();
    }
  }

  __device__ void load_merged(X& x, const T* from, int columns) {
    const bool exists = lane / 4 < p.rows;
#pragma unroll
    for (int i = 0; i < kStackGroups; ++i) {
      x[i] = exists && i * kStackSpan < columns ? *reinterpret_cast<const uint4*>(from + i * kStackSpan)
                                                : uint4{};
    }
  }

  /// x *= gamma, whose columns of this lane are at `gamma`. The sums of squares of x go to shared memory.
  __device__ void apply_gamma(X& x, const char* gamma, int columns, float* squares_of_warps) {
    float squares = 0;
    auto apply = [&](uint32_t& pair, uint32_t by) {
      const float2 a = ptx::unpack<T>(pair), b = ptx::unpack<T>(by);
      squares = fmaf(a.x, a.x, fmaf(a.y, a.y, squares));
      pair = ptx::pack<T>(a.x * b.x * kRange<T>, a.y * b.y * kRange<T>);
    };
#pragma unroll
    for (int i = 0; i < kStackGroups; ++i) {
      if (i * kStackSpan >= columns) break;
      const uint4 g = *reinterpret_cast<const uint4*>(gamma + i * kStackSpan * 2);
      apply(x[i].x, g.x);
      apply(x[i].y, g.y);
      apply(x[i].z, g.z);
      apply(x[i].w, g.w);
    }
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    if (lane % 4 == 0) squares_of_warps[warp * kStackMaxRows + lane / 4] = squares;
  }

  /// acc[lane's rows][lane's tokens] += x times `rows` rows, chunk by chunk. `lead`: bytes in front of the first.
  __device__ void multiply(float (&acc)[2][4], const X& x, int columns, int rows, int lead) {
    const int groups = columns / 32;
#pragma unroll
    for (int i = 0; i < kStackGroups; i += 2) {
      if (i * kStackSpan >= columns) break;  // the same for all warps: all wait for and give back every chunk
      const int pitch = pitch_of(min(kStackChunk, columns - i * kStackSpan)), bytes = rows * pitch + lead;
      const int at = ring.place(bytes);
      const char* from = base + at + lead + warp * 64 + lane % 4 * 16;
      const char *low = from + min(lane / 4, rows - 1) * pitch, *high = from + min(lane / 4 + 8, rows - 1) * pitch;
      lead = 0;
      ptx::barrier_wait(ring.full(ring.slot), ring.parity);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if ((i + j) * kStackWarps + warp >= groups) break;
        const uint4 a = *reinterpret_cast<const uint4*>(low + j * kStackSpan * 2);
        const uint4 b = rows > 8 ? *reinterpret_cast<const uint4*>(high + j * kStackSpan * 2) : uint4{};
        ptx::multiply_add<T>(acc[0], {a.x, b.x, a.y, b.y}, x[i + j].x, x[i + j].y);
        ptx::multiply_add<T>(acc[1], {a.z, b.z, a.w, b.w}, x[i + j].z, x[i + j].w);
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(ring.empty(ring.slot));
      ring.advance(at + bytes);
    }
  }

  __device__ float* sums() const {
    return reinterpret_cast<float*>(shared + p.red_offset + pass % 2 * p.red_bytes);
  }

  /// The sums of this warp of rows lane / 4 and 8 more from `row`, and of two tokens: sums[warp][token][row].
  __device__ void keep(const float (&acc)[2][4], int row, int rows) const {
    const int token = lane % 4 * 2;
    float* to = sums() + (warp * p.rows + token) * p.red_pitch + row + lane / 4;
    if (token >= p.rows) return;
    const bool both = token + 1 < p.rows;
    to[0] = acc[0][0] + acc[1][0];
    if (both) to[p.red_pitch] = acc[0][1] + acc[1][1];
    if (rows <= 8) return;
    to[8] = acc[0][2] + acc[1][2];
    if (both) to[p.red_pitch + 8] = acc[0][3] + acc[1][3];
  }

  /// What was kept for the same rows before, as a start.
  __device__ void resume(float (&acc)[2][4], int row, int rows) const {
    const int token = lane % 4 * 2;
    const float* from = sums() + (warp * p.rows + token) * p.red_pitch + row + lane / 4;
    if (token >= p.rows) return;
    const bool both = token + 1 < p.rows;
    acc[0][0] = from[0];
    if (both) acc[0][1] = from[p.red_pitch];
    if (rows <= 8) return;
    acc[0][2] = from[8];
    if (both) acc[0][3] = from[p.red_pitch + 8];
  }

  __device__ float sum_of(int row, int token) const {
    const float* from = sums() + token * p.red_pitch + row;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kStackWarps; ++w) sum += from[w * p.rows * p.red_pitch];
    return sum;
  }

  __device__ float* squares(int layer) const {
    return reinterpret_cast<float*>(shared + kStackSquaresOffset) +
           layer % 2 * kStackWarps * kStackMaxRows;
  }

  __device__ float norm_factor(int kind, int token) const {
    if (kind != kStackQkv && kind != kStackGateUp) return 1;
    const float* of = squares(kind / 2) + token;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kStackWarps; ++w) sum += of[w * kStackMaxRows];
    return rsqrtf(sum / static_cast<float>(p.linear[kind].k) + p.epsilon) / kRange<T>;
  }

  /// Brings the x of columns [k, k + columns) of a linear into the registers.
  __device__ void fetch_x(X& x, int layer, int kind, int k, int columns, int first_rows) {
    const int column = warp * 32 + lane % 4 * 8, token = min(lane / 4, p.rows - 1);
    const int64_t offset = static_cast<int64_t>(token) * p.linear[kind].k + k + column;
    if (kind == kStackO && p.attention.splits > 1) {
      return load_merged(x, reinterpret_cast<const T*>(shared + p.x_offset) + offset, columns - column);
    }
    const bool outside = kind == kStackQkv && layer == 0;
    const void* from = outside              ? p.x
                       : kind == kStackQkv  ? p.hidden
                       : kind == kStackO    ? p.attended
                       : kind == kStackDown ? p.inner
                                            : p.middle;
    load_x(x, static_cast<const T*>(from) + offset, columns - column, !outside);
    if (kind != kStackQkv && kind != kStackGateUp) return;
    // gamma comes in front of the first chunk.
    const int lead = columns * 2;
    const int at = ring.place(min(first_rows, kStackChunkRows) * pitch_of(min(kStackChunk, columns)) +
                              lead);
    ptx::barrier_wait(ring.full(ring.slot), ring.parity);
    apply_gamma(x, base + at + column * 2, columns - column, squares(kind / 2));
  }

  /// The elements of one pass: bias, activation, residual, and off to the other blocks.
  __device__ void finish(int layer, int kind, int first, int units, const float (&bias)[2]) const {
    const int token = warp % 8;
    if (token >= p.rows) return;
    const StackLinear& linear = p.linear[kind];
    const float factor = norm_factor(kind, token);
    float* residual =
        reinterpret_cast<float*>(shared + p.residual_offset) + token * shares[kStackO].count + first;
    const int64_t offset = static_cast<int64_t>(token) * linear.units + shares[kind].first + first;
    int i = 0;
    for (int unit = warp / 8 * 32 + lane; unit < units; unit += 64, ++i) {
      float value = sum_of(unit, token) * factor;
      if (kind == kStackQkv) {
        exchange::publish(static_cast<T*>(p.qkv) + offset + unit, value + (i ? bias[1] : bias[0]));
      } else if (kind == kStackGateUp) {
        value = silu(value) * (sum_of(units + unit, token) * factor);
        exchange::publish(static_cast<T*>(p.inner) + offset + unit, value);
      } else {
        value = ptx::to_float(ptx::from_float<T>(value + residual[unit]));
        residual[unit] = value;
        if (kind == kStackDown && layer == p.layer_count - 1) {
          static_cast<T*>(p.y)[offset + unit] = ptx::from_float<T>(value);
        } else {
          exchange::publish(static_cast<T*>(kind == kStackO ? p.middle : p.hidden) + offset + unit, value);
        }
      }
    }
  }

  /// Takes back what this block wrote that everybody has read when linear `kind` is done, by warps that have
  /// nothing to finish where there are such.
  __device__ void take_back(int kind) const {
    if (kind == kStackGateUp) return;
    take_back(kind == kStackO ? kStackQkv : kind == kStackQkv ? kStackGateUp : kStackO,
              kind == kStackO ? p.qkv : kind == kStackQkv ? p.inner : p.middle);
    if (kind == kStackO) take_back(kStackDown, p.hidden);
  }

  __device__ void take_back(int kind, void* from) const {
    const int token = (warp + 4) % 8;
    if (token >= p.rows) return;
    T* to = static_cast<T*>(from) + static_cast<int64_t>(token) * p.linear[kind].units + shares[kind].first;
    for (int unit = warp / 8 * 32 + lane; unit < shares[kind].count; unit += 64)
      exchange::store(to + unit, static_cast<uint16_t>(exchange::kNothing));
  }

  __device__ void fetch_bias(const StackLayer& layer, int first, int units, float (&bias)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = warp / 8 * 32 + lane + i * 64;
      if (unit >= units) break;
      const int at = shares[kStackQkv].first + first + unit;
      const int part = (at >= p.part_begin[1]) + (at >= p.part_begin[2]);
      const void* from = part == 0 ? layer.bias[0] : part == 1 ? layer.bias[1] : layer.bias[2];
      const int begin = part == 0 ? 0 : part == 1 ? p.part_begin[1] : p.part_begin[2];
      if (from) bias[i] = ptx::to_float(__ldg(static_cast<const T*>(from) + at - begin));
    }
  }

  /// One pass over the columns of x: the sums of `units` units from `first` on, and, at the end of k, what is
  /// made of them.
  __device__ void run_pass(const X& x, int layer, int kind, int k, int columns, int first, int units) {
    const int rows = kind == kStackGateUp ? 2 * units : units;
    const bool is_normed = kind == kStackQkv || kind == kStackGateUp;
    float bias[2] = {};
    if (kind == kStackQkv) fetch_bias(p.layers[layer], first, units, bias);
    for (int row = 0; row < rows; row += kStackChunkRows) {
      const int chunk_rows = min(kStackChunkRows, rows - row);
      float acc[2][4] = {};
      if (k) resume(acc, row, chunk_rows);
      multiply(acc, x, columns, chunk_rows, is_normed && first == 0 && row == 0 ? columns * 2 : 0);
      keep(acc, row, chunk_rows);
    }
    if (k + columns < p.linear[kind].k) return;
    MODELTORCH_STAMP(layer * 4 + kind, 2);
    ptx::barrier_sync(1, kStackConsumers);
    MODELTORCH_STAMP(layer * 4 + kind, 3);
    finish(layer, kind, first, units, bias);
    ++pass;
    MODELTORCH_STAMP(layer * 4 + kind, 4);
  }

  /// Where x comes in several parts, there is one pass.
  __device__ void run(int layer, int kind) {
    const StackLinear linear = p.linear[kind];
    const int count = shares[kind].count;
    const int first_rows = min(linear.pass_units, count) * (kind == kStackGateUp ? 2 : 1);
    int k = 0;
    do {
      MODELTORCH_STAMP(layer * 4 + kind, 0);
      const int columns = min(kStackPart, linear.k - k);
      X x;
      fetch_x(x, layer, kind, k, columns, first_rows);
      MODELTORCH_STAMP(layer * 4 + kind, 1);
      for (int first = 0; first < count; first += linear.pass_units)
        run_pass(x, layer, kind, k, columns, first, min(linear.pass_units, count - first));
      k += columns;
    } while (k < linear.k);
  }
};

/// This block's units of a linear.
__device__ __forceinline__ StackShare share_of(int units) {
  const int first = static_cast<int>(static_cast<int64_t>(units) * blockIdx.x / gridDim.x);
  return {first, static_cast<int>(static_cast<int64_t>(units) * (blockIdx.x + 1) / gridDim.x) - first};
}

/// The unit of attention of this block, -1: none. They are spread over the blocks.
__device__ __forceinline__ int attention_unit(const StackParams& p) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int unit = (block * p.attention_units + blocks - 1) / blocks;
  return unit < p.attention_units && unit * blocks / p.attention_units == block ? unit : -1;
}

/// What the warps do that multiply.
template <class T, int kD>
__device__ __forceinline__ void consume(const StackParams& p, int unit, char* shared, Consumer<T> consumer) {
  const StackShare own = consumer.shares[kStackO];
  for (int i = threadIdx.x; i < own.count * p.rows; i += kStackConsumers) {
    const int64_t from =
        static_cast<int64_t>(i / own.count) * p.linear[kStackO].units + own.first + i % own.count;
    reinterpret_cast<float*>(shared + p.residual_offset)[i] = ptx::to_float(static_cast<const T*>(p.x)[from]);
  }
  const bool attends = unit >= 0 && consumer.warp < 8;
  Attention<T, kD> attention(p, attends ? unit : 0, shared + p.attention_offset, attends);
  if (attends) attention.prefetch(p.layers[0]);
#ifdef MODELTORCH_STACK_STAMPS
  if (p.stamps && threadIdx.x == 0) p.stamps[int64_t{blockIdx.x} * 4 * p.layer_count * 8 + 6] = unit;
#endif
#pragma unroll 1
  for (int step = 0; step < 4 * p.layer_count; ++step) {  // one copy of the code, which is long enough
    const int layer = step / 4, kind = step % 4;
    if (kind == kStackO) {
      if (attends)
        attention.run(p.layers[layer], layer + 1 < p.layer_count ? &p.layers[layer + 1] : nullptr);
      MODELTORCH_STAMP(step, 5);
      if (p.attention.splits > 1) merge_splits<T, kD>(p, shared + p.x_offset);
    }
    consumer.run(layer, kind);
    consumer.take_back(kind);
    if (kind == kStackGateUp && unit >= 0) take_back_attended<T, kD>(p, unit);
  }
}

#endif  // MODELTORCH_PTX_HOPPER

}  // namespace stack

/// Grid: at most as many blocks as there are multiprocessors, in a cooperative launch.
template <class T, int kD>
__global__ void __launch_bounds__(kStackThreads, 1) decode_stack_kernel(const __grid_constant__ StackParams p) {
#if MODELTORCH_PTX_HOPPER
  using namespace stack;
  extern __shared__ __align__(128) char shared[];
  ptx::launch_dependents();
  const int unit = attention_unit(p);
  StackShare* shares = reinterpret_cast<StackShare*>(shared + kStackSharesOffset);
  char* base = shared + (unit < 0 ? p.ring_offset : p.ring_offset_attention);
  Ring ring{ptx::shared_address(shared), static_cast<int>(shared + p.ring_end - base)};
  if (threadIdx.x < 4) shares[threadIdx.x] = share_of(p.linear[threadIdx.x].units);
  if (threadIdx.x == kStackConsumers) {
    for (int i = 0; i < kStackSlots; ++i) {
      ptx::barrier_init(ring.full(i), 1);
      ptx::barrier_init(ring.empty(i), kStackWarps);
    }
    ptx::publish_barriers();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == kStackWarps) {
    Producer{p, shares, ring, ptx::shared_address(base), ptx::evict_first_policy(), lane}.run();
  } else {
    consume<T, kD>(p, unit, shared, Consumer<T>{p, shared, base, shares, ring, warp, lane});
  }
#endif
}

}  // namespace modeltorch
