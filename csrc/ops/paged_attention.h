#pragma once

#include "graph/graph.h"
#include "ops/attention_shape.h"

namespace modeltorch {

/// Attention of one new token a sequence over the keys and values that the paged cache holds.
///
/// Sequence b sees seq_len[b] keys; key j lies in block block_tables[b, j / block_size], row j % block_size.
///
/// | tensor           | shape                                     | dtype | note                            |
/// |------------------|-------------------------------------------|-------|---------------------------------|
/// | q                | [B, heads, head_size]                     | T     |                                 |
/// | k_cache, v_cache | [blocks, block_size, kv_heads, head_size] | T     | rows never written are not read |
/// | block_tables     | [B, width]                                | int32 | entries in use were checked     |
/// | seq_len          | [B]                                       | int32 | context, the new token included |
/// | out              | [B, heads * head_size]                    | T     |                                 |
///
/// T is float32, bfloat16 or float16; scores and sums are float32. Source: Kwon et al., "Efficient Memory
/// Management for Large Language Model Serving with PagedAttention" (2023); docs/contract.md, "The layer".
struct PagedAttention final : Operation {
  static constexpr std::string_view kName = "PagedAttention";
  AttentionShape shape;

  explicit PagedAttention(const AttentionShape& shape) : shape(shape) {}
  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
  void check_indices(const std::vector<TensorView>& inputs) const override;
};

Value paged_attention(GraphBuilder& graph, Value q, Value k_cache, Value v_cache, Value block_tables,
                      Value seq_len, const AttentionShape& shape);

}  // namespace modeltorch
