#include "graph/plan.h"

#include <algorithm>
#include <bit>

#include "core/arithmetic.h"
#include "core/check.h"
#include "graph/session.h"
#include "graph/trace.h"

namespace modeltorch {
namespace {

const TensorView& external_view(const ValueInfo& info, const Bindings& bindings) {
  const std::span<const TensorView> all = info.kind == ValueKind::kInput    ? bindings.inputs
                                          : info.kind == ValueKind::kWeight ? bindings.weights
                                          : info.kind == ValueKind::kCache  ? bindings.caches
                                                                            : bindings.outputs;
  return all[info.slot];
}

}  // namespace

int64_t bucket_size(int64_t count) {
  constexpr int64_t kStep = 64;
  if (count <= kStep)
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(count, 1))));
  return round_up(count, kStep);
}

void Plan::rethrow_at(const Node& node, const Error& error) {
  fail(error.kind(), "node ", node.name, " (", node.operation->name(), "): ", error.what());
}

Plan::Plan(const Graph& graph, const Bucket& bucket, const Bindings& bindings,
           std::span<const Rows> input_rows, std::span<const PackedWeightPtr> packed, DeviceSession& session)
    : graph_(graph), bucket_(bucket), descs_(graph.values.size()), views_(graph.values.size()) {
  infer_shapes(bindings, input_rows);
  set_up_kernels(packed, session);
  plan_arena(session.alignment());
}

void Plan::infer_shapes(const Bindings& bindings, std::span<const Rows> input_rows) {
  for (size_t id = 0; id < graph_.values.size(); ++id) {
    const ValueInfo& info = graph_.values[id];
    if (info.kind == ValueKind::kIntermediate || info.kind == ValueKind::kOutput) continue;
    const TensorView& view = external_view(info, bindings);
    const Rows rows = info.kind == ValueKind::kInput ? input_rows[info.slot] : Rows::kFixed;
    descs_[id] = {view.dtype, view.dims, rows};
    if (rows != Rows::kFixed) descs_[id].dims[0] = bucket_.rows(rows);
  }
  for (const Node& node : graph_.nodes) {
    std::vector<TensorDesc> inputs;
    for (const Value value : node.inputs) inputs.push_back(descs_[value.id]);
    try {
      const std::vector<TensorDesc> outputs = node.operation->infer_shape(inputs);
      for (size_t index = 0; index < outputs.size(); ++index) descs_[node.outputs[index].id] = outputs[index];
    } catch (const Error& error) {
      rethrow_at(node, error);
    }
  }
}

void Plan::set_up_kernels(std::span<const PackedWeightPtr> packed, DeviceSession& session) {
  const Device device = session.device();
  for (size_t index = 0; index < graph_.nodes.size(); ++index) {
    const Node& node = graph_.nodes[index];
    std::vector<TensorDesc> inputs;
    std::vector<TensorDesc> outputs;
    NodeRun run;
    for (const Value value : node.inputs) {
      inputs.push_back(descs_[value.id]);
      run.inputs.push_back(&views_[value.id]);
    }
    for (const Value value : node.outputs) {
      outputs.push_back(descs_[value.id]);
      run.outputs.push_back(&views_[value.id]);
    }
    try {
      const KernelFactory factory = find_kernel(node.operation->name(), device.type);
      if (factory == nullptr) fail(ErrorKind::kNotImplemented, "no kernel for device ", device);
      run.kernel = factory({*node.operation, inputs, outputs, device, packed[index], &session});
    } catch (const Error& error) {
      rethrow_at(node, error);
    }
    runs_.push_back(std::move(run));
  }
}

