#include "graph/runner.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/parallel.h"
#include "core/warn.h"
#include "graph/fusion.h"

namespace modeltorch {

GraphRunner::GraphRunner(Graph graph, std::vector<Rows> input_rows, Device device)
    : graph_(std::move(graph)), input_rows_(std::move(input_rows)), session_(make_session(device)) {
  fuse(graph_, device.type);
  packed_.assign(graph_.nodes.size(), nullptr);
  for (const Node& node : graph_.nodes) {
    if (find_kernel(node.operation->name(), device.type) != nullptr) continue;
    fail(ErrorKind::kNotImplemented, "node ", node.name, ": this build has no ", node.operation->name(),
         " for device ", device);
  }
}

GraphRunner::~GraphRunner() {
  try {
    settle();
  } catch (const Error& error) {
    warn(concat("an object was destroyed before it could report: ", error.what()));
  }
}

void GraphRunner::bind_weights(std::vector<TensorView> weights) {
  weights_ = std::move(weights);
  packed_.assign(graph_.nodes.size(), nullptr);
  plans_.clear();
  ++version_;
}

void GraphRunner::set_weight_format(size_t slot, Format format) {
  weights_[slot].format = format;
  ++version_;
}

// Only weights are described: a packer looks at nothing else.
std::vector<TensorDesc> GraphRunner::weight_descs(const Node& node) const {
  std::vector<TensorDesc> descs;
  for (const Value value : node.inputs) {
    const ValueInfo& info = graph_.values[value.id];
    TensorDesc& desc = descs.emplace_back();
    if (info.kind == ValueKind::kWeight) desc = {weights_[info.slot].dtype, weights_[info.slot].dims};
  }
  return descs;
}

std::vector<GraphRunner::PackRequest> GraphRunner::pack_requests() const {
  std::vector<PackRequest> requests;
  for (size_t index = 0; index < graph_.nodes.size(); ++index) {
    const Node& node = graph_.nodes[index];
    const WeightPacker* packer = find_packer(node.operation->name(), session_->device().type);
    if (packer == nullptr) continue;
    PackRequest request{index, packer, {}};
    for (const size_t position : packer->replaces(*node.operation, weight_descs(node))) {
      const ValueInfo& info = graph_.values[node.inputs[position].id];
      if (info.kind == ValueKind::kWeight) request.slots.push_back(info.slot);
    }
    if (!request.slots.empty()) requests.push_back(std::move(request));
  }
  std::stable_partition(requests.begin(), requests.end(),
                        [](const PackRequest& request) { return request.packer->layout != nullptr; });
  return requests;
}

bool GraphRunner::is_read_unpacked(Value value) const {
  for (const size_t reader : graph_.consumers(value)) {
    if (packed_[reader] == nullptr) return true;
  }
  return false;
}

void GraphRunner::bind_packed(const PackRequest& request, PackedWeightPtr packed) {
  packed_[request.node] = std::move(packed);
  plans_.clear();
  ++version_;
  for (size_t id = 0; id < graph_.values.size(); ++id) {
    const ValueInfo& info = graph_.values[id];
    if (info.kind != ValueKind::kWeight) continue;
    const bool replaced =
        std::find(request.slots.begin(), request.slots.end(), info.slot) != request.slots.end();
    if (replaced && !is_read_unpacked({static_cast<int32_t>(id)})) weights_[info.slot].data = nullptr;
  }
}

void GraphRunner::bind_caches(std::vector<TensorView> caches) {
  const bool same = std::equal(
      caches.begin(), caches.end(), caches_.begin(), caches_.end(),
      [](const TensorView& a, const TensorView& b) { return a.dtype == b.dtype && a.dims == b.dims; });
  if (!same) plans_.clear();
  caches_ = std::move(caches);
  ++version_;
}

Plan& GraphRunner::plan_for(const Bucket& bucket, const Bindings& bindings) {
  const auto found =
      std::find_if(plans_.begin(), plans_.end(), [&](const Plan& plan) { return plan.bucket() == bucket; });
  if (found != plans_.end()) {
    plans_.splice(plans_.begin(), plans_, found);
    return plans_.front();
  }
  plans_.emplace_front(graph_, bucket, bindings, input_rows_, packed_, *session_);
  const auto nodes = static_cast<int64_t>(graph_.nodes.size());
  counters_.shape_inferences += nodes;
  counters_.kernel_setups += nodes;
  ++counters_.plans_built;
  if (plans_.size() > kMaxPlans) {
    plans_.pop_back();
    ++counters_.plans_evicted;
  }
  return plans_.front();
}

void GraphRunner::run(std::span<const TensorView> inputs, std::span<const TensorView> outputs,
                      const StepInfo& step, Arena& arena) {
  settle();
  const Bindings bindings{inputs, weights_, caches_, outputs};
  const Bucket bucket{bucket_size(step.tokens), bucket_size(step.sequences), bucket_size(step.logit_rows)};
  if (pool_width_ != pool_width()) plans_.clear();  // kernels made room for as many threads
  pool_width_ = pool_width();
  Plan& plan = plan_for(bucket, bindings);
  if (plan.bound_version() != version_) plan.bind_persistent(bindings, version_);
  plan.bind(bindings, step, arena.reserve(plan.arena_bytes()));
  session_->run(plan, step);
  ++counters_.executions;
}

bool GraphRunner::reads_input(int32_t slot) const {
  for (size_t id = 0; id < graph_.values.size(); ++id) {
    const ValueInfo& info = graph_.values[id];
    if (info.kind == ValueKind::kInput && info.slot == slot) {
      return !graph_.consumers({static_cast<int32_t>(id)}).empty();
    }
  }
  return false;
}

std::string GraphRunner::describe() const {
  if (!plans_.empty()) return plans_.front().describe();
  std::string text = "no step has run yet: shapes and the memory plan are unknown\n";
  for (const Node& node : graph_.nodes) {
    text += node.name + " = " + std::string(node.operation->name()) + "\n";
  }
  return text;
}

}  // namespace modeltorch
