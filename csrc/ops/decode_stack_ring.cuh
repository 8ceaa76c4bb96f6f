#pragma once

// decode_stack: what a launch fixes, how a block's share of the weights is cut into chunks, and the warp that
// streams them into a ring in shared memory.
//
// Every block owns a range of the rows of each weight, in all layers. Its chunks, at most sixteen rows of
// them and some of their columns, follow one another through one ring without regard to which linear or layer
// they belong to: while the blocks wait for each other, the weights of what comes next arrive.

#include "ops/decode_attention_kernel.cuh"
#include "ops/ptx.cuh"

namespace modeltorch {

inline constexpr int kStackMaxLayers = 96;
inline constexpr int kStackMaxRows = 8;
inline constexpr int kStackWarps = 8;  // that multiply
inline constexpr int kStackConsumers = 32 * kStackWarps;
inline constexpr int kStackThreads =
    kStackConsumers + 64;  // with the warp that streams and the one that takes back
inline constexpr int kStackKeeper = kStackWarps + 1;  // the latter
/// Named barriers: of those that multiply and the keeper, of attention, of those that join its parts.
inline constexpr int kStackMeeting = 1, kStackAttending = 2, kStackJoining = 3;
inline constexpr int kStackSpan = 32 * kStackWarps;           // columns of one group of every warp
inline constexpr int kStackGroups = 20;                       // groups of a warp whose x it holds at once
inline constexpr int kStackPart = kStackGroups * kStackSpan;  // columns of x that the warps hold
inline constexpr int kStackSlots = 32;                        // chunks in the ring, at most
inline constexpr int kStackChunkRows = 16;
inline constexpr int kStackChunkGroups = 4;                         // of a warp
inline constexpr int kStackChunk = kStackChunkGroups * kStackSpan;  // columns

enum StackKind { kStackQkv, kStackO, kStackGateUp, kStackDown };

/// A linear of all layers. A unit is a row of the weight; of gate_up a row of either.
struct StackLinear {
  int k, units;
  int pass_units;  // units whose sums are kept before they are added up; all where k is above kStackPart
  int has_norm;
  const void* x;  // memory of decode_stack_exchange.cuh
  void* y;
};

/// A block's part of it.
struct StackShare {
  StackLinear linear;
  int first, count;  // units
  int64_t padding;   // to whole 16 bytes, in which threads load it
};

struct StackLayer {
  const void *qkv[3], *bias[3];
  const void *gamma[2], *o, *gate, *up, *down;
  void *k_cache, *v_cache;
};

/// What a launch fixes. Offsets are bytes of shared memory from its start.
struct StackParams {
  DecodeAttentionParams attention;  // but for the caches; splits is a power of two
  const void* x;
  void* y;
  StackLinear linear[4];
  // What several splits of attention hand on: [rows, heads, splits, head_size], and maximum and sum.
  float* parts;
  float2* states;
  float epsilon, inverse_hidden;
  int rows, layer_count, attention_units;
  int join_units;     // rows and heads whose splits are joined; 0 where there is one split
  int unit_shift;     // log2 of the threads that finish the units of a row
  int part_begin[3];  // first unit of a part of qkv; INT_MAX where there is none
  int residual_offset, red_offset, red_bytes, red_pitch, attention_offset;
  int ring_offset, ring_offset_attention, ring_end;  // the ring of blocks that have no attention is larger
  StackLayer layers[kStackMaxLayers];
#ifdef MODELTORCH_STACK_STAMPS
  long long* stamps;  // [blocks, layers * 4, 8]
#endif
};

inline constexpr int kStackSharesOffset = 2 * kStackSlots * 8;  // behind the barriers
inline constexpr int kStackSquaresOffset = kStackSharesOffset + 4 * sizeof(StackShare);
inline constexpr int kStackHeaderBytes = kStackSquaresOffset + 2 * kStackWarps * kStackMaxRows * 4;

namespace stack {

/// Bytes from row to row of a chunk: two rows lie 64 bytes apart in the banks, so that the lanes of a warp,
/// which read 64 bytes of each of eight rows, meet no bank twice.
__device__ __forceinline__ int pitch_of(int columns) {
  return columns * 2 + (columns % 64 == 0 ? 64 : 0);
}

/// Where chunks lie in the ring: one behind the other, from its start again where the end is too near. Both
/// sides find the places on their own.
struct Ring {
  uint32_t barriers;
  int size, head = 0, slot = 0;
  uint32_t parity = 0;

