#pragma once

#include <vector>

#include "graph/graph.h"
#include "ops/linear.h"

namespace modeltorch {

/// Linear, and SwiGlu of what it gives: y = silu(gate) * up with [gate, up] = cat_i(x . w_i^T + bias_i).
///
/// | tensor       | shape                  | dtype | note                                   |
/// |--------------|------------------------|-------|----------------------------------------|
/// | x            | [rows, k]              | T     |                                        |
/// | w_i, bias_i  | as in Linear           | T     | sum n_i is even                        |
/// | y            | [rows, sum n_i / 2]    | T     |                                        |
///
/// Gates and what they let through do not pass the memory in between where weights are packed.
struct LinearSwiGlu final : Operation {
  static constexpr std::string_view kName = "LinearSwiGlu";
  std::vector<LinearPart> parts;

  explicit LinearSwiGlu(std::vector<LinearPart> parts) : parts(std::move(parts)) {}
  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

}  // namespace modeltorch
