#pragma once

#include "graph/graph.h"
#include "ops/attention_shape.h"

namespace modeltorch {

/// All of a layer's attention between the two projections: the heads of qkv are cut apart, queries and keys
/// are turned (Rope), keys and values written to the paged cache (ReshapeAndCache), and the queries attend,
/// over the cache in decode (PagedAttention), over the prompts of this step in prefill (SelfAttention).
///
/// | tensor           | shape                                      | dtype | note |
/// |------------------|--------------------------------------------|-------|---------------------------------|
/// | qkv              | [n, (heads + 2 * kv_heads) * head_size]    | T     | may be overwritten | | cos, sin
/// | [n, head_size]                             | T     |                                 | | k_cache,
/// v_cache | [blocks, block_size, kv_heads, head_size]  | T     | written in place                | | slots
/// | [n]                                        | int32 | -1 leaves the cache as it is    | | seq_len | [B]
/// | int32 | 0 in decode: the row of y is 0  | | block_tables     | [B, width] | int32 | in decode only,
/// where B is n    | | y                | [n, heads * head_size]                     | T     | |
///
/// Made by a fusion pass on devices that have a kernel for it.
struct RopeAttention final : Operation {
  static constexpr std::string_view kName = "RopeAttention";
  AttentionShape shape;
  bool is_paged = false;  ///< decode

  RopeAttention(const AttentionShape& shape, bool is_paged) : shape(shape), is_paged(is_paged) {}
  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

}  // namespace modeltorch
