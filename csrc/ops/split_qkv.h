#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// Cuts the packed projection of a token into its query, key and value heads.
///
/// | tensor | shape                                | dtype |
/// |--------|--------------------------------------|-------|
/// | qkv    | [n, (heads + 2 * kv_heads) * head_size] | T  |
/// | q      | [n, heads, head_size]                | T     |
/// | k, v   | [n, kv_heads, head_size]             | T     |
struct SplitQkv final : Operation {
  static constexpr std::string_view kName = "SplitQkv";
  int64_t heads;
  int64_t kv_heads;
  int64_t head_size;

  SplitQkv(int64_t heads, int64_t kv_heads, int64_t head_size)
      : heads(heads), kv_heads(kv_heads), head_size(head_size) {}
  std::string_view name() const override { return kName; }
  int output_count() const override { return 3; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

struct QkvHeads {
  Value q;
  Value k;
  Value v;
};

QkvHeads split_qkv(GraphBuilder& graph, Value qkv, int64_t heads, int64_t kv_heads, int64_t head_size);

}  // namespace modeltorch
