#include "ops/panel_linear.h"

#include <algorithm>

#include "core/parallel.h"
#include "ops/cpu_kernel.h"

namespace modeltorch {
namespace {

constexpr int64_t kGroupColumns = 4 * kPanelRows;  // columns that a thread computes at a time
constexpr int64_t kFewRows = 8;                    // up to here a weight is read once, without blocks
constexpr int64_t kOperationsPerStep = 32;         // that one instruction does
constexpr int64_t kBlockStep = 32;                 // rows of blocks are a multiple of it
constexpr int64_t kPartsPerThread = 4;             // at least, so that threads end together

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

PanelLinear::PanelLinear(std::shared_ptr<const PanelWeight> weight, int64_t rows)
    : weight_(std::move(weight)), rows_(rows), threads_(pool_width()) {}

int64_t PanelLinear::groups() const {
  return ceil_div(weight_->n, kGroupColumns);
}

PanelLinear::Cut PanelLinear::cut(int64_t rows) const {
  const PanelBlocking& blocking = panel_kernels()->blocking;
  const int64_t fitting = blocking.resident / weight_->k / kBlockStep * kBlockStep;
  const int64_t most = std::clamp(fitting, blocking.least_rows, blocking.most_rows);
  int64_t blocks = ceil_div(rows, most);
  while (blocks * groups() < kPartsPerThread * threads_ && rows > 2 * kBlockStep * blocks) ++blocks;
  const int64_t each = std::min(rows, ceil_div(ceil_div(rows, blocks), kBlockStep) * kBlockStep);
  // Sums in float32 between passes cost more than a block that is somewhat too large.
  int64_t resident = blocking.resident / each / blocking.summands * blocking.summands;
  if (weight_->k <= 2 * resident || resident == 0) resident = weight_->k;
  return {each, ceil_div(rows, each), resident};
}

// Sums of one group, or of all if other columns come between the passes over one.
int64_t PanelLinear::sums_per_thread(int64_t rows) const {
  if (rows <= kFewRows || weight_->k <= panel_kernels()->blocking.summands) return 0;
  const Cut cut = this->cut(rows);
  return cut.rows * kGroupColumns * (cut.resident < weight_->k ? groups() : 1);
}

// Fewer rows than there is room for may be cut into longer blocks. Between multiples of kBlockStep nothing
// grows.
size_t PanelLinear::workspace_bytes() const {
  int64_t most = 0;
  for (int64_t rows = ceil_div(rows_, kBlockStep) * kBlockStep; rows > 0; rows -= kBlockStep)
    most = std::max(most, sums_per_thread(rows));
  return static_cast<size_t>(threads_ * most) * sizeof(float);
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
  const Cut cut = this->cut(rows);
  const int64_t sums = sums_per_thread(rows);
  parallel_for(threads_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t row = 0; row < rows; row += cut.rows) {
        const int64_t count = std::min(cut.rows, rows - row);
        // Groups of all blocks in a row, each as long as its rows, are cut into equal lengths.
        const auto first_of = [&](int64_t of) {
          const int64_t ahead = of * rows * groups() / threads_ - row * groups();
          return std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, ahead), count), 0, groups());
        };
        const Part part{row, count, first_of(thread), first_of(thread + 1)};
        if (part.begin < part.end)
          multiply(part, cut, args, static_cast<float*>(args.workspace) + thread * sums);
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

void PanelLinear::multiply(const Part& part, const Cut& cut, const KernelArgs& args, float* sums) const {
  const int64_t k = weight_->k;
  const int64_t summands = panel_kernels()->blocking.summands;
  for (int64_t pass = 0; pass < k; pass += cut.resident) {
    const int64_t pass_end = std::min(k, pass + cut.resident);
    for (int64_t group = part.begin; group < part.end; ++group) {
      const Part one{part.row, part.rows, group, group + 1};
      float* group_sums = sums + (cut.resident < k ? (group - part.begin) * cut.rows * kGroupColumns : 0);
      for (int64_t from = pass; from < pass_end; from += summands) {
        PanelProduct product = product_of(one, args, from, std::min(summands, pass_end - from));
        product.sums = from > 0 ? group_sums : nullptr;
        product.sums_stride = kGroupColumns;
        const bool is_last_of_pass = from + summands >= pass_end;
        if (!is_last_of_pass) {
          product.next = product.panels + summands * kPanelRows;
        } else if (group + 1 < part.end) {
          product.next = product.panels + (pass - from) * kPanelRows + kGroupColumns * k;
        }
        if (from + summands >= k) {
          finish(product, one, args);
        } else {
          panel_kernels()->to_float(product, group_sums, kGroupColumns);
        }
      }
    }
  }
}

}  // namespace modeltorch
