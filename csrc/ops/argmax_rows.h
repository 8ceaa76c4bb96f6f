#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// The greedy choice of a token: y[r] = the first index of the largest x[r]. NaN counts as the largest, as in
/// torch.argmax.
///
/// | tensor | shape        | dtype | note        |
/// |--------|--------------|-------|-------------|
/// | x      | [rows, size] | T     | size > 0    |
/// | y      | [rows]       | int64 |             |
///
/// T is float32, bfloat16 or float16.
struct ArgmaxRows final : Operation {
  static constexpr std::string_view kName = "ArgmaxRows";

  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

}  // namespace modeltorch
