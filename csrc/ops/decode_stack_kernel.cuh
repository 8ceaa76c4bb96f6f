#pragma once

// decode_stack: the blocks of one launch, one a multiprocessor and all of them there at once, walk through
// the linears of all layers. In each, every warp multiplies its columns of x, which it holds in registers,
// with those of all rows of the block, as few_row_linear_direct.cuh does; the sums of the warps are added up
// in shared memory in a fixed order, and go to the other blocks by decode_stack_exchange.cuh.
//
// What has been handed on is taken back where every block has shown, by what it handed on since, that it has
// read it: in o what qkv and down wrote, in gate_up what attention wrote, in down what o wrote, and in qkv
// what gate_up wrote, for the last layer in the launch that follows. A warp of its own does that, and is done
// with it, as all blocks see it, before its block hands on the results of the next linear: a fence is waited
// for where nobody else waits.

#include "ops/decode_stack_attention.cuh"
#include "ops/decode_stack_exchange.cuh"
#include "ops/decode_stack_ring.cuh"

namespace modeltorch {
namespace stack {

// In a build that measures: thread 0 of every block notes its clock.
#ifdef MODELTORCH_STACK_STAMPS
#define MODELTORCH_STAMP(task, at)  \
  if (p.stamps && threadIdx.x == 0) \
  p.stamps[(int64_t{blockIdx.x} * 4 * p.layer_count + (task)) * 8 + (at)] = clock64()
#else
#define MODELTORCH_STAMP(task, at)
#endif

#if MODELTORCH_PTX_HOPPER

/// Where the warps that multiply have kept their sums, and so have read x; the keeper comes there too.
__device__ __forceinline__ void meet() {
  ptx::barrier_sync(kStackMeeting, kStackConsumers + 32);
}

/// x * gamma must not leave the range of the type; half floats therefore carry a power of two less.
template <class T>
inline constexpr float kRange = 1.0f;
template <>
inline constexpr float kRange<__half> = 1.0f / 32;

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
  template <int kGroups>
  using X = uint4[kGroups];

