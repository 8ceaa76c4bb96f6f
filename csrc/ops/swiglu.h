#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// The gated activation of the MLP: y = silu(gate) * up, with silu(x) = x / (1 + exp(-x)).
///
/// | tensor  | shape            | dtype | note                                    |
/// |---------|------------------|-------|-----------------------------------------|
/// | gate_up | [rows, 2 * size] | T     | gate is the first half of a row, then up |
/// | y       | [rows, size]     | T     |                                         |
///
/// T is float32, bfloat16 or float16. Source: Shazeer, "GLU Variants Improve Transformer" (2020).
struct SwiGlu final : Operation {
  static constexpr std::string_view kName = "SwiGlu";

  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

Value swiglu(GraphBuilder& graph, Value gate_up);

}  // namespace modeltorch
