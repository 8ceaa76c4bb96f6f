#include "graph/graph.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace modeltorch {

std::vector<size_t> Graph::consumers(Value value) const {
  std::vector<size_t> found;
  for (size_t index = 0; index < nodes.size(); ++index) {
    const std::vector<Value>& inputs = nodes[index].inputs;
    if (std::find(inputs.begin(), inputs.end(), value) != inputs.end()) found.push_back(index);
  }
  return found;
}

int64_t Graph::producer(Value value) const {
  for (size_t index = 0; index < nodes.size(); ++index) {
    const std::vector<Value>& outputs = nodes[index].outputs;
    if (std::find(outputs.begin(), outputs.end(), value) != outputs.end()) return static_cast<int64_t>(index);
  }
  return -1;
}

Value GraphBuilder::add_value(std::string name, ValueKind kind, int32_t slot) {
  graph_.values.push_back({std::move(name), kind, slot, 0});
  return {static_cast<int32_t>(graph_.values.size()) - 1};
}

std::vector<Value> GraphBuilder::add(std::string_view name, OperationPtr operation,
                                     std::vector<Value> inputs) {
  for (const Value value : inputs) {
    check(value.id >= 0 && value.id < static_cast<int32_t>(graph_.values.size()), operation->name(),
          ": an input is not a value of this graph");
  }
  const std::string full_name = scope_ + std::string(name);
  std::vector<Value> outputs;
  const int count = operation->output_count();
  for (int index = 0; index < count; ++index) {
    const std::string suffix = count > 1 ? ":" + std::to_string(index) : "";
    outputs.push_back(add_value(full_name + suffix, ValueKind::kIntermediate, -1));
  }
  graph_.nodes.push_back({full_name, std::move(operation), std::move(inputs), outputs});
  return outputs;
}

void GraphBuilder::mark_output(Value value, std::string name, int32_t slot) {
  check(graph_.producer(value) >= 0, "output ", name, " is not computed by a node of this graph");
  graph_.values[value.id] = {std::move(name), ValueKind::kOutput, slot, 0};
}

GraphBuilder::Scope::Scope(GraphBuilder& builder, std::string_view name)
    : builder_(builder), length_(builder.scope_.size()) {
  builder_.scope_.append(name).push_back('.');
}

}  // namespace modeltorch