  __device__ uint32_t full(int i) const { return barriers + i * 8; }
  __device__ uint32_t empty(int i) const { return barriers + (kStackSlots + i) * 8; }
  __device__ int place(int bytes) const { return head + bytes > size ? 0 : head; }
  __device__ void advance(int end) {
    head = end;
    if (++slot == kStackSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

#if MODELTORCH_PTX_HOPPER

/// The warp that fills the ring. Lane i remembers where the chunk of slot i lies.
struct Producer {
  const StackParams& p;
  const StackShare* shares;
  Ring ring;
  uint32_t base;
  uint64_t policy;
  int lane, begin = 0, end = 0;
  int oldest = 0, held = 0;
  uint32_t oldest_parity = 0;

  __device__ void drop_oldest() {
    ptx::barrier_wait(ring.empty(oldest), oldest_parity);
    --held;
    if (++oldest == kStackSlots) {
      oldest = 0;
      oldest_parity ^= 1;
    }
  }

  /// Waits until the chunks that lie in the way are used up.
  __device__ int make_room(int bytes) {
    const int to = ring.place(bytes);
    if (to < ring.head) {
      while (held && __shfl_sync(~0u, begin, oldest) >= ring.head) drop_oldest();
    }
    while (held && (held == kStackSlots ||
                    (__shfl_sync(~0u, begin, oldest) < to + bytes && __shfl_sync(~0u, end, oldest) > to))) {
      drop_oldest();
    }
    if (lane == ring.slot) {
      begin = to;
      end = to + bytes;
    }
    ++held;
    return to;
  }

  /// The first column of row `row` of the pass that begins with unit `unit`.
  __device__ const char* weight_row(int kind, const StackLayer& layer, int unit, int units, int row) const {
    int at = unit + row;
    const void* weight = kind == kStackO ? layer.o : layer.down;
    if (kind == kStackQkv) {
      const int part = (at >= p.part_begin[1]) + (at >= p.part_begin[2]);
      weight = part == 0 ? layer.qkv[0] : part == 1 ? layer.qkv[1] : layer.qkv[2];
      at -= part == 0 ? 0 : part == 1 ? p.part_begin[1] : p.part_begin[2];
    } else if (kind == kStackGateUp) {
      weight = row < units ? layer.gate : layer.up;
      if (row >= units) at -= units;
    }
    return static_cast<const char*>(weight) + static_cast<int64_t>(at) * shares[kind].linear.k * 2;
  }

  /// `gamma`: comes in front of the rows, where it is not null.
  __device__ void load_chunk(const char* from, int rows, int columns, const void* gamma, int k) {
    const int pitch = pitch_of(columns), lead = gamma ? k * 2 : 0;
    const int to = make_room(rows * pitch + lead);
    const uint32_t full = ring.full(ring.slot);
    if (lane == 0) ptx::barrier_expect(full, rows * columns * 2 + lead);
    __syncwarp();
    if (lane < rows) ptx::bulk_copy(base + to + lead + lane * pitch, from, columns * 2, full, policy);
    if (gamma && lane == kStackChunkRows) ptx::bulk_copy(base + to, gamma, lead, full, policy);
    ring.advance(to + rows * pitch + lead);
  }

  __device__ void load_linear(int kind, const StackLayer& layer) {
    const StackShare share = shares[kind];
    const StackLinear& linear = share.linear;
    const int sides = kind == kStackGateUp ? 2 : 1;
    const void* gamma = kind == kStackQkv ? layer.gamma[0] : kind == kStackGateUp ? layer.gamma[1] : nullptr;
    for (int unit = 0; unit < share.count; unit += linear.pass_units) {
      const int units = min(linear.pass_units, share.count - unit), rows = units * sides;
      for (int k = 0; k < linear.k; k += kStackPart) {
        const int k_end = min(linear.k, k + kStackPart);
        for (int row = 0; row < rows; row += kStackChunkRows) {
          const int chunk_rows = min(kStackChunkRows, rows - row);
          const char* from =
              weight_row(kind, layer, share.first + unit, units, row + min(lane, chunk_rows - 1));
          for (int column = k; column < k_end; column += kStackChunk) {
            load_chunk(from + column * 2, chunk_rows, min(kStackChunk, k_end - column), gamma, linear.k);
            gamma = nullptr;
          }
        }
      }
    }
  }

  __device__ void run() {
    for (int layer = 0; layer < p.layer_count; ++layer) {
      for (int kind = 0; kind < 4; ++kind) load_linear(kind, p.layers[layer]);
    }
  }
};

#endif  // MODELTORCH_PTX_HOPPER

}  // namespace stack
}  // namespace modeltorch
