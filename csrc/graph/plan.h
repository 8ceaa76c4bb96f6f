#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "graph/graph.h"
#include "graph/kernel.h"
#include "graph/memory_planner.h"

namespace modeltorch {

/// What a graph's external values look like and where they are.
struct Bindings {
  std::span<const TensorView> inputs;
  std::span<const TensorView> weights;
  std::span<const TensorView> caches;
  std::span<const TensorView> outputs;
};

/// The sizes that a plan is made for; a run may bring any counts up to these.
struct Bucket {
  int64_t tokens = 0;
  int64_t sequences = 0;
  int64_t logit_rows = 0;

  friend bool operator==(const Bucket&, const Bucket&) = default;

  int64_t rows(Rows rows) const {
    return rows == Rows::kTokens ? tokens : rows == Rows::kSequences ? sequences : logit_rows;
  }
};

/// The smallest bucket size that holds `count`: powers of two to 64, then multiples of 64.
int64_t bucket_size(int64_t count);

class DeviceSession;

/// What a session says of the nodes that it launches.
struct NodeLaunch {
  const StepInfo* step = nullptr;
  void* stream = nullptr;  ///< KernelArgs::stream
  bool traced = false;     ///< announce the node: tracing() of this step
};

/// A graph set up for one bucket on one device: inferred shapes, a memory plan and a kernel for every node.
///
/// A step is bind() and then, by the runner's session, run_node() of every node in order. Nothing is
/// inferred, planned or allocated in a step.
class Plan {
 public:
  /// Infers every shape once, plans the arena and sets every kernel up. `input_rows` has an entry per input
  /// slot, `packed` one per node (null where a node's weights are not packed).
  Plan(const Graph& graph, const Bucket& bucket, const Bindings& bindings, std::span<const Rows> input_rows,
       std::span<const PackedWeightPtr> packed, DeviceSession& session);

  const Bucket& bucket() const { return bucket_; }
  size_t arena_bytes() const { return memory_.arena_bytes; }

  /// Takes the current weights and caches; needed again after either changed.
  void bind_persistent(const Bindings& bindings, int64_t version);
  int64_t bound_version() const { return bound_version_; }

  /// Takes the tensors, counts and memory of one step.
  void bind(const Bindings& bindings, const StepInfo& step, std::byte* arena);

  size_t node_count() const { return runs_.size(); }

  const Graph& graph() const { return graph_; }

  // For sessions that launch a step in another form than it was bound in.

  /// The graph's inputs and outputs: the values that every step brings.
  const std::vector<int32_t>& step_values() const { return step_values_; }
  const TensorDesc& desc(int32_t value) const { return descs_[value]; }

  /// What the value is bound to. A session may exchange it for the rest of the step.
  TensorView& view(int32_t value) { return views_[value]; }

  /// Gives the intermediates the sizes of other counts for the rest of the step.
  void set_counts(const StepInfo& step);

  const std::byte* arena() const { return arena_; }

  /// What a session keeps for this plan.
  class SessionState {
   public:
    virtual ~SessionState() = default;
  };
  std::unique_ptr<SessionState>& session_state() { return session_state_; }

  /// A node's kernel, and what run_node gives it.
  const Kernel& kernel(size_t index) const { return *runs_[index].kernel; }
  KernelArgs args(size_t index, const NodeLaunch& launch) const { return args_of(runs_[index], launch); }

  /// Kernel::prepare of a node. Throws Error naming the node.
  void prepare_node(size_t index, const NodeLaunch& launch);

  /// Runs a node. Throws Error naming the node.
  void run_node(size_t index, const NodeLaunch& launch);

  /// Runs `body`; an Error that it throws leaves with the name of the node.
  template <class Body>
  void name_errors(size_t index, Body&& body) const {
    try {
      body();
    } catch (const Error& error) {
      rethrow_at(graph_.nodes[index], error);
    }
  }

  /// Nodes with shapes, and the arena with offsets, as text.
  std::string describe() const;

 private:
  struct NodeRun {
    std::unique_ptr<Kernel> kernel;
    std::vector<const TensorView*> inputs;
    std::vector<const TensorView*> outputs;
    size_t workspace_offset = 0;
  };

  void infer_shapes(const Bindings& bindings, std::span<const Rows> input_rows);
  void set_up_kernels(std::span<const PackedWeightPtr> packed, DeviceSession& session);
  void plan_arena(size_t alignment);
  void place_in_arena(std::byte* arena);
  [[noreturn]] static void rethrow_at(const Node& node, const Error& error);
  KernelArgs args_of(const NodeRun& node, const NodeLaunch& launch) const;

  const Graph& graph_;
  Bucket bucket_;
  std::vector<TensorDesc> descs_;      ///< by value id, at bucket size
  std::vector<TensorView> views_;      ///< by value id, as of this run
  std::vector<NodeRun> runs_;          ///< by node
  std::vector<int32_t> arena_values_;  ///< values in the arena; their offsets come first in memory_
  std::vector<int32_t> step_values_;   ///< inputs and outputs, taken from the caller in every run
  MemoryPlan memory_;
  std::byte* arena_ = nullptr;
  int64_t bound_version_ = -1;
  std::unique_ptr<SessionState> session_state_;
};

}  // namespace modeltorch
