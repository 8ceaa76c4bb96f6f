#pragma once

#include "graph/graph.h"

namespace modeltorch {

/// Rows of a table by index: y[i] = table[indices[i]]. The word embedding, and the rows whose logits are
/// asked for.
///
/// | tensor  | shape         | dtype | note                                          |
/// |---------|---------------|-------|-----------------------------------------------|
/// | table   | [count, size] | any   |                                               |
/// | indices | [rows]        | int64 | each in [0, count): the caller has checked it |
/// | y       | [rows, size]  | as table |                                            |
struct GatherRows final : Operation {
  static constexpr std::string_view kName = "GatherRows";

  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;
  void check_indices(const std::vector<TensorView>& inputs) const override;
};

/// `name` is the node's name, since this operation serves several purposes.
Value gather_rows(GraphBuilder& graph, std::string_view name, Value table, Value indices);

}  // namespace modeltorch
