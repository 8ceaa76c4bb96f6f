#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "device/cuda.h"
#include "device/cuda_graph.h"
#include "graph/plan.h"
#include "ops/stage_rows.h"

namespace modeltorch {

/// The inputs of a plan that runs at the sizes of its bucket, in static buffers, and the graph that was
/// captured with them.
class StagedPlan final : public Plan::SessionState {
 public:
  /// `held` counts the graphs of a session, and outlives this.
  explicit StagedPlan(HeldGraphs& held) : held_(held) {}
  ~StagedPlan() override { drop(); }

  /// Binds the inputs of the plan to the static buffers, which become larger where they must, at the counts
  /// of `padded`. launch() then fills them.
  void stage(Plan& plan, const StepInfo& padded, Device device, cudaStream_t stream);

  /// Has launch() do the gathers at the front of the plan that read what it stages; returns how many nodes
  /// these are. Needs the plan's counts to be those of `padded` already.
  size_t take_gathers(Plan& plan, int32_t* fault);

  void launch(cudaStream_t stream) const { stage_rows(stage_, stream); }

  /// The state of the plan's layers as one launch (ops/decode_stack.h), larger where wider block tables need
  /// more. While `stream` is captured, not for the first time at a size.
  void* layer_state(size_t bytes, Device device, cudaStream_t stream);

  /// The graph, if it was captured with all that the plan is bound to now but the outputs.
  CudaGraph* graph();
  void keep(std::unique_ptr<CudaGraph> graph, int64_t bytes);
  void drop();

  /// Notes where the plan's outputs are; true if not all are where they were.
  bool exchange_outputs(Plan& plan);

 private:
  // What a captured graph holds by address.
  struct Captured {
    int64_t version = -1;
    const void* arena = nullptr;
    const void* inputs = nullptr;
    std::vector<std::pair<const void*, int64_t>> tables;  ///< inputs that no count follows, with their rows
    std::vector<int64_t> widths;

    friend bool operator==(const Captured&, const Captured&) = default;
  };

  StageRows::Part part_of(const TensorView& view, int64_t padded_rows, int32_t padding, size_t index);

  HeldGraphs& held_;
  CudaMemoryPtr inputs_;
  CudaMemoryPtr layer_state_;
  size_t layer_state_bytes_ = 0;
  size_t input_bytes_ = 0;
  cudaStream_t stream_ = nullptr;  ///< the last one that the memory was used on
  std::vector<int64_t> widths_;    ///< columns that each staged input has room for
  StageRows stage_;
  std::vector<int32_t> staged_;  ///< the value of each part
  Captured now_;
  Captured captured_;
  std::vector<const void*> outputs_;
  std::unique_ptr<CudaGraph> graph_;
  int64_t bytes_ = 0;
};

}  // namespace modeltorch
