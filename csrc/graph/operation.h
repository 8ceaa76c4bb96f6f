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
};

using OperationPtr = std::shared_ptr<const Operation>;

/// Parameters of a single operation by name, for callers who make one without a model.
class OperationParameters {
 public:
  explicit OperationParameters(std::map<std::string, double> values) : values_(std::move(values)) {}

  /// Throws Error if the parameter was not given.
  double number(const std::string& name) const;
  int64_t integer(const std::string& name) const { return static_cast<int64_t>(number(name)); }

 private:
  std::map<std::string, double> values_;
};

using OperationFactory = OperationPtr (*)(const OperationParameters& parameters);

/// Makes an operation known by name; called by a static object of the operation's file.
bool register_operation(std::string_view name, OperationFactory factory);

/// Makes the operation `name`. Throws Error listing the known names, or naming a missing parameter.
OperationPtr make_operation(const std::string& name, const OperationParameters& parameters);

}  // namespace modeltorch
