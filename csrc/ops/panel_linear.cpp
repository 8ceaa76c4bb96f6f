#include "ops/panel_linear.h"

#include <algorithm>
#include <cstring>

#include "core/arithmetic.h"
#include "core/parallel.h"
#include "ops/cpu_kernel.h"

namespace modeltorch {
namespace {

constexpr int64_t kGroupColumns = 4 * kPanelRows;  // columns that a thread computes at a time
constexpr int64_t kFewRows = 8;                    // up to here a weight is read once, without blocks
constexpr int64_t kOperationsPerStep = 32;         // that one instruction does
constexpr int64_t kBlockStep = 32;                 // rows of blocks are a multiple of it
constexpr int64_t kStreamedGroups = 4;             // that pass few rows before their next summands
constexpr int64_t kTileRows = 16;                  // of PanelProduct::tiles
constexpr int64_t kTileSummands = 32;
constexpr int64_t kPartsPerThread = 4;  // at least, so that threads end together

}  // namespace

PanelLinear::PanelLinear(std::shared_ptr<const PanelWeight> weight, int64_t rows)
    : weight_(std::move(weight)), rows_(rows), threads_(pool_width()) {}

int64_t PanelLinear::groups() const {
  return divide_up(weight_->n, kGroupColumns);
}

int64_t PanelLinear::most_block_rows() const {
  const PanelBlocking& blocking = panel_kernels()->blocking;
  const int64_t fitting = blocking.resident / weight_->k / kBlockStep * kBlockStep;
  return std::clamp(fitting, blocking.least_rows, blocking.most_rows);
}

// Of each of the blocks that `rows` are cut into, but for the last.
int64_t PanelLinear::block_rows(int64_t rows) const {
  int64_t blocks = divide_up(rows, most_block_rows());
  while (blocks * groups() < kPartsPerThread * threads_ && rows > 2 * kBlockStep * blocks) ++blocks;
  return std::min(rows, round_up(divide_up(rows, blocks), kBlockStep));
}

PanelLinear::Cut PanelLinear::cut(int64_t block_rows) const {
  const PanelBlocking& blocking = panel_kernels()->blocking;
  const bool is_streamed = block_rows <= blocking.streamed_rows;
  const int64_t summands = is_streamed ? blocking.streamed_summands : blocking.summands;
  // Sums in float32 between passes cost more than a block that is somewhat too large.
  int64_t resident = blocking.resident / block_rows / summands * summands;
  if (weight_->k <= 2 * resident || resident == 0) resident = weight_->k;
  const int64_t columns = groups() / threads_ * kGroupColumns;
  const bool has_tiles = !is_streamed && blocking.tiles_columns > 0 && columns >= blocking.tiles_columns;
  return {block_rows, resident, summands, is_streamed ? kStreamedGroups : 1, has_tiles};
}

// Sums of the groups of a product, or of all if other columns come between the passes over one.
int64_t PanelLinear::sums_per_thread(const Cut& cut) const {
  if (weight_->k <= cut.summands) return 0;
  // The last run of groups of a part may be shorter, but its rows lie as far apart.
  const int64_t all = divide_up(groups(), cut.groups) * cut.groups;
  return cut.rows * kGroupColumns * (cut.resident < weight_->k ? all : cut.groups);
}

int64_t PanelLinear::tiles_per_thread(const Cut& cut) const {
  return cut.has_tiles ? divide_up(cut.rows, kTileRows) * kTileRows * cut.resident : 0;
}

size_t PanelLinear::scratch_bytes(const Cut& cut) const {
  return static_cast<size_t>(sums_per_thread(cut)) * sizeof(float) +
         static_cast<size_t>(tiles_per_thread(cut)) * sizeof(BFloat16);
}

// Blocks of fewer rows than there is room for may need more.
size_t PanelLinear::workspace_bytes() const {
  size_t most = 0;
  for (int64_t rows = std::min(rows_, most_block_rows()); rows > kFewRows; --rows)
    most = std::max(most, scratch_bytes(cut(rows)));
  return static_cast<size_t>(threads_) * most;
}

void PanelLinear::run(const KernelArgs& args) {
  const int64_t rows = args.in(0).dims[0];
  if (rows == 0) return;
  if (rows <= kFewRows) {
    const int64_t work = kGroupColumns * rows * weight_->k / kOperationsPerStep;
    return parallel_for(groups(), grain_for(work), [&](int64_t begin, int64_t end) {
      const Part part{0, rows, begin, end};
      finish(product_of(part, args, 0, weight_->k), part, args);
    });
  }
  const Cut cut = this->cut(block_rows(rows));
  const auto scratch_of = [&](int64_t thread) {
    auto* at = static_cast<std::byte*>(args.workspace) + static_cast<size_t>(thread) * scratch_bytes(cut);
    auto* sums = reinterpret_cast<float*>(at);
    return Scratch{sums, reinterpret_cast<BFloat16*>(sums + sums_per_thread(cut))};
  };
  parallel_for(threads_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t row = 0; row < rows; row += cut.rows) {
        const int64_t count = std::min(cut.rows, rows - row);
        // Groups of all blocks in a row, each as long as its rows, are cut into equal lengths.
        const auto first_of = [&](int64_t of) {
          const int64_t ahead = of * rows * groups() / threads_ - row * groups();
          return std::clamp<int64_t>(divide_up(std::max<int64_t>(0, ahead), count), 0, groups());
        };
        const Part part{row, count, first_of(thread), first_of(thread + 1)};
        if (part.begin < part.end) multiply(part, cut, args, scratch_of(thread));
      }
    }
  });
}

