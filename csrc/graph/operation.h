#pragma once

#include <map>
#include <memory>
#include <string>
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

  /// Checks the indices that the inputs hold, which lie in host memory and passed infer_shape. Throws Error
  /// naming the first one out of range. For callers who run an operation alone: a model checks its own
  /// inputs.
  virtual void check_indices(const std::vector<TensorView>&) const {}
};

using OperationPtr = std::shared_ptr<const Operation>;

/// Parameters of a single operation by name, for callers who make one without a model.
class OperationParameters {
 public:
  explicit OperationParameters(std::map<std::string, double> values) : values_(std::move(values)) {}

  /// Throws Error if the parameter was not given.
  double number(const std::string& name) const;
  /// Throws Error unless the parameter is a whole number of at least `least`.
  int64_t integer(const std::string& name, int64_t least) const;

 private:
  std::map<std::string, double> values_;
};

using OperationFactory = OperationPtr (*)(const OperationParameters& parameters);

/// Makes an operation known by name; called by a static object of the operation's file.
bool register_operation(std::string_view name, OperationFactory factory);

/// Makes the operation `name`. Throws Error listing the known names, or naming a missing parameter.
OperationPtr make_operation(const std::string& name, const OperationParameters& parameters);

}  // namespace modeltorch
