#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "core/tensor_view.h"

namespace modeltorch {

/// What a node of the graph computes: a name, parameters and a shape rule. Device code is looked up by name.
class Operation {
 public:
  virtual ~Operation() = default;

  /// The name of the operation, the same on every device, for example "RmsNorm".
  virtual std::string_view name() const = 0;

  virtual int output_count() const { return 1; }

  /// Checks the inputs and returns the description of every output. Throws Error naming expected and given.
  virtual std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const = 0;
};

using OperationPtr = std::shared_ptr<const Operation>;

}  // namespace modeltorch