  /// `from`: the first column of this lane, from which on there are `columns`.
  template <int kGroups>
  __device__ void load_x(X<kGroups>& x, const T* from, int columns, bool wait) {
    const bool exists = lane / 4 < p.rows;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      x[i] = exists && i * kStackSpan < columns ? exchange::load(from + i * kStackSpan) : uint4{};
    }
    if (!wait) return;
    exchange::Patience patience;
    while (true) {
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (exchange::has_empty_half(x[i])) {
          x[i] = exchange::load(from + i * kStackSpan);
          missing = true;
        }
      }
      if (!__any_sync(~0u, missing)) return;
      patience.spend();
    }
  }

  /// x *= gamma, whose columns of this lane are at `gamma`. The sums of squares of x go to shared memory.
  template <int kGroups>
  __device__ void apply_gamma(X<kGroups>& x, const char* gamma, int columns, float* squares_of_warps) {
    float squares = 0;
    auto apply = [&](uint32_t& pair, uint32_t by) {
      const float2 a = ptx::unpack<T>(pair), b = ptx::unpack<T>(by);
      squares = fmaf(a.x, a.x, fmaf(a.y, a.y, squares));
      pair = ptx::pack<T>(a.x * b.x * kRange<T>, a.y * b.y * kRange<T>);
    };
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
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

  /// acc[lane's rows][lane's tokens] += x times `rows` rows, chunk by chunk. `lead`: bytes in front of the
  /// first.
  template <int kGroups>
  __device__ void multiply(float (&acc)[2][4], const X<kGroups>& x, int columns, int rows, int lead) {
    const int groups = columns / 32;
    const int low_row = min(lane / 4, rows - 1), high_row = min(lane / 4 + 8, rows - 1);
    const char* from = base + warp * 64 + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < kGroups; i += kStackChunkGroups) {
      if (i * kStackSpan >= columns) break;  // the same for all warps: all wait for and give back every chunk
      const int pitch = pitch_of(min(kStackChunk, columns - i * kStackSpan)), bytes = rows * pitch + lead;
      const int at = ring.place(bytes);
      const char *low = from + at + lead + low_row * pitch, *high = from + at + lead + high_row * pitch;
      lead = 0;
      ptx::barrier_wait(ring.full(ring.slot), ring.parity);
      uint4 a[kStackChunkGroups], b[kStackChunkGroups];
#pragma unroll
      for (int j = 0; j < kStackChunkGroups; ++j) {
        const bool exists = (i + j) * kStackWarps + warp < groups;
        a[j] = exists ? *reinterpret_cast<const uint4*>(low + j * kStackSpan * 2) : uint4{};
        b[j] = exists && rows > 8 ? *reinterpret_cast<const uint4*>(high + j * kStackSpan * 2) : uint4{};
      }
#pragma unroll
      for (int j = 0; j < kStackChunkGroups; ++j) {
        ptx::multiply_add<T>(acc[0], {a[j].x, b[j].x, a[j].y, b[j].y}, x[i + j].x, x[i + j].y);
        ptx::multiply_add<T>(acc[1], {a[j].z, b[j].z, a[j].w, b[j].w}, x[i + j].z, x[i + j].w);
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(ring.empty(ring.slot));
      ring.advance(at + bytes);
    }
  }

  __device__ float* sums() const {
    return reinterpret_cast<float*>(shared + p.red_offset + pass % 2 * p.red_bytes);
  }

  /// Of kJoinBytes: the sums that were read last.
  __device__ char* scratch() const { return shared + p.red_offset + (pass + 1) % 2 * p.red_bytes; }

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
    float part[kStackWarps];
#pragma unroll
    for (int w = 0; w < kStackWarps; ++w) part[w] = from[w * p.rows * p.red_pitch];
    return total(part);
  }

  __device__ static float total(const float (&part)[kStackWarps]) {
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  }

  __device__ float* squares(int kind) const {
    return reinterpret_cast<float*>(shared + kStackSquaresOffset) + kind / 2 * kStackWarps * kStackMaxRows;
  }

  __device__ float norm_factor(int kind, int token) const {
    float part[kStackWarps];
#pragma unroll
    for (int w = 0; w < kStackWarps; ++w) part[w] = squares(kind)[w * kStackMaxRows + token];
    return rsqrtf(total(part) * p.inverse_hidden + p.epsilon) / kRange<T>;
  }

  /// Brings the x of columns [k, k + columns) of a linear into the registers.
  template <int kGroups>
  __device__ void fetch_x(X<kGroups>& x, const StackShare& share, int layer, int kind, int k, int columns,
                          int first_rows) {
    const int column = warp * 32 + lane % 4 * 8, token = min(lane / 4, p.rows - 1);
    const int64_t offset = static_cast<int64_t>(token) * share.linear.k + k + column;
    const bool is_outside = kind == kStackQkv && layer == 0;
    const void* from = is_outside ? p.x : share.linear.x;
    load_x(x, static_cast<const T*>(from) + offset, columns - column, !is_outside);
    if (!share.linear.has_norm) return;
    // gamma comes in front of the first chunk.
    const int lead = columns * 2;
    const int at = ring.place(min(first_rows, kStackChunkRows) * pitch_of(min(kStackChunk, columns)) + lead);
    ptx::barrier_wait(ring.full(ring.slot), ring.parity);
    apply_gamma(x, base + at + column * 2, columns - column, squares(kind));
  }

  /// The first unit of a row that this thread finishes; the next ones are `unit_step` apart.
  __device__ int first_unit() const { return threadIdx.x & (unit_step() - 1); }
  __device__ int unit_step() const { return 1 << p.unit_shift; }
  __device__ int my_token() const { return threadIdx.x >> p.unit_shift; }

  /// The elements of one pass: bias, activation, residual, and off to the other blocks.
  __device__ void finish(const StackShare& share, int layer, int kind, int first, int units,
                         const float (&bias)[3]) const {
    const int token = my_token();
    if (token >= p.rows) return;
    float* residual = reinterpret_cast<float*>(shared + p.residual_offset) + token * share.count + first;
    T* to = static_cast<T*>(share.linear.y) + static_cast<int64_t>(token) * share.linear.units + share.first +
            first;
    int i = 0;
    for (int unit = first_unit(); unit < units; unit += unit_step(), ++i) {
      float value = sum_of(unit, token);
      if (kind == kStackQkv) {
        value = value * norm_factor(kind, token) + (i == 0 ? bias[0] : i == 1 ? bias[1] : bias[2]);
      } else if (kind == kStackGateUp) {
        const float factor = norm_factor(kind, token), up = sum_of(units + unit, token) * factor;
        value *= factor;
        value = __fdividef(value, 1.0f + __expf(-value)) * up;
      } else {
        value = ptx::to_float(ptx::from_float<T>(value + residual[unit]));
        residual[unit] = value;
        if (kind == kStackDown && layer == p.layer_count - 1) {
          static_cast<T*>(p.y)[to + unit - static_cast<T*>(share.linear.y)] = ptx::from_float<T>(value);
          continue;
        }
      }
      exchange::publish(to + unit, value);
    }
  }

  __device__ void fetch_bias(const StackLayer& layer, int first, int units, float (&bias)[3]) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int unit = first_unit() + i * unit_step();
      if (unit >= units) break;
      const int at = first + unit;
      const int part = (at >= p.part_begin[1]) + (at >= p.part_begin[2]);
      const void* from = part == 0 ? layer.bias[0] : part == 1 ? layer.bias[1] : layer.bias[2];
      const int begin = part == 0 ? 0 : part == 1 ? p.part_begin[1] : p.part_begin[2];
      if (from) bias[i] = ptx::to_float(__ldg(static_cast<const T*>(from) + at - begin));
    }
  }

  /// One pass over the columns of x: the sums of `units` units from `first` on, and, at the end of k, what is
  /// made of them.
  template <int kGroups>
  __device__ void run_pass(const X<kGroups>& x, const StackShare& share, int layer, int kind, int k,
                           int columns, int first, int units, const float (&bias)[3]) {
    const int rows = kind == kStackGateUp ? 2 * units : units;
    for (int row = 0; row < rows; row += kStackChunkRows) {
      const int chunk_rows = min(kStackChunkRows, rows - row);
      float acc[2][4] = {};
      if (k) resume(acc, row, chunk_rows);
      const bool has_lead = share.linear.has_norm && first == 0 && row == 0;
      multiply(acc, x, columns, chunk_rows, has_lead ? columns * 2 : 0);
      keep(acc, row, chunk_rows);
    }
    if (k + columns < share.linear.k) return;
    MODELTORCH_STAMP(layer * 4 + kind, 2);
    meet();
    MODELTORCH_STAMP(layer * 4 + kind, 3);
    finish(share, layer, kind, first, units, bias);
    ++pass;
    MODELTORCH_STAMP(layer * 4 + kind, 4);
  }

  /// Where x comes in several parts, or there is a bias, there is one pass.
  template <int kGroups>
  __device__ void run(int layer, int kind) {
    const StackShare share = shares[kind];
    const int pass_units = share.linear.pass_units;
    const int first_rows = min(pass_units, share.count) * (kind == kStackGateUp ? 2 : 1);
    float bias[3] = {};
    if (kind == kStackQkv) fetch_bias(p.layers[layer], share.first, share.count, bias);
    int k = 0;
    do {
      MODELTORCH_STAMP(layer * 4 + kind, 0);
      const int columns = min(kStackPart, share.linear.k - k);
      X<kGroups> x;
      fetch_x(x, share, layer, kind, k, columns, first_rows);
      MODELTORCH_STAMP(layer * 4 + kind, 1);
      for (int first = 0; first < share.count; first += pass_units)
        run_pass(x, share, layer, kind, k, columns, first, min(pass_units, share.count - first), bias);
      k += columns;
    } while (k < share.linear.k);
  }
};

