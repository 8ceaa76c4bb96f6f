// The graph builder and the fusion passes. runner_test.cpp runs graphs.

#include "graph/graph.h"
#include "graph/fusion.h"
#include "graph/plan.h"
#include "ops/add.h"
#include "ops/add_rms_norm.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/split_qkv.h"
#include "ops/swiglu.h"
#include "test.h"

using namespace modeltorch;
using test::expect;
using test::expect_throws;

namespace {

std::string operations_of(const Graph& graph) {
  std::string text;
  for (const Node& node : graph.nodes)
    text += (text.empty() ? "" : " ") + std::string(node.operation->name());
  return text;
}

// Every value that a node reads comes from outside or from an earlier node, and no value has two writers.
void expect_ordered(const Graph& graph) {
  std::vector<char> written(graph.values.size(), false);
  for (size_t id = 0; id < graph.values.size(); ++id) {
    const ValueKind kind = graph.values[id].kind;
    written[id] = kind == ValueKind::kInput || kind == ValueKind::kWeight || kind == ValueKind::kCache;
  }
  for (const Node& node : graph.nodes) {
    for (const Value value : node.inputs)
      expect(written[value.id] != 0, node.name, " reads an unwritten value");
    for (const Value value : node.outputs) {
      expect(written[value.id] == 0, node.name, " writes a value again");
      written[value.id] = true;
    }
  }
}

// Two inputs and a gamma to build on.
struct Start {
  GraphBuilder builder;
  Value a = builder.input("a", 0);
  Value b = builder.input("b", 1);
  Value gamma = builder.weight("gamma", 0);

  Graph fused(DeviceType device = DeviceType::kCpu) {
    Graph graph = builder.finish();
    fuse(graph, device);
    expect_ordered(graph);
    return graph;
  }
};

float epsilon_of(const Node& node) {
  return dynamic_cast<const AddRmsNorm&>(*node.operation).epsilon;
}

}  // namespace

TEST(scopes_name_nodes_and_values) {
  GraphBuilder builder;
  const Value x = builder.input("x", 3);
  Value y;
  {
    const GraphBuilder::Scope layer(builder, "layers.0");
    {
      const GraphBuilder::Scope attn(builder, "attn");
      y = add(builder, x, x);
    }
    y = add(builder, y, x);
    split_qkv(builder, y, 1, 1, 2);
  }
  add(builder, y, x);
  const Graph graph = builder.finish();
  expect(graph.nodes[0].name == "layers.0.attn.add", graph.nodes[0].name);
  expect(graph.nodes[1].name == "layers.0.add", graph.nodes[1].name);
  expect(graph.nodes[3].name == "add", graph.nodes[3].name);
  const std::vector<Value>& parts = graph.nodes[2].outputs;
  expect(parts.size() == 3 && graph.values[parts[2].id].name == "layers.0.split_qkv:2",
         "three outputs by number");
  expect(graph.values[y.id].name == "layers.0.add" && graph.values[y.id].kind == ValueKind::kIntermediate,
         "y");
  expect(graph.values[x.id].kind == ValueKind::kInput && graph.values[x.id].slot == 3, "x");
}

TEST(readers_and_writers_are_found) {
  Start start;
  const Value sum = add(start.builder, start.a, start.b);
  const Value norm = rms_norm(start.builder, sum, start.gamma, 1e-6f);
  add(start.builder, sum, norm);
  const Graph graph = start.builder.finish();
  expect(graph.consumers(sum) == std::vector<size_t>{1, 2}, "readers of the sum");
  expect(graph.consumers(start.gamma) == std::vector<size_t>{1}, "readers of gamma");
  expect(graph.producer(norm) == 1 && graph.producer(start.a) == -1, "writers");
}

TEST(unknown_values_are_refused) {
  Start start;
  for (const Value stranger : {Value{}, Value{3}, Value{99}, Value{-7}}) {
    expect_throws([&] { add(start.builder, start.a, stranger); }, ErrorKind::kValue, "Add",
                  "not a value of this graph");
    expect_throws([&] { start.builder.mark_output(stranger, "y", 0); }, ErrorKind::kValue, "output y");
  }
  expect_throws([&] { start.builder.mark_output(start.a, "y", 0); }, ErrorKind::kValue, "output y",
                "not computed");
  const Value sum = add(start.builder, start.a, start.b);
  start.builder.mark_output(sum, "y", 4);
  const Graph graph = start.builder.finish();
  expect(graph.nodes.size() == 1, "a refused node leaves nothing behind");
  const ValueInfo& info = graph.values[sum.id];
  expect(info.kind == ValueKind::kOutput && info.name == "y" && info.slot == 4, "the marked output");
}

TEST(add_and_norm_become_one_node) {
  Start start;
  const GraphBuilder::Scope scope(start.builder, "mlp");
  const Value sum = add(start.builder, start.a, start.b);
  const Value norm = rms_norm(start.builder, sum, start.gamma, 0.25f);
  const Graph graph = start.fused();
  expect(operations_of(graph) == "AddRmsNorm", operations_of(graph));
  const Node& node = graph.nodes[0];
  expect(node.name == "mlp.rms_norm" && epsilon_of(node) == 0.25f, "name and epsilon of the norm, got ",
         node.name);
  expect(node.inputs == std::vector<Value>{start.a, start.b, start.gamma}, "inputs");
  expect(node.outputs == std::vector<Value>{sum, norm}, "outputs");
}

