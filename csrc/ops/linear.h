#pragma once

#include <vector>

#include "graph/graph.h"

namespace modeltorch {

/// One weight of a Linear: how it lies in memory and whether a bias follows it.
struct LinearPart {
  bool transposed = true;  ///< true: the weight is [n, k] (the layout of checkpoints); false: [k, n]
  bool has_bias = false;
};

/// A linear map, or several of the same input written side by side: y = cat_i(x . w_i^T + bias_i).
///
/// | tensor | shape            | dtype | note                                                |
/// |--------|------------------|-------|-----------------------------------------------------|
/// | x      | [rows, k]        | T     |                                                     |
/// | w_i    | [n_i, k], [k, n_i] | T   | as parts[i].transposed says                         |
/// | bias_i | [n_i]            | T     | present if parts[i].has_bias; follows w_i           |
/// | y      | [rows, sum n_i]  | T     |                                                     |
///
/// T is float32, bfloat16 or float16; sums are float32. Several parts serve checkpoints whose q, k, v or
/// gate, up are separate: the model sees one node either way. docs/contract.md, "Weights".
struct Linear final : Operation {
  static constexpr std::string_view kName = "Linear";
  std::vector<LinearPart> parts;

  explicit Linear(std::vector<LinearPart> parts) : parts(std::move(parts)) {}
  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
};

/// One weight of the graph with its optional bias (id -1: none).
struct LinearWeight {
  Value weight;
  Value bias;
  bool transposed = true;
};

Value linear(GraphBuilder& graph, std::string_view name, Value x, const std::vector<LinearWeight>& weights);

}  // namespace modeltorch