void Plan::plan_arena(size_t alignment) {
  std::vector<Lifetime> lifetimes;
  std::vector<int64_t> last_reader(graph_.values.size(), -1);
  std::vector<int64_t> writer(graph_.values.size(), -1);
  for (size_t index = 0; index < graph_.nodes.size(); ++index) {
    for (const Value value : graph_.nodes[index].outputs) {
      writer[value.id] = last_reader[value.id] = static_cast<int64_t>(index);
    }
    for (const Value value : graph_.nodes[index].inputs) last_reader[value.id] = static_cast<int64_t>(index);
  }
  for (size_t id = 0; id < graph_.values.size(); ++id) {
    const ValueKind kind = graph_.values[id].kind;
    if (kind == ValueKind::kInput || kind == ValueKind::kOutput)
      step_values_.push_back(static_cast<int32_t>(id));
    if (kind != ValueKind::kIntermediate || writer[id] < 0) continue;
    arena_values_.push_back(static_cast<int32_t>(id));
    lifetimes.push_back({descs_[id].bytes(), writer[id], last_reader[id]});
  }
  for (size_t index = 0; index < runs_.size(); ++index) {
    const auto node = static_cast<int64_t>(index);
    lifetimes.push_back({runs_[index].kernel->workspace_bytes(), node, node});
  }
  memory_ = plan_memory(lifetimes, alignment);
  for (const int32_t id : arena_values_) views_[id] = {nullptr, descs_[id].dtype, descs_[id].dims};
  for (size_t index = 0; index < runs_.size(); ++index) {
    runs_[index].workspace_offset = memory_.offsets[arena_values_.size() + index];
  }
}

void Plan::bind_persistent(const Bindings& bindings, int64_t version) {
  for (size_t id = 0; id < graph_.values.size(); ++id) {
    const ValueInfo& info = graph_.values[id];
    if (info.kind == ValueKind::kWeight || info.kind == ValueKind::kCache)
      views_[id] = external_view(info, bindings);
  }
  bound_version_ = version;
}

void Plan::place_in_arena(std::byte* arena) {
  for (size_t index = 0; index < arena_values_.size(); ++index) {
    views_[arena_values_[index]].data = arena + memory_.offsets[index];
  }
  arena_ = arena;
}

void Plan::bind(const Bindings& bindings, const StepInfo& step, std::byte* arena) {
  if (arena != arena_) place_in_arena(arena);
  set_counts(step);
  for (const int32_t id : step_values_) views_[id] = external_view(graph_.values[id], bindings);
}

void Plan::set_counts(const StepInfo& step) {
  for (const int32_t id : arena_values_) {
    if (descs_[id].rows != Rows::kFixed) views_[id].dims[0] = step.rows(descs_[id].rows);
  }
}

KernelArgs Plan::args_of(const NodeRun& node, const NodeLaunch& launch) const {
  return {node.inputs, node.outputs, arena_ + node.workspace_offset, launch.stream, launch.step};
}

void Plan::prepare_node(size_t index, const NodeLaunch& launch) {
  name_errors(index, [&] { runs_[index].kernel->prepare(args_of(runs_[index], launch)); });
}

void Plan::run_node(size_t index, const NodeLaunch& launch) {
  name_errors(index, [&] {
    NodeRun& node = runs_[index];
    if (!launch.traced) return node.kernel->run(args_of(node, launch));
    const NodeSpan span({graph_.nodes[index].name, node.inputs, node.outputs});
    node.kernel->run(args_of(node, launch));
  });
}

std::string Plan::describe() const {
  std::string text = concat("plan for ", bucket_.tokens, " tokens, ", bucket_.sequences, " sequences, ",
                            bucket_.logit_rows, " logit rows; arena ", memory_.arena_bytes, " bytes\n");
  for (const Node& node : graph_.nodes) {
    text += concat("  ", node.name, " = ", node.operation->name(), "(");
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const int32_t id = node.inputs[i].id;
      text += concat(i ? ", " : "", graph_.values[id].name, " ", descs_[id]);
    }
    text += ") ->";
    for (const Value value : node.outputs)
      text += concat(" ", graph_.values[value.id].name, " ", descs_[value.id]);
    text += "\n";
  }
  text += "memory plan\n";
  for (size_t index = 0; index < arena_values_.size(); ++index) {
    const int32_t id = arena_values_[index];
    text +=
        concat("  ", memory_.offsets[index], " + ", descs_[id].bytes(), "  ", graph_.values[id].name, "\n");
  }
  return text;
}

}  // namespace modeltorch
