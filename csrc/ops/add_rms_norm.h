#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// The residual add and the norm that follows it, in one pass: sum = a + b; y = rms_norm(sum) * gamma.
///
/// | tensor | shape        | dtype |
/// |--------|--------------|-------|
/// | a, b   | [rows, size] | T     |
/// | gamma  | [size]       | T     |
/// | sum, y | [rows, size] | T     |
///
/// T is float32, bfloat16 or float16. The norm reads the sum as it is stored, so the result equals that of
/// the two nodes which the fusion pass of this operation replaces: an Add whose output an RmsNorm reads.
struct AddRmsNorm final : Operation {
  static constexpr std::string_view kName = "AddRmsNorm";
  float epsilon;

  explicit AddRmsNorm(float epsilon) : epsilon(epsilon) {}
  std::string_view name() const override { return kName; }
  int output_count() const override { return 2; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

}  // namespace modeltorch