TEST(other_readers_of_the_sum_stay) {
  Start start;
  const Value sum = add(start.builder, start.a, start.b);
  const Value early = add(start.builder, sum, start.a);
  const Value norm = rms_norm(start.builder, sum, start.gamma, 1e-6f);
  const Value late = add(start.builder, sum, norm);
  start.builder.mark_output(sum, "sum", 0);
  start.builder.mark_output(norm, "norm", 1);
  const Graph graph = start.fused();
  expect(operations_of(graph) == "AddRmsNorm Add Add", operations_of(graph));
  expect(graph.nodes[0].outputs == std::vector<Value>{sum, norm},
         "the fused node writes the sum and the norm");
  expect(graph.nodes[1].inputs == std::vector<Value>{sum, start.a} && graph.nodes[1].outputs[0] == early,
         "early reader");
  expect(graph.nodes[2].inputs == std::vector<Value>{sum, norm} && graph.nodes[2].outputs[0] == late,
         "late reader");
  expect(graph.values[sum.id].kind == ValueKind::kOutput && graph.values[norm.id].slot == 1,
         "outputs stay outputs");
}

TEST(a_second_norm_of_a_sum_stays_a_node) {
  Start start;
  const Value sum = add(start.builder, start.a, start.b);
  rms_norm(start.builder, sum, start.gamma, 1e-6f);
  const Value second = rms_norm(start.builder, sum, start.gamma, 0.5f);
  const Graph graph = start.fused();
  expect(operations_of(graph) == "AddRmsNorm RmsNorm", operations_of(graph));
  expect(epsilon_of(graph.nodes[0]) == 1e-6f, "the first norm is the fused one");
  expect(graph.nodes[1].inputs[0] == sum && graph.nodes[1].outputs[0] == second, "the second reads the sum");
}

TEST(every_layer_is_fused) {
  Start start;
  Value hidden = start.a;
  for (int layer = 0; layer < 3; ++layer) {
    const Value normed = rms_norm(start.builder, hidden, start.gamma, 1e-6f);
    hidden = add(start.builder, hidden, normed);
  }
  rms_norm(start.builder, hidden, start.gamma, 1e-6f);
  const Graph graph = start.fused();
  expect(operations_of(graph) == "RmsNorm AddRmsNorm AddRmsNorm AddRmsNorm", operations_of(graph));
}

TEST(linear_and_swiglu_become_one_node) {
  Start start;
  const Value gate_up = linear(start.builder, "gate_up", start.a, {{start.b, {}, true}});
  const Value y = swiglu(start.builder, gate_up);
  add(start.builder, y, y);
  const Graph graph = start.fused();
  expect(operations_of(graph) == "LinearSwiGlu Add", operations_of(graph));
  const Node& node = graph.nodes[0];
  expect(node.name == "gate_up" && node.inputs == std::vector<Value>{start.a, start.b}, "name and inputs");
  expect(node.outputs == std::vector<Value>{y}, "outputs");
}

TEST(a_linear_with_other_readers_keeps_its_output) {
  Start start;
  const Value gate_up = linear(start.builder, "gate_up", start.a, {{start.b, {}, true}});
  swiglu(start.builder, gate_up);
  add(start.builder, gate_up, start.a);
  const Value seen = linear(start.builder, "seen", start.a, {{start.b, {}, true}});
  swiglu(start.builder, seen);
  start.builder.mark_output(seen, "seen", 0);
  const Graph graph = start.fused();
  expect(operations_of(graph) == "Linear SwiGlu Add Linear SwiGlu", operations_of(graph));
}

TEST(norms_of_something_else_stay) {
  Start start;
  const Value sum = add(start.builder, start.a, start.b);
  rms_norm(start.builder, start.a, start.gamma, 1e-6f);  // does not read the sum
  rms_norm(start.builder, start.b, sum, 1e-6f);          // reads the sum as its gamma
  add(start.builder, sum, start.a);
  const Graph graph = start.fused();
  expect(operations_of(graph) == "Add RmsNorm RmsNorm Add", operations_of(graph));
}

TEST(devices_without_the_fused_kernel_keep_plain_nodes) {
  Start start;
  const Value sum = add(start.builder, start.a, start.b);
  rms_norm(start.builder, sum, start.gamma, 1e-6f);
  const Graph graph = start.fused(DeviceType::kOther);
  expect(operations_of(graph) == "Add RmsNorm", operations_of(graph));
}

TEST(bucket_sizes) {
  const std::pair<int64_t, int64_t> cases[] = {
      {0, 1},     {1, 1},     {2, 2},     {3, 4},     {4, 4},       {5, 8},      {8, 8},     {9, 16},
      {16, 16},   {17, 32},   {32, 32},   {33, 64},   {64, 64},     {65, 128},   {128, 128}, {129, 192},
      {192, 192}, {193, 256}, {256, 256}, {257, 320}, {4096, 4096}, {4097, 4160}};
  for (const auto& [count, expected] : cases) {
    expect(bucket_size(count) == expected, count, " goes to ", bucket_size(count));
  }
}
