#pragma once

#include <cstdint>

#include "core/check.h"
#include "graph/operation.h"

namespace modeltorch {

/// Heads and scale of an attention operation; query head h reads key head h / (heads / kv_heads).
struct AttentionShape {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  float scale = 1.0f;  ///< multiplies the scores, 1 / sqrt(head_size) as a rule

  int64_t group() const { return heads / kv_heads; }
};

/// The shape of an attention operation that is made by name.
inline AttentionShape attention_shape(const OperationParameters& parameters) {
  const AttentionShape shape{.heads = parameters.integer("heads", 1),
                             .kv_heads = parameters.integer("kv_heads", 1),
                             .head_size = parameters.integer("head_size", 1),
                             .scale = static_cast<float>(parameters.number("scale"))};
  check(shape.heads % shape.kv_heads == 0, "parameter heads must be a multiple of kv_heads, got ",
        shape.heads, " and ", shape.kv_heads);
  return shape;
}

}  // namespace modeltorch
