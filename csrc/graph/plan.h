#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

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

/// A graph set up for one bucket on one device: inferred shapes, a memory plan and a kernel for every node.
class Plan {
 public:
  /// Infers every shape once, plans the arena and sets every kernel up. `input_rows` has an entry per input
  /// slot, `packed` one per node (null where a node's weights are not packed).
  Plan(const Graph& graph, const Bucket& bucket, const Bindings& bindings, std::span<const Rows> input_rows,
       std::span<const PackedWeightPtr> packed, Device device);

  const Bucket& bucket() const { return bucket_; }
  size_t arena_bytes() const { return memory_.arena_bytes; }

  /// Takes the current weights and caches; needed again after either changed.
  void bind_persistent(const Bindings& bindings, int64_t version);
  int64_t bound_version() const { return bound_version_; }

  /// Runs every node in order. Nothing is inferred, planned or allocated here.
  void run(const Bindings& bindings, const StepInfo& step, std::byte* arena, void* stream);

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
  void set_up_kernels(std::span<const PackedWeightPtr> packed, Device device);
  void plan_arena();
  void place_in_arena(std::byte* arena);
  void run_node(size_t index, const StepInfo& step, bool traced);

  const Graph& graph_;
  Bucket bucket_;
  std::vector<TensorDesc> descs_;      ///< by value id, at bucket size
  std::vector<TensorView> views_;      ///< by value id, as of this run
  std::vector<NodeRun> runs_;          ///< by node
  std::vector<int32_t> arena_values_;  ///< values in the arena; their offsets come first in memory_
  std::vector<int32_t> step_values_;   ///< inputs and outputs, taken from the caller in every run
  MemoryPlan memory_;
  std::byte* arena_ = nullptr;
  void* stream_ = nullptr;
  int64_t bound_version_ = -1;
};

}  // namespace modeltorch
