#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ops/pairs.cuh"
#include "ops/prefill_tiles.cuh"
#include "ops/ptx.cuh"

/// Causal attention with mma.sync, for every head size and every card from sm_80 on.
namespace modeltorch::prefill {

/// A launch as kernels see it.
template <class T>
struct Launch {
  const T* q;
  const T* k;
  const T* v;
  T* y;
  const int32_t* seq_len;
  int64_t q_stride, k_stride, v_stride, y_stride;
  int tokens, sequences, heads, group;
  float scale_log2;  ///< scale * log2(e): weights are powers of two
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Copies 16 bytes to shared memory, or writes zeros where `there` is false.
__device__ inline void copy_16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}

__device__ inline void copy_commit() {
  asm volatile("cp.async.commit_group;");
}

__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

/// sum += a . b for a 16 x 16, b 16 x 8.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// What a block of `kWarps` warps works on: 16 query rows a warp against `kKeys` keys at a time. Rows in
/// shared memory are padded by 16 bytes, so that the eight rows of an ldmatrix lie in different banks.
template <class T, int kHead, int kWarps, int kKeys>
struct MmaTile {
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPitch = kHead + 8;
  static constexpr int kBytes = (kRows + 2 * kKeys) * kPitch * static_cast<int>(sizeof(T));

  /// Starts the copy of rows [first, first + kCount) of a sequence; rows from `length` on become zeros.
  template <int kCount>
  __device__ static void load_rows(T* to, const T* from, int64_t stride, int first, int length) {
    constexpr int kPieces = kHead / 8;
    for (int i = threadIdx.x; i < kCount * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool there = first + row < length;
      copy_16(shared_address(to + row * kPitch + piece * 8),
              from + (there ? first + row : 0) * stride + piece * 8, there);
    }
  }
};

/// The running softmax of one warp's 16 rows. A lane holds rows lane / 4 and lane / 4 + 8, and of every eight
/// columns the two from 2 * (lane % 4) on.
template <class T, int kHead, int kWarps, int kKeys>
struct MmaRows {
  using Tile = MmaTile<T, kHead, kWarps, kKeys>;
  static constexpr int kPitch = Tile::kPitch;
  float out[kHead / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  /// scores = q . k^T, before the scale.
  __device__ void score(float (&scores)[kKeys / 8][4], const T* q, const T* k) const {
    const int lane = threadIdx.x % 32;
    const T* q_at = q + (threadIdx.x / 32 * 16 + lane % 16) * kPitch + lane / 16 * 8;
    const T* k_at = k + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < kHead; d += 16) {
      uint32_t a[4];
      load_matrices(a, shared_address(q_at + d));
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        uint32_t b[4];
        load_matrices(b, shared_address(k_at + n * 8 * kPitch + d));
        multiply_add<T>(scores[n], a, b[0], b[1]);
        multiply_add<T>(scores[n + 1], a, b[2], b[3]);
      }
    }
  }

