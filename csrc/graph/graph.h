#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "graph/operation.h"

namespace modeltorch {

/// A handle to a tensor of a graph.
struct Value {
  int32_t id = -1;

  friend bool operator==(Value, Value) = default;
};

/// Who owns the memory of a value.
enum class ValueKind : uint8_t {
  kInput,         ///< given with every run
  kWeight,        ///< bound by set_weight
  kCache,         ///< bound by set_kv_cache; nodes may write to it
  kIntermediate,  ///< lives in the arena
  kOutput,        ///< written into a tensor given with every run
};

struct ValueInfo {
  std::string name;
  ValueKind kind = ValueKind::kIntermediate;
  int32_t slot = -1;    ///< index among the inputs, weights, caches or outputs of the graph
  int32_t padding = 0;  ///< of an input: what rows beyond those of a step hold (Graph::can_pad)
};

struct Node {
  std::string name;  ///< "layers.3.attn.rope"
  OperationPtr operation;
  std::vector<Value> inputs;
  std::vector<Value> outputs;
};

/// Nodes in execution order and the values between them.
struct Graph {
  std::vector<ValueInfo> values;
  std::vector<Node> nodes;

  /// A step may be filled up to its bucket with rows of each input's padding: no other row depends on them,
  /// and they write to no cache. A device may then launch every step of a bucket in the same way.
  bool can_pad = false;

  /// Nodes that read `value`, in order.
  std::vector<size_t> consumers(Value value) const;

  /// The node that writes `value`, or -1 for a value that comes from outside.
  int64_t producer(Value value) const;
};

/// Writes a graph node by node. Operations offer a typed function each (`rms_norm(builder, x, gamma, eps)`).
class GraphBuilder {
 public:
  /// External values. `slot` is the caller's index for binding.
  Value input(std::string name, int32_t slot, int32_t padding = 0) {
    const Value value = add_value(std::move(name), ValueKind::kInput, slot);
    graph_.values[value.id].padding = padding;
    return value;
  }
  Value weight(std::string name, int32_t slot) {
    return add_value(std::move(name), ValueKind::kWeight, slot);
  }
  Value cache(std::string name, int32_t slot) { return add_value(std::move(name), ValueKind::kCache, slot); }

  /// Appends a node and returns its outputs, named `<scope>.<name>`.
  std::vector<Value> add(std::string_view name, OperationPtr operation, std::vector<Value> inputs);

  /// Makes `value` the graph's output number `slot`.
  void mark_output(Value value, std::string name, int32_t slot);

  /// Prefixes the names of the nodes that are added while it lives.
  class Scope {
   public:
    Scope(GraphBuilder& builder, std::string_view name);
    ~Scope() { builder_.scope_.resize(length_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    GraphBuilder& builder_;
    size_t length_;
  };

  /// Sets Graph::can_pad.
  void allow_padding() { graph_.can_pad = true; }

  Graph finish() { return std::move(graph_); }

 private:
  Value add_value(std::string name, ValueKind kind, int32_t slot);

  Graph graph_;
  std::string scope_;
};

}  // namespace modeltorch
