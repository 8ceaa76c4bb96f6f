#include "ops/fused_linear.h"

#include <algorithm>

#include "core/check.h"
#include "graph/fusion.h"
#include "ops/add.h"
#include "ops/rms_norm.h"
#include "ops/shape_check.h"
#include "ops/swiglu.h"

namespace modeltorch {

std::vector<TensorDesc> FusedLinear::infer_shape(const std::vector<TensorDesc>& inputs) const {
  size_t expected = first_weight() + (has_residual ? 1 : 0);
  for (const LinearPart& part : parts) expected += part.has_bias ? 2 : 1;
  check_count(inputs, expected);
  check_rank("x", inputs[0], 2);
  if (has_norm) check_tensor("gamma", inputs[1], {inputs[0].dims[1]}, inputs[0].dtype);
  std::vector<TensorDesc> of_linear{inputs[0]};
  of_linear.insert(of_linear.end(), inputs.begin() + static_cast<int64_t>(first_weight()),
                   inputs.end() - (has_residual ? 1 : 0));
  std::vector<TensorDesc> y = Linear(parts).infer_shape(of_linear);
  if (swiglu) y = SwiGlu().infer_shape(y);
  if (has_residual) check_tensor("residual", inputs.back(), y[0].dims, y[0].dtype);
  return y;
}

namespace {

// The only node that reads `value`, or -1. A graph's output has a reader outside of it.
int64_t only_reader(const Graph& graph, Value value) {
  if (graph.values[value.id].kind != ValueKind::kIntermediate) return -1;
  const std::vector<size_t> readers = graph.consumers(value);
  return readers.size() == 1 ? static_cast<int64_t>(readers[0]) : -1;
}

template <class Op>
const Op* operation_of(const Graph& graph, int64_t node) {
  return node < 0 ? nullptr : dynamic_cast<const Op*>(graph.nodes[node].operation.get());
}

// Joins the linear at `index` with the nodes around it.
void fuse_linear(Graph& graph, size_t index) {
  Node node = graph.nodes[index];
  auto fused = std::make_shared<FusedLinear>(dynamic_cast<const Linear&>(*node.operation).parts);
  std::vector<size_t> absorbed;
  const int64_t before = graph.producer(node.inputs[0]);
  if (const RmsNorm* norm = operation_of<RmsNorm>(graph, before);
      norm != nullptr && only_reader(graph, node.inputs[0]) == static_cast<int64_t>(index)) {
    fused->has_norm = true;
    fused->epsilon = norm->epsilon;
    node.inputs[0] = graph.nodes[before].inputs[0];
    node.inputs.insert(node.inputs.begin() + 1, graph.nodes[before].inputs[1]);
    absorbed.push_back(static_cast<size_t>(before));
  }
  size_t last = index;
  int64_t reader = only_reader(graph, node.outputs[0]);
  if (operation_of<SwiGlu>(graph, reader) != nullptr) {
    fused->swiglu = true;
    node.outputs = graph.nodes[reader].outputs;
    last = static_cast<size_t>(reader);
    absorbed.push_back(last);
    reader = only_reader(graph, node.outputs[0]);
  }
  if (operation_of<Add>(graph, reader) != nullptr &&
      graph.nodes[reader].inputs[0] != graph.nodes[reader].inputs[1]) {
    const std::vector<Value>& terms = graph.nodes[reader].inputs;
    fused->has_residual = true;
    node.inputs.push_back(terms[0] == node.outputs[0] ? terms[1] : terms[0]);
    node.outputs = graph.nodes[reader].outputs;
    last = static_cast<size_t>(reader);
    absorbed.push_back(last);
  }
  node.operation = std::move(fused);
  // At the place of the last of them: there every input is known.
  graph.nodes[last] = std::move(node);
  absorbed.push_back(index);
  std::sort(absorbed.rbegin(), absorbed.rend());
  absorbed.erase(std::unique(absorbed.begin(), absorbed.end()), absorbed.end());
  for (const size_t gone : absorbed) {
    if (gone != last) graph.nodes.erase(graph.nodes.begin() + static_cast<int64_t>(gone));
  }
}

bool fuse_linears(Graph& graph) {
  bool changed = false;
  for (size_t index = 0; index < graph.nodes.size();) {
    if (dynamic_cast<const Linear*>(graph.nodes[index].operation.get()) == nullptr) {
      ++index;
      continue;
    }
    fuse_linear(graph, index);
    changed = true;
    index = 0;
  }
  return changed;
}

// Before AddRmsNorm, which would take the sum from one linear and the norm from the next.
const bool fusion_registered = register_fusion(FusedLinear::kName, fuse_linears, 1);
const bool known =
    register_operation(FusedLinear::kName, [](const OperationParameters& parameters) -> OperationPtr {
      const LinearPart part{parameters.integer("transposed", 0) != 0, parameters.integer("has_bias", 0) != 0};
      const auto count = static_cast<size_t>(parameters.integer("parts", 1));
      auto made = std::make_shared<FusedLinear>(std::vector<LinearPart>(count, part));
      made->has_norm = parameters.integer("has_norm", 0) != 0;
      made->epsilon = static_cast<float>(parameters.number("epsilon"));
      made->swiglu = parameters.integer("swiglu", 0) != 0;
      made->has_residual = parameters.integer("has_residual", 0) != 0;
      return made;
    });

}  // namespace
}  // namespace modeltorch