/// This block's part of a linear.
__device__ __forceinline__ StackShare share_of(const StackLinear& linear) {
  const int64_t units = linear.units;
  const int first = static_cast<int>(units * blockIdx.x / gridDim.x);
  return {linear, first, static_cast<int>(units * (blockIdx.x + 1) / gridDim.x) - first, 0};
}

/// Which of `units` this block has, -1: none. They are spread over the blocks.
__device__ __forceinline__ int unit_of(int units) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int unit = (block * units + blocks - 1) / blocks;
  return unit < units && unit * blocks / units == block ? unit : -1;
}

template <class T>
__device__ __forceinline__ void take_back(const StackParams& p, const StackShare& share) {
  for (int i = threadIdx.x % 32; i < share.count * p.rows; i += 32) {
    const int64_t row = static_cast<int64_t>(i / share.count) * share.linear.units;
    exchange::store(static_cast<T*>(share.linear.y) + row + share.first + i % share.count,
                    static_cast<uint16_t>(exchange::kNothing));
  }
}

/// What the keeper does. `unit`, `joined`: what this block has of attention and of joining its parts, or -1.
template <class T, int kD>
__device__ __forceinline__ void run_keeper(const StackParams& p, int unit, int joined,
                                           const StackShare* shares) {
#pragma unroll 1
  for (int step = 0; step < 4 * p.layer_count; ++step) {
    const int kind = step % 4;
    const StackShare& share = shares[kind];
    for (int first = 0; first < share.count; first += share.linear.pass_units) meet();
    if (kind == kStackGateUp) {
      if (unit >= 0) take_back_attended<T, kD>(p, unit);
      if (joined >= 0) take_back_joined<T, kD>(p, joined);
    } else {
      take_back<T>(p, shares[kind == kStackO ? kStackQkv : kind == kStackQkv ? kStackGateUp : kStackO]);
      if (kind == kStackO) take_back<T>(p, shares[kStackDown]);
    }
    exchange::settle();
  }
}

