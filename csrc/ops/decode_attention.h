#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace modeltorch {

/// Everything between the qkv projection and the output projection of a decode step on one CUDA device, in
/// one launch: rotary embedding of q and k, the write of k and v into the paged cache, and attention of the
/// one new token of each sequence over its context.
///
/// | tensor           | shape                                     | dtype | note |
/// |------------------|-------------------------------------------|-------|-------------------------------------|
/// | qkv              | [B, (heads + 2 * kv_heads) * head_size]   | T     | before the rotary embedding | |
/// cos, sin         | [B, head_size]                            | T     | rows of these tokens (ops/rope.h) |
/// | k_cache, v_cache | [blocks, block_size, kv_heads, head_size] | T     | | | block_tables     | [B,
/// table_width]                          | int32 |                                     | | slots            |
/// [B]                                       | int32 | row of the cache to write; -1: none | | seq_len | [B]
/// | int32 | context with the new token; 0: padding | | y                | [B, heads * head_size] | T     |
/// zero in rows of padding             | | fault            | [1]                                       |
/// int32 | set to 1 if a slot, block or length is out of range |
///
/// T is bfloat16 or float16; scores and sums are float32 and their order is fixed. Memory behind a bad slot
/// or block is not touched. How the context is cut among the blocks of the launch follows seq_len on the
/// device, so a captured graph serves any lengths. On Hopper the kernel loads keys and values before the
/// kernels in front of it are done (programmatic dependent launch): block_tables, slots, seq_len and earlier
/// rows of the cache must be complete before the chain of such launches begins. qkv, cos and sin may come
/// from the kernel right in front.
struct DecodeAttention {
  DType dtype = DType::kBFloat16;
  int64_t sequences = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_size = 0;
  float scale = 0;
  const void* qkv = nullptr;
  const void* cos = nullptr;
  const void* sin = nullptr;
  void* k_cache = nullptr;
  void* v_cache = nullptr;
  int64_t block_size = 0;
  const int32_t* block_tables = nullptr;
  int64_t table_width = 0;
  int64_t blocks = 0;
  const int32_t* slots = nullptr;
  const int32_t* seq_len = nullptr;
  void* y = nullptr;
  int64_t max_context = 0;  ///< upper bound of seq_len: table_width * block_size, or less
  void* workspace = nullptr;
  int32_t* fault = nullptr;
};

/// False: a dtype, head size or alignment that only the plain kernels serve.
bool decode_attention_fits(const DecodeAttention& attention);

/// Bytes of workspace that the launch needs.
size_t decode_attention_workspace(const DecodeAttention& attention);

/// Launches `attention` on `stream` (a cudaStream_t). Throws Error if CUDA refuses the launch.
void decode_attention(const DecodeAttention& attention, void* stream);

}  // namespace modeltorch
