#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// Root mean square normalisation over the last axis: y = x / sqrt(mean(x^2) + epsilon) * gamma.
///
/// | tensor | shape        | dtype |
/// |--------|--------------|-------|
/// | x      | [rows, size] | T     |
/// | gamma  | [size]       | T     |
/// | y      | [rows, size] | T     |
///
/// T is float32, bfloat16 or float16; the mean is a float32 sum. Source: Zhang and Sennrich, "Root Mean
/// Square Layer Normalization" (2019); docs/contract.md, "The layer".
struct RmsNorm final : Operation {
  static constexpr std::string_view kName = "RmsNorm";
  float epsilon;

  explicit RmsNorm(float epsilon) : epsilon(epsilon) {}
  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

Value rms_norm(GraphBuilder& graph, Value x, Value gamma, float epsilon);

}  // namespace modeltorch
