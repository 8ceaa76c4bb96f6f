#pragma once

#include <memory>

#include "graph/kernel.h"
#include "ops/panel_weight.h"

namespace modeltorch {

/// Linear in bfloat16 over a packed weight; for a gated one, Linear and SwiGlu in one pass.
///
/// Few rows read the panels once, each thread a run of them. Many rows are cut into blocks: all columns of a
/// thread are multiplied with one block of rows before the next, and long sums are taken in parts, so that
/// the rows stay in the second-level cache and two panels in the first (PanelBlocking; Goto and van de Geijn,
/// "Anatomy of high-performance matrix multiplication", 2008). With some tens of rows it is the rows that
/// stay in the first, and panels that pass through.
class PanelLinear final : public Kernel {
 public:
  /// Room for at most `rows` rows.
  PanelLinear(std::shared_ptr<const PanelWeight> weight, int64_t rows);

  size_t workspace_bytes() const override;
  void run(const KernelArgs& args) override;

 private:
  /// How a product is cut.
  struct Cut {
    int64_t rows = 0;        ///< of a block of x
    int64_t resident = 0;    ///< summands of a block of x that stay in the cache over all columns
    int64_t summands = 0;    ///< of a product
    int64_t groups = 0;      ///< of columns, in a product
    bool has_tiles = false;  ///< of x, see PanelProduct
  };
  /// A thread's part of the workspace.
  struct Scratch {
    float* sums = nullptr;
    BFloat16* tiles = nullptr;
  };
  /// Groups [begin, end) of columns for rows [row, row + rows).
  struct Part {
    int64_t row = 0;
    int64_t rows = 0;
    int64_t begin = 0;
    int64_t end = 0;
  };

  int64_t groups() const;
  int64_t most_block_rows() const;
  int64_t block_rows(int64_t rows) const;
  Cut cut(int64_t block_rows) const;
  int64_t sums_per_thread(const Cut& cut) const;
  int64_t tiles_per_thread(const Cut& cut) const;
  size_t scratch_bytes(const Cut& cut) const;
  PanelProduct product_of(const Part& part, const KernelArgs& args, int64_t from, int64_t k) const;
  void finish(const PanelProduct& product, const Part& part, const KernelArgs& args) const;
  void copy_tiles(const Part& part, const KernelArgs& args, int64_t from, int64_t k, BFloat16* tiles) const;
  void multiply(const Part& part, const Cut& cut, const KernelArgs& args, const Scratch& scratch) const;

  std::shared_ptr<const PanelWeight> weight_;
  int64_t rows_;
  int64_t threads_;
};

}  // namespace modeltorch
