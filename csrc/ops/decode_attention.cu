#include "ops/decode_attention.h"

#include <algorithm>
#include <bit>

#include "core/arithmetic.h"
#include "core/check.h"
#include "ops/decode_attention_kernel.cuh"
#include "ops/launch.cuh"

namespace modeltorch {
namespace {

// Clusters of more than two of these blocks do not all find room on the device beside the kernel in front.
constexpr int kMaxWideBlocks = 64;

/// Blocks that share the context of one sequence and key-value head: as many as the device has
/// multiprocessors for.
int split_count(const DecodeAttention& attention, int head_tiles) {
  const CudaDevice& device = current_cuda_device();
  if (!device.hopper) return 1;
  const int64_t work = attention.sequences * attention.kv_heads * head_tiles;
  const int64_t tiles = divide_up(attention.max_context, kDecodeTokens);
  constexpr int kLongContext = 4096;  // more blocks than this pays cost more to join than they save
  const int most = attention.max_context > kLongContext ? kDecodeMaxSplits : 8;
  int splits = 1;
  while (splits < most && work * splits * 2 <= device.multiprocessors && splits * 4 < tiles) splits *= 2;
  return splits;
}

template <class T, class Shape>
void launch_shape(const DecodeAttention& attention, const DecodeAttentionParams& params, void* stream) {
  const auto kernel = decode_attention_kernel<T, Shape>;
  allow_shared_memory(kernel, Shape::kAllBytes, current_cuda_device().hopper);
  const dim3 grid(params.splits, params.kv_heads * params.head_tiles, attention.sequences);
  const LaunchShape launched{grid, Shape::kThreads, static_cast<size_t>(Shape::bytes(params.splits)),
                             params.splits};
  launch_kernel(kernel, launched, stream, "decode_attention", params);
}

/// One block of eight warps a multiprocessor while there are few blocks; else four warps, and so little
/// shared memory that several blocks fit.
template <class T, int kD>
void launch_head_size(const DecodeAttention& attention, const DecodeAttentionParams& params, void* stream) {
  const int64_t blocks = attention.sequences * params.kv_heads * params.head_tiles * params.splits;
  const CudaDevice& device = current_cuda_device();
  constexpr int kLong = kD <= 64 ? 3 : kD <= 128 ? 2 : 1;
  constexpr int kShort = kD <= 64 ? 3 : kD <= 96 ? 4 : kD <= 128 ? 3 : 2;
  if (!device.hopper) {  // half the shared memory, or less
    return launch_shape<T, DecodeShape<kD, 4, kD <= 64 ? 3 : kD <= 128 ? 2 : 1>>(attention, params, stream);
  }
  if (blocks <= (params.splits > 2 ? kMaxWideBlocks : device.multiprocessors)) {
    return launch_shape<T, DecodeShape<kD, 8, kLong>>(attention, params, stream);
  }
  if (params.splits > 1)
    return launch_shape<T, DecodeShape<kD, 4, kD <= 64 ? 3 : 2>>(attention, params, stream);
  launch_shape<T, DecodeShape<kD, 4, kShort>>(attention, params, stream);
}

template <class T>
void launch_dtype(const DecodeAttention& attention, const DecodeAttentionParams& params, void* stream) {
  switch (attention.head_size) {
    case 64:
      return launch_head_size<T, 64>(attention, params, stream);
    case 80:
      return launch_head_size<T, 80>(attention, params, stream);
    case 96:
      return launch_head_size<T, 96>(attention, params, stream);
    case 128:
      return launch_head_size<T, 128>(attention, params, stream);
    default:
      return launch_head_size<T, 256>(attention, params, stream);
  }
}

}  // namespace

bool decode_attention_fits(const DecodeAttention& attention) {
  const DecodeAttention& a = attention;
  if (a.dtype != DType::kBFloat16 && a.dtype != DType::kFloat16) return false;
  const int d = a.head_size;
  if (d != 64 && d != 80 && d != 96 && d != 128 && d != 256) return false;
  if (a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads != 0) return false;
  if (a.sequences < 1 || a.sequences > 65535 || a.block_size < 1 || a.table_width < 1) return false;
  if (a.blocks * a.block_size >= (int64_t{1} << 31) || a.table_width * a.block_size >= (int64_t{1} << 31))
    return false;
  return is_aligned(a.qkv) && is_aligned(a.cos) && is_aligned(a.sin) && is_aligned(a.k_cache) &&
         is_aligned(a.v_cache) && is_aligned(a.y);
}

size_t decode_attention_workspace(const DecodeAttention&) {
  return 0;
}

void decode_attention(const DecodeAttention& attention, void* stream) {
  check(decode_attention_fits(attention), "decode_attention: head size ", attention.head_size, ", ",
        attention.heads, " heads, ", attention.kv_heads, " key-value heads do not fit");
  constexpr float kLog2E = 1.4426950408889634f;
  DecodeAttentionParams params{};
  params.qkv = attention.qkv;
  params.cos = attention.cos;
  params.sin = attention.sin;
  params.k_cache = attention.k_cache;
  params.v_cache = attention.v_cache;
  params.y = attention.y;
  params.block_tables = attention.block_tables;
  params.slots = attention.slots;
  params.seq_len = attention.seq_len;
  params.fault = attention.fault;
  params.table_width = attention.table_width;
  params.heads = attention.heads;
  params.kv_heads = attention.kv_heads;
  params.block_size = static_cast<int>(attention.block_size);
  params.block_shift = std::has_single_bit(static_cast<uint64_t>(attention.block_size))
                           ? std::countr_zero(static_cast<uint64_t>(attention.block_size))
                           : -1;
  params.blocks = static_cast<int>(attention.blocks);
  params.head_tiles = static_cast<int>(divide_up(attention.heads / attention.kv_heads, kDecodeHeads));
  params.splits = split_count(attention, params.head_tiles);
  params.scale_log2 = attention.scale * kLog2E;
  if (attention.dtype == DType::kBFloat16) return launch_dtype<__nv_bfloat16>(attention, params, stream);
  return launch_dtype<__half>(attention, params, stream);
}

}  // namespace modeltorch
