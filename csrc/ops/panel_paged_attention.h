#pragma once

#include <cstdint>

#include "graph/kernel.h"
#include "ops/attention_shape.h"
#include "ops/panels.h"

namespace modeltorch {

/// PagedAttention in bfloat16 on processors that multiply bfloat16.
///
/// A task is one key head of one sequence, for all its query heads: keys and values are read once. Where
/// there are fewer tasks than threads, contexts are cut into parts whose softmax states are joined afterwards
/// (Dao et al., "Flash-Decoding", 2023).
class PanelPagedAttention final : public Kernel {
 public:
  /// True if this processor and this head size can.
  static bool serves(const AttentionShape& shape) {
    return panel_kernels() != nullptr && shape.head_size % kPanelRows == 0;
  }

  /// Room for at most `sequences` sequences.
  PanelPagedAttention(const AttentionShape& shape, int64_t sequences);

  size_t workspace_bytes() const override;
  void run(const KernelArgs& args) override;

 private:
  /// The state of one part: [group] maxima, [group] sums, [group, head_size] weighted values.
  struct State;

  int64_t state_floats() const { return shape_.group() * (shape_.head_size + 2); }
  size_t scratch_bytes() const;
  int64_t part_count(const KernelArgs& args) const;
  void attend(const KernelArgs& args, int64_t task, int64_t first, int64_t last, const State& state,
              char* scratch) const;
  void join(const KernelArgs& args, int64_t task, float* states, int64_t parts) const;

  AttentionShape shape_;
  int64_t tasks_;  ///< most of them
  int64_t threads_;
};

}  // namespace modeltorch