/// What the warps do that multiply.
template <class T, int kD>
__device__ __forceinline__ void consume(const StackParams& p, int unit, int joined, char* shared,
                                        Consumer<T> consumer) {
  const StackShare own = consumer.shares[kStackO];
  for (int i = threadIdx.x; i < own.count * p.rows; i += kStackConsumers) {
    const int64_t from = static_cast<int64_t>(i / own.count) * own.linear.units + own.first + i % own.count;
    reinterpret_cast<float*>(shared + p.residual_offset)[i] = ptx::to_float(static_cast<const T*>(p.x)[from]);
  }
  const bool attends = unit >= 0;
  Attention<T, kD> attention(p, attends ? unit : 0, shared + p.attention_offset, attends);
  if (attends) attention.prefetch(p.layers[0]);
#ifdef MODELTORCH_STACK_STAMPS
  if (p.stamps && threadIdx.x == 0) p.stamps[int64_t{blockIdx.x} * 4 * p.layer_count * 8 + 6] = unit;
#endif
#pragma unroll 1
  for (int step = 0; step < 4 * p.layer_count; ++step) {  // one copy of the code, which is long enough
    const int layer = step / 4, kind = step % 4;
    if (kind == kStackO) {
      if (attends) attention.run(p.layers[layer], layer + 1 < p.layer_count ? &p.layers[layer + 1] : nullptr);
      MODELTORCH_STAMP(step, 5);
      if (joined >= 0) join_splits<T, kD>(p, joined, consumer.scratch());
    }
    if (p.linear[kind].k <= kStackChunk) {
      consumer.template run<kStackChunkGroups>(layer, kind);
    } else {
      consumer.template run<kStackGroups>(layer, kind);
    }
  }
}

#endif  // MODELTORCH_PTX_HOPPER

}  // namespace stack

/// Grid: at most as many blocks as there are multiprocessors, in a cooperative launch.
template <class T, int kD>
__global__ void __launch_bounds__(kStackThreads, 1)
    decode_stack_kernel(const __grid_constant__ StackParams p) {
#if MODELTORCH_PTX_HOPPER
  using namespace stack;
  extern __shared__ __align__(128) char shared[];
  ptx::launch_dependents();
  const int unit = unit_of(p.attention_units), joined = p.join_units ? unit_of(p.join_units) : -1;
  StackShare* shares = reinterpret_cast<StackShare*>(shared + kStackSharesOffset);
  char* base = shared + (unit < 0 ? p.ring_offset : p.ring_offset_attention);
  Ring ring{ptx::shared_address(shared), static_cast<int>(shared + p.ring_end - base)};
  if (threadIdx.x < 4) shares[threadIdx.x] = share_of(p.linear[threadIdx.x]);
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
  } else if (warp == kStackKeeper) {
    run_keeper<T, kD>(p, unit, joined, shares);
  } else {
    consume<T, kD>(p, unit, joined, shared, Consumer<T>{p, shared, base, shares, ring, warp, lane});
  }
#endif
}

}  // namespace modeltorch
