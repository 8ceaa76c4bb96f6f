#pragma once

#include <cstdint>

#include "graph/kernel.h"
#include "ops/attention.h"
#include "ops/panels.h"

namespace modeltorch {

/// SelfAttention in bfloat16 on processors that multiply bfloat16: both products run over panels.
///
/// Keys and values of the step are packed once, each sequence to a multiple of 32 rows; a block of queries
/// then multiplies with 128 keys at a time, keeps a running softmax in float32, and rounds its weights to
/// bfloat16 for the second product, as flash attention does on a GPU.
class PanelSelfAttention final : public Kernel {
 public:
  /// True if this processor and this head size can.
  static bool serves(const AttentionShape& shape) {
    return panel_kernels() != nullptr && shape.head_size % kPanelRows == 0;
  }

  /// Room for at most `tokens` tokens in `sequences` sequences.
  PanelSelfAttention(const AttentionShape& shape, int64_t tokens, int64_t sequences);

  size_t workspace_bytes() const override;
  void run(const KernelArgs& args) override;

 private:
  struct Panels {
    BFloat16* keys;
    BFloat16* values;
  };
  struct Scratch;

  static int64_t padded(int64_t length);
  int64_t block_rows() const;
  Panels panels_of(const KernelArgs& args, int64_t padded_start, int64_t length, int64_t head) const;
  void pack(const KernelArgs& args) const;
  void attend(const KernelArgs& args, const QueryBlock& block, const Panels& panels, int64_t length,
              char* scratch) const;

  AttentionShape shape_;
  int64_t queries_per_block_;
  int64_t padded_tokens_;  ///< most rows of packed keys, of packed values
  int64_t threads_;
};

}  // namespace modeltorch
