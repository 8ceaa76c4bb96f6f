#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "ops/attention_shape.h"

namespace modeltorch {

/// Attention on CUDA for every dtype, head size up to 512 and shape: correct before fast.
///
/// With block_tables: one query a sequence over the paged cache (PagedAttention). Without: causal attention
/// of packed prompts over their own keys (SelfAttention). Row strides are in elements; n rows of q and y.
///
/// | tensor       | shape                                    | dtype |
/// |--------------|------------------------------------------|-------|
/// | q            | [n, heads, head_size]                    | T     |
/// | k, v         | [n, kv_heads, head_size], or the caches [blocks, block_size, kv_heads, head_size] | T |
/// | seq_len      | [sequences]; n of them with block_tables | int32 |
/// | block_tables | [n, table_width]                         | int32 |
/// | y            | [n, heads * head_size]                   | T     |
struct PlainAttention {
  DType dtype = DType::kFloat32;
  AttentionShape shape;
  int64_t rows = 0;
  const void* q = nullptr;
  int64_t q_stride = 0;
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t kv_stride = 0;  ///< of the rows of k and v, and of those of a cache
  const int32_t* seq_len = nullptr;
  int64_t sequences = 0;
  const int32_t* block_tables = nullptr;
  int64_t table_width = 0;
  int64_t block_size = 0;
  int64_t blocks = 0;
  void* y = nullptr;
  int32_t* fault = nullptr;  ///< set if a block or a length is out of range; such keys are left out
};

/// `stream` is a cudaStream_t.
void plain_attention(const PlainAttention& args, void* stream);

}  // namespace modeltorch
