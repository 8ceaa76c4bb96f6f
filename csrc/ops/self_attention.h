#pragma once

#include "graph/graph.h"
#include "ops/attention_shape.h"

namespace modeltorch {

/// Causal attention of whole prompts, packed one after the other without padding.
///
/// Token i of a sequence sees the tokens 0..i of the same sequence:
/// out = softmax(scale * q . k^T + causal mask) . v, computed block by block.
///
/// | tensor  | shape                    | dtype | note                                |
/// |---------|--------------------------|-------|-------------------------------------|
/// | q       | [n, heads, head_size]    | T     |                                     |
/// | k, v    | [n, kv_heads, head_size] | T     | of this step, not from the cache    |
/// | seq_len | [B]                      | int32 | tokens of each sequence; their sum is n |
/// | out     | [n, heads * head_size]   | T     |                                     |
///
/// T is float32, bfloat16 or float16; scores and sums are float32. Source: Dao et al., "FlashAttention"
/// (2022); docs/contract.md, "The layer".
struct SelfAttention final : Operation {
  static constexpr std::string_view kName = "SelfAttention";
  AttentionShape shape;

  explicit SelfAttention(const AttentionShape& shape) : shape(shape) {}
  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
  void check_indices(const std::vector<TensorView>& inputs) const override;
};

Value self_attention(GraphBuilder& graph, Value q, Value k, Value v, Value seq_len,
                     const AttentionShape& shape);

}  // namespace modeltorch
