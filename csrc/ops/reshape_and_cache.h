#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// Writes the keys and values of a step into the paged cache: cache[slot / block_size, slot % block_size] =
/// row.
///
/// | tensor           | shape                                    | dtype | note                         |
/// |------------------|------------------------------------------|-------|------------------------------|
/// | k, v             | [n, kv_heads, head_size]                 | T     |                              |
/// | k_cache, v_cache | [blocks, block_size, kv_heads, head_size] | T    | written in place             |
/// | slots            | [n]                                      | int32 | -1 leaves the cache as it is |
///
/// T is float32, bfloat16 or float16. Slots were checked against the cache by the caller.
struct ReshapeAndCache final : Operation {
  static constexpr std::string_view kName = "ReshapeAndCache";

  std::string_view name() const override { return kName; }
  int output_count() const override { return 0; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
  void check_indices(const std::vector<TensorView>& inputs) const override;
};

void reshape_and_cache(GraphBuilder& graph, Value k, Value v, Value k_cache, Value v_cache, Value slots);

}  // namespace modeltorch
