#pragma once

#include <cstddef>
#include <optional>
#include <variant>

#include "graph/plan.h"
#include "ops/decode_attention.h"
#include "ops/decode_stack.h"
#include "ops/few_row_linear.h"

namespace modeltorch {

/// What a node computes, in the words of the kernels of a decode step; nothing where they cannot.
using DecodeTask = std::variant<std::monostate, FewRowLinear, DecodeAttention>;

/// A kernel that can say what it would do, so that a session may do it otherwise.
class HasDecodeTask {
 public:
  virtual ~HasDecodeTask() = default;
  virtual DecodeTask decode_task(const KernelArgs& args) const = 0;
};

/// Consecutive nodes of a plan that are decoder layers, as one launch. Its state is left to the caller.
struct JoinedLayers {
  size_t begin = 0, end = 0;  ///< nodes
  DecodeStack stack;
};

/// The layers that begin with the first linear among nodes [begin, end) and that one launch can and should
/// do.
std::optional<JoinedLayers> join_layers(Plan& plan, const NodeLaunch& launch, size_t begin, size_t end);

}  // namespace modeltorch
