#pragma once

#include <cstdint>

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
  return {.heads = parameters.integer("heads"),
          .kv_heads = parameters.integer("kv_heads"),
          .head_size = parameters.integer("head_size"),
          .scale = static_cast<float>(parameters.number("scale"))};
}

}  // namespace modeltorch
