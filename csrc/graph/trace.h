#pragma once

#include <string>
#include <vector>

#include "core/tensor_view.h"

namespace modeltorch {

/// What an observer is told of a node that is about to run.
struct NodeEvent {
  const std::string& name;
  const std::vector<const TensorView*>& inputs;
  const std::vector<const TensorView*>& outputs;
};

/// Sees every node of a step. Installed once, at load (a profiler's record function, for example).
struct NodeObserver {
  bool (*active)() = nullptr;                  ///< asked once a step; false costs nothing more
  void* (*begin)(const NodeEvent&) = nullptr;  ///< returns a token for `end`
  void (*end)(void* token) = nullptr;
};

void set_node_observer(const NodeObserver& observer);

/// True if nodes must be announced in this step: an observer is active or MODELTORCH_TRACE=1.
bool tracing();

/// Announces a node for as long as it lives; prints name, shapes and microseconds under MODELTORCH_TRACE=1.
class NodeSpan {
 public:
  explicit NodeSpan(const NodeEvent& event);
  ~NodeSpan();
  NodeSpan(const NodeSpan&) = delete;
  NodeSpan& operator=(const NodeSpan&) = delete;

 private:
  NodeEvent event_;
  void* token_ = nullptr;
  int64_t start_ns_ = 0;
};

}  // namespace modeltorch