  /// Hides keys that lie behind their row. `row` and `key` are the first ones of the block in their sequence.
  __device__ void mask(float (&scores)[kKeys / 8][4], int row, int key) const {
    const int lane = threadIdx.x % 32;
    const int own = row + threadIdx.x / 32 * 16 + lane / 4 - key - lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + i % 2 > own + i / 2 * 8) scores[n][i] = -INFINITY;
      }
    }
  }

  /// Turns scores into weights relative to the new maximum, and rescales what was summed under the old one.
  __device__ void soften(float (&scores)[kKeys / 8][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = maximum[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      // A row that sees none of these keys has no maximum yet: its weights must be 0, not 2^(inf - inf).
      const float shift = top == -INFINITY ? 0.0f : top * scale_log2;
      const float rescale = exp2_fast(maximum[half] * scale_log2 - shift);
      maximum[half] = top;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2_fast(scores[n][i] * scale_log2 - shift);
          added += scores[n][i];
        }
      }
      sum[half] = sum[half] * rescale + added;
#pragma unroll
      for (int d = 0; d < kHead / 8; ++d) {
        out[d][2 * half] *= rescale;
        out[d][2 * half + 1] *= rescale;
      }
    }
  }

  /// out += weights . v
  __device__ void weigh(const float (&weights)[kKeys / 8][4], const T* v) {
    const int lane = threadIdx.x % 32;
    const T* v_at = v + lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      const uint32_t a[4] = {pack<T>(weights[n][0], weights[n][1]), pack<T>(weights[n][2], weights[n][3]),
                             pack<T>(weights[n + 1][0], weights[n + 1][1]),
                             pack<T>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
      for (int d = 0; d < kHead / 8; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, shared_address(v_at + n * 8 * kPitch + d * 8));
        multiply_add<T>(out[d], a, b[0], b[1]);
        multiply_add<T>(out[d + 1], a, b[2], b[3]);
      }
    }
  }

  /// Writes the rows of this warp below `rows`; y is row 0 of the block.
  __device__ void store(T* y, int64_t stride, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = 1.0f / total;
      const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
      if (row >= rows) continue;
      T* const to = y + row * stride + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kHead / 8; ++d) {
        *reinterpret_cast<uint32_t*>(to + d * 8) =
            pack<T>(out[d][2 * half] * inverse, out[d][2 * half + 1] * inverse);
      }
    }
  }
};

/// One block for one tile of one head. Keys go from the diagonal back to the first; the copy of the values
/// runs under the scores, that of the next keys under the softmax and the weighing.
template <class T, int kHead, int kWarps, int kKeys>
__global__ void __launch_bounds__(32 * kWarps) mma_prefill_kernel(const Launch<T> launch) {
  using Tile = MmaTile<T, kHead, kWarps, kKeys>;
  ptx::begin_behind_the_kernel_in_front();
  extern __shared__ __align__(16) unsigned char memory[];
  T* const q = reinterpret_cast<T*>(memory);
  T* const k = q + Tile::kRows * Tile::kPitch;
  T* const v = k + kKeys * Tile::kPitch;

  const int head = blockIdx.x % launch.heads;
  const PrefillTile tile = find_prefill_tile<Tile::kRows>(launch.seq_len, launch.sequences, launch.tokens,
                                                          blockIdx.x / launch.heads);
  if (tile.length == 0) return;
  const int64_t start = tile.start;
  const int column = head / launch.group * kHead;
  const T* const k_from = launch.k + start * launch.k_stride + column;
  const T* const v_from = launch.v + start * launch.v_stride + column;
  const int last = (min(tile.first + Tile::kRows, tile.length) - 1) / kKeys;

  Tile::template load_rows<Tile::kRows>(q, launch.q + start * launch.q_stride + head * kHead, launch.q_stride,
                                        tile.first, tile.length);
  Tile::template load_rows<kKeys>(k, k_from, launch.k_stride, last * kKeys, tile.length);
  copy_commit();
  MmaRows<T, kHead, kWarps, kKeys> rows;
  for (int block = last; block >= 0; --block) {
    float scores[kKeys / 8][4];
    copy_wait();
    __syncthreads();
    Tile::template load_rows<kKeys>(v, v_from, launch.v_stride, block * kKeys, tile.length);
    copy_commit();
    rows.score(scores, q, k);
    copy_wait();
    __syncthreads();
    if (block > 0) {
      Tile::template load_rows<kKeys>(k, k_from, launch.k_stride, (block - 1) * kKeys, tile.length);
      copy_commit();
    }
    if ((block + 1) * kKeys > tile.first) rows.mask(scores, tile.first, block * kKeys);
    rows.soften(scores, launch.scale_log2);
    rows.weigh(scores, v);
  }
  rows.store(launch.y + (start + tile.first) * launch.y_stride + head * kHead, launch.y_stride,
             tile.length - tile.first);
}

}  // namespace modeltorch::prefill
