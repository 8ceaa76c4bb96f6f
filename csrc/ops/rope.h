#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// Rotary position embedding, half rotation, of query and key heads:
/// y = x * cos + cat(-x[d/2:], x[:d/2]) * sin.
///
/// | tensor   | shape                    | dtype | note                                       |
/// |----------|--------------------------|-------|--------------------------------------------|
/// | q        | [n, heads, head_size]    | T     |                                            |
/// | k        | [n, kv_heads, head_size] | T     |                                            |
/// | cos, sin | [n, head_size]           | T     | one row a token, the two halves are equal  |
/// | q', k'   | as q, k                  | T     |                                            |
///
/// T is float32, bfloat16 or float16. Source: Su et al., "RoFormer" (2021), in the form of Hugging Face's
/// modeling_qwen2.py; docs/contract.md, "The layer".
struct Rope final : Operation {
  static constexpr std::string_view kName = "Rope";

  std::string_view name() const override { return kName; }
  int output_count() const override { return 2; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

struct RotatedHeads {
  Value q;
  Value k;
};

RotatedHeads rope(GraphBuilder& graph, Value q, Value k, Value cos, Value sin);

}  // namespace modeltorch