// Summands [from, from + k) of a part.
PanelProduct PanelLinear::product_of(const Part& part, const KernelArgs& args, int64_t from,
                                     int64_t k) const {
  const int64_t column = part.begin * kGroupColumns;
  return {.a = args.in(0).as<BFloat16>() + part.row * weight_->k + from,
          .a_stride = weight_->k,
          .m = part.rows,
          .panels = weight_->data() + column * weight_->k + from * kPanelRows,
          .panel_stride = kPanelRows * weight_->k,
          .k = k,
          .n = std::min(weight_->n, part.end * kGroupColumns) - column};
}

void PanelLinear::finish(const PanelProduct& product, const Part& part, const KernelArgs& args) const {
  const int64_t column = part.begin * kGroupColumns;
  const int64_t stride = args.out(0).dims[1];
  BFloat16* y = args.out(0).as<BFloat16>() + part.row * stride;
  if (weight_->is_gated) return panel_kernels()->to_swiglu(product, y + column / 2, stride);
  const BFloat16* bias = weight_->has_bias ? weight_->bias() + column : nullptr;
  panel_kernels()->to_bfloat16(product, bias, y + column, stride);
}

// Whole tiles of summands [from, from + k) of the rows of a part (PanelProduct::tiles).
void PanelLinear::copy_tiles(const Part& part, const KernelArgs& args, int64_t from, int64_t k,
                             BFloat16* tiles) const {
  const BFloat16* x = args.in(0).as<BFloat16>() + part.row * weight_->k + from;
  const int64_t across = k / kTileSummands;
  for (int64_t row = 0; row < part.rows; ++row) {
    BFloat16* to = tiles + (row / kTileRows * across * kTileRows + row % kTileRows) * kTileSummands;
    for (int64_t tile = 0; tile < across; ++tile) {
      std::memcpy(to + tile * kTileRows * kTileSummands, x + row * weight_->k + tile * kTileSummands,
                  kTileSummands * sizeof(BFloat16));
    }
  }
}

void PanelLinear::multiply(const Part& part, const Cut& cut, const KernelArgs& args,
                           const Scratch& scratch) const {
  const int64_t k = weight_->k;
  for (int64_t pass = 0; pass < k; pass += cut.resident) {
    const int64_t pass_end = std::min(k, pass + cut.resident);
    if (cut.has_tiles) copy_tiles(part, args, pass, pass_end - pass, scratch.tiles);
    for (int64_t group = part.begin; group < part.end; group += cut.groups) {
      const Part some{part.row, part.rows, group, std::min(group + cut.groups, part.end)};
      float* sums = scratch.sums + (cut.resident < k ? (group - part.begin) * cut.rows * kGroupColumns : 0);
      for (int64_t from = pass; from < pass_end; from += cut.summands) {
        PanelProduct product = product_of(some, args, from, std::min(cut.summands, pass_end - from));
        product.sums = from > 0 ? sums : nullptr;
        product.sums_stride = kGroupColumns * cut.groups;
        if (cut.has_tiles) {
          product.tiles = scratch.tiles + (from - pass) * kTileRows;
          product.tiles_stride = (pass_end - pass) / kTileSummands * kTileSummands * kTileRows;
        }
        const bool is_last_of_pass = from + cut.summands >= pass_end;
        if (!is_last_of_pass) {
          product.next = product.panels + cut.summands * kPanelRows;
        } else if (some.end < part.end) {
          product.next = product.panels + (pass - from) * kPanelRows + cut.groups * kGroupColumns * k;
        }
        if (from + cut.summands >= k) {
          finish(product, some, args);
        } else {
          panel_kernels()->to_float(product, sums, product.sums_stride);
        }
      }
    }
  }
}

}  // namespace modeltorch
