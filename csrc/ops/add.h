#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// Element by element sum: y = a + b.
///
/// | tensor | shape        | dtype |
/// |--------|--------------|-------|
/// | a, b   | [rows, size] | T     |
/// | y      | [rows, size] | T     |
///
/// T is float32, bfloat16 or float16.
struct Add final : Operation {
  static constexpr std::string_view kName = "Add";

  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

Value add(GraphBuilder& graph, Value a, Value b);

}  // namespace modeltorch
