#include "ops/rope_attention.h"

#include <algorithm>
#include <optional>

#include "core/check.h"
#include "graph/fusion.h"
#include "ops/paged_attention.h"
#include "ops/reshape_and_cache.h"
#include "ops/rope.h"
#include "ops/self_attention.h"
#include "ops/shape_check.h"
#include "ops/split_qkv.h"

namespace modeltorch {

std::vector<TensorDesc> RopeAttention::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, is_paged ? 8 : 7);
  const TensorDesc& qkv = inputs[0];
  check_rank("qkv", qkv, 2);
  const int64_t n = qkv.dims[0];
  check_tensor("qkv", qkv, {n, (shape.heads + 2 * shape.kv_heads) * shape.head_size}, qkv.dtype);
  check(shape.head_size % 2 == 0, "head_size must be even, got ", shape.head_size);
  check_tensor("cos", inputs[1], {n, shape.head_size}, qkv.dtype);
  check_tensor("sin", inputs[2], {n, shape.head_size}, qkv.dtype);
  check_rank("k_cache", inputs[3], 4);
  const Dims& cache = inputs[3].dims;
  check_tensor("k_cache", inputs[3], {cache[0], cache[1], shape.kv_heads, shape.head_size}, qkv.dtype);
  check_tensor("v_cache", inputs[4], cache, qkv.dtype);
  check_tensor("slots", inputs[5], {n}, DType::kInt32);
  check_rank("seq_len", inputs[6], 1);
  check_tensor("seq_len", inputs[6], {is_paged ? n : inputs[6].dims[0]}, DType::kInt32);
  if (is_paged) {
    check_rank("block_tables", inputs[7], 2);
    check_tensor("block_tables", inputs[7], {n, inputs[7].dims[1]}, DType::kInt32);
  }
  return {{qkv.dtype, {n, shape.heads * shape.head_size}, qkv.rows}};
}

namespace {

// The nodes of one layer's attention, found from its SplitQkv.
struct Group {
  size_t split = 0;
  size_t rope = 0;
  size_t cache = 0;
  size_t attention = 0;
};

// The only reader of `value` that is an Op, among `readers` readers in all; -1 otherwise.
template <class Op>
int64_t reader_of(const Graph& graph, Value value, size_t readers) {
  const std::vector<size_t> found = graph.consumers(value);
  if (found.size() != readers || graph.values[value.id].kind != ValueKind::kIntermediate) return -1;
  for (const size_t node : found) {
    if (graph.nodes[node].operation->name() == Op::kName) return static_cast<int64_t>(node);
  }
  return -1;
}

std::optional<Group> group_at(const Graph& graph, size_t split) {
  const std::vector<Value>& heads = graph.nodes[split].outputs;
  const int64_t rope = reader_of<Rope>(graph, heads[0], 1);
  if (rope < 0 || graph.nodes[rope].inputs[0] != heads[0] || graph.nodes[rope].inputs[1] != heads[1] ||
      graph.consumers(heads[1]).size() != 1 || graph.consumers(graph.nodes[split].inputs[0]).size() != 1) {
    return std::nullopt;
  }
  const std::vector<Value>& rotated = graph.nodes[rope].outputs;
  const int64_t paged = reader_of<PagedAttention>(graph, rotated[0], 1);
  const int64_t whole = reader_of<SelfAttention>(graph, rotated[0], 1);
  if (paged < 0 && whole < 0) return std::nullopt;
  const size_t readers = whole >= 0 ? 2 : 1;  // of k and v: the cache, and in prefill the attention
  const int64_t cache = reader_of<ReshapeAndCache>(graph, rotated[1], readers);
  if (cache < 0 || reader_of<ReshapeAndCache>(graph, heads[2], readers) != cache) return std::nullopt;
  const auto attention = static_cast<size_t>(paged >= 0 ? paged : whole);
  const std::vector<Value>& read = graph.nodes[attention].inputs;
  const std::vector<Value>& written = graph.nodes[cache].inputs;
  if (paged >= 0 && (read[1] != written[2] || read[2] != written[3])) return std::nullopt;
  if (whole >= 0 && (read[1] != rotated[1] || read[2] != heads[2])) return std::nullopt;
  return Group{split, static_cast<size_t>(rope), static_cast<size_t>(cache), attention};
}

bool fuse_rope_attention(Graph& graph) {
  for (size_t index = 0; index < graph.nodes.size(); ++index) {
    if (graph.nodes[index].operation->name() != SplitQkv::kName) continue;
    const std::optional<Group> found = group_at(graph, index);
    if (!found) continue;
    Node& attention = graph.nodes[found->attention];
    const std::vector<Value>& rope = graph.nodes[found->rope].inputs;
    const std::vector<Value>& cache = graph.nodes[found->cache].inputs;
    const auto* paged = dynamic_cast<const PagedAttention*>(attention.operation.get());
    std::vector<Value> inputs{graph.nodes[index].inputs[0], rope[2], rope[3], cache[2], cache[3], cache[4]};
    if (paged != nullptr) {
      inputs.push_back(attention.inputs[4]);
      inputs.push_back(attention.inputs[3]);
      attention.operation = std::make_shared<RopeAttention>(paged->shape, true);
    } else {
      inputs.push_back(attention.inputs[3]);
      const AttentionShape shape = dynamic_cast<const SelfAttention&>(*attention.operation).shape;
      attention.operation = std::make_shared<RopeAttention>(shape, false);
    }
    attention.inputs = std::move(inputs);
    std::vector<size_t> gone{found->split, found->rope, found->cache};
    std::sort(gone.rbegin(), gone.rend());
    for (const size_t node : gone) graph.nodes.erase(graph.nodes.begin() + static_cast<int64_t>(node));
    return true;
  }
  return false;
}

const bool fusion_registered = register_fusion(RopeAttention::kName, fuse_rope_attention, 1);
const bool known =
    register_operation(RopeAttention::kName, [](const OperationParameters& parameters) -> OperationPtr {
      return std::make_shared<RopeAttention>(attention_shape(parameters),
                                             parameters.integer("is_paged", 0) != 0);
    });

}  // namespace
}  // namespace modeltorch
