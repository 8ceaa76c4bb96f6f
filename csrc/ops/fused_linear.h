#pragma once

#include <vector>

#include "ops/linear.h"

namespace modeltorch {

/// A linear with what stands around it in a decoder layer:
/// y = residual + act(norm(x) . cat_i(w_i)^T + cat_i(b_i)), norm, act and residual each being optional.
///
/// | tensor   | shape              | dtype | note                                                   |
/// |----------|--------------------|-------|--------------------------------------------------------|
/// | x        | [rows, k]          | T     |                                                        |
/// | gamma    | [k]                | T     | with has_norm: norm is RmsNorm with epsilon            |
/// | w_i, b_i | as those of Linear | T     |                                                        |
/// | residual | as y               | T     | with has_residual; last of the inputs                  |
/// | y        | [rows, columns]    | T     | sum n_i columns; with swiglu half of them, see SwiGlu  |
///
/// Intermediates may be rounded to T or not. Made by a fusion pass from RmsNorm, Linear, SwiGlu and Add, on
/// devices that have a kernel for it.
struct FusedLinear final : Operation {
  static constexpr std::string_view kName = "FusedLinear";
  std::vector<LinearPart> parts;
  bool has_norm = false;
  float epsilon = 0.0f;
  bool swiglu = false;
  bool has_residual = false;

  explicit FusedLinear(std::vector<LinearPart> parts) : parts(std::move(parts)) {}
  std::string_view name() const override { return kName; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override;

  /// Position of the first weight among the inputs.
  size_t first_weight() const { return has_norm ? 2 : 1; }
};

}  // namespace modeltorch
