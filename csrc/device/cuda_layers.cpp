#include "device/cuda_layers.h"

#include <algorithm>

namespace modeltorch {
namespace {

constexpr size_t kNodes = 5;  // of a layer: qkv, attention, o, gate and up, down

// The nodes of a layer, in order.
struct LayerTasks {
  FewRowLinear qkv, o, gate_up, down;
  DecodeAttention attention;
};

DecodeTask task_of(Plan& plan, const NodeLaunch& launch, size_t node) {
  const auto* kernel = dynamic_cast<const HasDecodeTask*>(&plan.kernel(node));
  return kernel == nullptr ? DecodeTask() : kernel->decode_task(plan.args(node, launch));
}

// The five nodes from `node` on, if they are of these kinds.
std::optional<LayerTasks> tasks_from(Plan& plan, const NodeLaunch& launch, size_t node, size_t end) {
  if (node + kNodes > end) return std::nullopt;
  LayerTasks tasks;
  const auto take = [&](size_t at, auto& to) {
    const DecodeTask task = task_of(plan, launch, node + at);
    const auto* found = std::get_if<std::remove_reference_t<decltype(to)>>(&task);
    if (found != nullptr) to = *found;
    return found != nullptr;
  };
  const bool all = take(0, tasks.qkv) && take(1, tasks.attention) && take(2, tasks.o) &&
                   take(3, tasks.gate_up) && take(4, tasks.down);
  return all ? std::optional(tasks) : std::nullopt;
}

bool has_bias(const FewRowLinear& linear) {
  return std::any_of(linear.parts, linear.parts + linear.part_count,
                     [](const FewRowLinear::Part& part) { return part.bias != nullptr; });
}

bool is_plain_linear(const FewRowLinear& linear) {
  return linear.part_count == 1 && !has_bias(linear) && linear.gamma == nullptr && !linear.swiglu;
}

// Each node reads what those before it in the layer wrote, and is of the kind that decode_stack computes.
bool is_layer(const LayerTasks& t) {
  const bool attends = t.qkv.gamma != nullptr && t.qkv.residual == nullptr && !t.qkv.swiglu &&
                       t.attention.qkv == t.qkv.y && t.o.x == t.attention.y && is_plain_linear(t.o) &&
                       t.o.residual == t.qkv.x;
  return attends && t.gate_up.gamma != nullptr && t.gate_up.swiglu && t.gate_up.residual == nullptr &&
         !has_bias(t.gate_up) && t.gate_up.x == t.o.y && t.down.x == t.gate_up.y && is_plain_linear(t.down) &&
         t.down.residual == t.o.y && t.gate_up.epsilon == t.qkv.epsilon;
}

// Two layers that differ in weights and caches alone.
bool is_alike(const LayerTasks& a, const LayerTasks& b) {
  if (a.qkv.part_count != b.qkv.part_count || a.qkv.epsilon != b.qkv.epsilon) return false;
  for (int part = 0; part < a.qkv.part_count; ++part) {
    if (a.qkv.parts[part].n != b.qkv.parts[part].n) return false;
  }
  const DecodeAttention &c = a.attention, &d = b.attention;
  return a.qkv.dtype == b.qkv.dtype && a.qkv.rows == b.qkv.rows && a.qkv.k == b.qkv.k &&
         a.down.k == b.down.k && c.heads == d.heads && c.kv_heads == d.kv_heads &&
         c.head_size == d.head_size && c.scale == d.scale && c.cos == d.cos && c.sin == d.sin &&
         c.block_size == d.block_size && c.blocks == d.blocks && c.block_tables == d.block_tables &&
         c.table_width == d.table_width && c.slots == d.slots && c.seq_len == d.seq_len && c.fault == d.fault;
}

DecodeStack::Layer layer_of(const LayerTasks& t) {
  DecodeStack::Layer layer;
  for (int part = 0; part < t.qkv.part_count; ++part) {
    layer.qkv[part] = t.qkv.parts[part].weight;
    layer.qkv_bias[part] = t.qkv.parts[part].bias;
  }
  layer.attention_gamma = t.qkv.gamma;
  layer.o = t.o.parts[0].weight;
  layer.mlp_gamma = t.gate_up.gamma;
  layer.gate = t.gate_up.parts[0].weight;
  layer.up = t.gate_up.part_count == 2
                 ? t.gate_up.parts[1].weight
                 : static_cast<const std::byte*>(layer.gate) +
                       t.down.k * t.gate_up.k * static_cast<int64_t>(dtype_size(t.gate_up.dtype));
  layer.down = t.down.parts[0].weight;
  layer.k_cache = t.attention.k_cache;
  layer.v_cache = t.attention.v_cache;
  return layer;
}

DecodeStack stack_of(const LayerTasks& t) {
  const DecodeAttention& a = t.attention;
  DecodeStack stack{.dtype = t.qkv.dtype,
                    .rows = t.qkv.rows,
                    .hidden = t.qkv.k,
                    .inner = t.down.k,
                    .heads = a.heads,
                    .kv_heads = a.kv_heads,
                    .head_size = a.head_size,
                    .epsilon = t.qkv.epsilon,
                    .scale = a.scale,
                    .layers = {},
                    .x = t.qkv.x,
                    .cos = a.cos,
                    .sin = a.sin,
                    .block_size = a.block_size,
                    .block_tables = a.block_tables,
                    .table_width = a.table_width,
                    .blocks = a.blocks,
                    .slots = a.slots,
                    .seq_len = a.seq_len,
                    .fault = a.fault};
  for (int part = 0; part < t.qkv.part_count; ++part) stack.qkv_units[part] = t.qkv.parts[part].n;
  return stack;
}

// Nobody but these nodes reads what they write, the last one's output aside.
bool is_closed(const Graph& graph, size_t begin, size_t end) {
  for (size_t node = begin; node + 1 < end; ++node) {
    for (const Value value : graph.nodes[node].outputs) {
      if (graph.values[value.id].kind != ValueKind::kIntermediate) return false;
      for (const size_t reader : graph.consumers(value)) {
        if (reader >= end) return false;
      }
    }
  }
  return true;
}

}  // namespace

std::optional<JoinedLayers> join_layers(Plan& plan, const NodeLaunch& launch, size_t begin, size_t end) {
  while (begin < end && !std::holds_alternative<FewRowLinear>(task_of(plan, launch, begin))) ++begin;
  const std::optional<LayerTasks> first = tasks_from(plan, launch, begin, end);
  if (!first || !is_layer(*first)) return std::nullopt;
  JoinedLayers joined{.begin = begin, .end = begin, .stack = stack_of(*first)};
  const void* hidden = first->qkv.x;
  while (const std::optional<LayerTasks> next = tasks_from(plan, launch, joined.end, end)) {
    if (!is_layer(*next) || !is_alike(*first, *next) || next->qkv.x != hidden) break;
    joined.stack.layers.push_back(layer_of(*next));
    joined.stack.y = next->down.y;
    hidden = next->down.y;
    joined.end += kNodes;
  }
  if (!is_closed(plan.graph(), joined.begin, joined.end) || !decode_stack_pays(joined.stack))
    return std::nullopt;
  return joined;
}

}  // namespace modeltorch
