#include "device/cuda_staging.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "core/check.h"
#include "ops/gather_rows.h"

namespace modeltorch {
namespace {

constexpr int64_t kAlignment = 256;  // of a staged input

bool is_staged(const Plan& plan, int32_t value) {
  return plan.graph().values[value].kind == ValueKind::kInput && plan.desc(value).rows != Rows::kFixed;
}

bool fits_gather(const void* address, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(row_bytes)) %
             StageRows::kGatherBytes ==
         0;
}

}  // namespace

StageRows::Part StagedPlan::part_of(const TensorView& view, int64_t padded_rows, int32_t padding,
                                    size_t index) {
  int64_t columns = 1;
  for (int axis = 1; axis < view.dims.rank(); ++axis) columns *= view.dims[axis];
  if (widths_.size() <= index) widths_.push_back(0);
  int64_t& width = widths_[index];
  if (columns > width) width = view.dims.rank() == 1 ? 1 : std::max(columns, 2 * width);
  const auto unit = static_cast<int64_t>(dtype_size(view.dtype));
  return {.from = view.data,
          .rows = view.dims[0],
          .columns = columns * unit / 2,
          .padded_rows = padded_rows,
          .padded_columns = width * unit / 2,
          .padding = padding};
}

void StagedPlan::stage(Plan& plan, const StepInfo& padded, Device device, cudaStream_t stream) {
  stage_.count = 0;
  stage_.gather_count = 0;
  staged_.clear();
  now_.version = plan.bound_version();
  now_.arena = plan.arena();
  now_.tables.clear();
  size_t bytes = 0;
  for (const int32_t value : plan.step_values()) {
    TensorView& view = plan.view(value);
    const ValueInfo& info = plan.graph().values[value];
    if (info.kind != ValueKind::kInput) continue;
    if (!is_staged(plan, value)) {
      now_.tables.emplace_back(view.data, view.dims[0]);
      continue;
    }
    check(stage_.count < StageRows::kMaxParts, "a step has at most ", StageRows::kMaxParts,
          " inputs with rows");
    StageRows::Part& part = stage_.parts[stage_.count++];
    part = part_of(view, padded.rows(plan.desc(value).rows), info.padding, staged_.size());
    part.offset = bytes;
    bytes += static_cast<size_t>(round_up(part.padded_rows * part.padded_columns * 2, kAlignment));
    if (view.dims.rank() == 2) view.dims[1] = widths_[staged_.size()];
    view.dims[0] = part.padded_rows;
    staged_.push_back(value);
  }
  if (layer_state_ && stream_ != stream) layer_state_->use_on_current_stream();
  if (bytes > input_bytes_ || !inputs_) {
    inputs_ = cuda_host().allocate(bytes, device.index);
    input_bytes_ = bytes;
  } else if (stream_ != stream) {
    inputs_->use_on_current_stream();
  }
  stream_ = stream;
  now_.inputs = inputs_->data();
  now_.widths = widths_;
  for (size_t index = 0; index < staged_.size(); ++index) {
    StageRows::Part& part = stage_.parts[index];
    plan.view(staged_[index]).data = part.to = inputs_->data() + part.offset;
  }
}

size_t StagedPlan::take_gathers(Plan& plan, int32_t* fault) {
  const Graph& graph = plan.graph();
  size_t taken = 0;
  for (; taken < graph.nodes.size() && stage_.gather_count < StageRows::kMaxGathers; ++taken) {
    const Node& node = graph.nodes[taken];
    if (node.operation->name() != GatherRows::kName) break;
    const auto numbers = std::find(staged_.begin(), staged_.end(), node.inputs[1].id);
    const ValueKind kind = graph.values[node.inputs[0].id].kind;
    const bool is_table = kind == ValueKind::kWeight || kind == ValueKind::kInput;
    if (numbers == staged_.end() || !is_table) break;
    const TensorView& table = plan.view(node.inputs[0].id);
    const TensorView& y = plan.view(node.outputs[0].id);
    const int64_t row_bytes = table.dims[1] * static_cast<int64_t>(dtype_size(table.dtype));
    if (!fits_gather(table.data, row_bytes) || !fits_gather(y.data, row_bytes)) break;
    stage_.gathers[stage_.gather_count++] = {.table = table.data,
                                             .table_rows = table.dims[0],
                                             .row_bytes = row_bytes,
                                             .part = static_cast<int>(numbers - staged_.begin()),
                                             .y = y.data,
                                             .fault = fault};
  }
  return taken;
}

void* StagedPlan::layer_state(size_t bytes, Device device, cudaStream_t stream) {
  if (!layer_state_ || bytes > layer_state_bytes_) {
    layer_state_.reset();
    layer_state_ = cuda_host().allocate(bytes, device.index);
    layer_state_bytes_ = bytes;
    check_cuda(cudaMemsetAsync(layer_state_->data(), 0xff, bytes, stream), "cudaMemsetAsync");
  }
  return layer_state_->data();
}

CudaGraph* StagedPlan::graph() {
  return graph_ && captured_ == now_ ? graph_.get() : nullptr;
}

void StagedPlan::keep(std::unique_ptr<CudaGraph> graph, int64_t bytes) {
  drop();
  graph_ = std::move(graph);
  captured_ = now_;
  bytes_ = bytes + static_cast<int64_t>(input_bytes_ + layer_state_bytes_);
  held_.bytes += bytes_;
  ++held_.graphs;
}

bool StagedPlan::exchange_outputs(Plan& plan) {
  bool changed = false;
  size_t index = 0;
  for (const int32_t value : plan.step_values()) {
    if (plan.graph().values[value].kind != ValueKind::kOutput) continue;
    if (outputs_.size() <= index) outputs_.push_back(nullptr);
    const void* data = plan.view(value).data;
    changed = changed || outputs_[index] != data;
    outputs_[index++] = data;
  }
  return changed;
}

void StagedPlan::drop() {
  if (graph_) --held_.graphs;
  graph_.reset();
  held_.bytes -= bytes_;
  bytes_ = 0;
}

}  // namespace modeltorch
