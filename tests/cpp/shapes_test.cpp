// What operations refuse before anything runs, and operations made by name.

#include <set>

#include "graph/kernel.h"
#include "graph/operation.h"
#include "ops/add.h"
#include "ops/add_rms_norm.h"
#include "ops/gather_rows.h"
#include "ops/linear.h"
#include "ops/linear_swiglu.h"
#include "ops/paged_attention.h"
#include "ops/reshape_and_cache.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/self_attention.h"
#include "ops/split_qkv.h"
#include "ops/swiglu.h"
#include "test.h"

using namespace modeltorch;
using test::expect;
using test::expect_throws;

namespace {

using Axis = std::pair<size_t, int>;  // input, axis

// An operation, inputs that fit, and what the shape rule leaves free.
struct ShapeRule {
  OperationPtr operation;
  std::vector<TensorDesc> inputs;
  std::vector<TensorDesc> outputs;
  std::set<Axis> free_axes;
  std::set<size_t> free_dtypes = {};
};

TensorDesc t(const Dims& dims, DType dtype = DType::kBFloat16) {
  return {dtype, dims, Rows::kFixed};
}

TensorDesc tokens(TensorDesc desc) {
  desc.rows = Rows::kTokens;
  return desc;
}

std::vector<ShapeRule> shape_rules() {
  const DType i32 = DType::kInt32, i64 = DType::kInt64;
  const AttentionShape attention{.heads = 6, .kv_heads = 2, .head_size = 8, .scale = 1.0f};
  const TensorDesc q = tokens(t({5, 6, 8})), kv = tokens(t({5, 2, 8})), cache = t({9, 16, 2, 8});
  return {
      {std::make_shared<Add>(), {tokens(t({5, 7})), tokens(t({5, 7}))}, {tokens(t({5, 7}))}, {}},
      {std::make_shared<RmsNorm>(1e-6f), {tokens(t({5, 7})), t({7})}, {tokens(t({5, 7}))}, {{0, 0}}},
      {std::make_shared<AddRmsNorm>(1e-6f),
       {tokens(t({5, 7})), tokens(t({5, 7})), t({7})},
       {tokens(t({5, 7})), tokens(t({5, 7}))},
       {}},
      {std::make_shared<SwiGlu>(), {tokens(t({5, 8}))}, {tokens(t({5, 4}))}, {{0, 0}}, {0}},
      {std::make_shared<GatherRows>(),
       {t({11, 7}), tokens(t({5}, i64))},
       {tokens(t({5, 7}))},
       {{0, 0}, {0, 1}, {1, 0}},
       {0}},
      {std::make_shared<SplitQkv>(6, 2, 8), {tokens(t({5, 80}))}, {q, kv, kv}, {{0, 0}}, {0}},
      {std::make_shared<Rope>(), {q, kv, tokens(t({5, 8})), tokens(t({5, 8}))}, {q, kv}, {{0, 1}, {1, 1}}},
      {std::make_shared<ReshapeAndCache>(), {kv, kv, cache, cache, tokens(t({5}, i32))}, {}, {}},
      {std::make_shared<SelfAttention>(attention), {q, kv, kv, t({3}, i32)}, {tokens(t({5, 48}))}, {{3, 0}}},
      {std::make_shared<PagedAttention>(attention),
       {q, cache, cache, t({5, 4}, i32), t({5}, i32)},
       {tokens(t({5, 48}))},
       {{3, 1}}},
      {std::make_shared<Linear>(std::vector<LinearPart>{{true, true}, {false, true}, {true, false}}),
       {tokens(t({5, 7})), t({3, 7}), t({3}), t({7, 4}), t({4}), t({6, 7})},
       {tokens(t({5, 13}))},
       {{0, 0}, {5, 0}}},
      {std::make_shared<LinearSwiGlu>(std::vector<LinearPart>{{true, true}, {false, false}}),
       {tokens(t({5, 7})), t({3, 7}), t({3}), t({7, 5})},
       {tokens(t({5, 4}))},
       {{0, 0}}},
  };
}

}  // namespace

TEST(fitting_inputs_give_their_outputs) {
  for (const ShapeRule& rule : shape_rules()) {
    const std::vector<TensorDesc> outputs = rule.operation->infer_shape(rule.inputs);
    expect(outputs == rule.outputs, rule.operation->name(), ": shapes, types and what rows follow");
    expect(static_cast<int>(outputs.size()) == rule.operation->output_count(), rule.operation->name());
  }
}

TEST(every_size_that_is_not_free_is_checked) {
  for (const ShapeRule& rule : shape_rules()) {
    for (size_t input = 0; input < rule.inputs.size(); ++input) {
      for (int axis = 0; axis < rule.inputs[input].dims.rank(); ++axis) {
        std::vector<TensorDesc> changed = rule.inputs;
        changed[input].dims[axis] += 1;
        if (rule.free_axes.contains({input, axis})) {
          rule.operation->infer_shape(changed);
          continue;
        }
        expect_throws([&] { rule.operation->infer_shape(changed); }, ErrorKind::kValue, "must ", "got ");
      }
    }
  }
}

TEST(every_type_and_rank_is_checked) {
  for (const ShapeRule& rule : shape_rules()) {
    for (size_t input = 0; input < rule.inputs.size(); ++input) {
      std::vector<TensorDesc> deeper = rule.inputs;
      deeper[input].dims.push_back(1);
      expect_throws([&] { rule.operation->infer_shape(deeper); }, ErrorKind::kValue, "must ", "got ");
      std::vector<TensorDesc> other = rule.inputs;
      other[input].dtype = DType::kFloat32;
      if (rule.free_dtypes.contains(input)) continue;
      expect_throws([&] { rule.operation->infer_shape(other); }, ErrorKind::kValue, "must ", "float32");
    }
    std::vector<TensorDesc> more = rule.inputs, fewer = rule.inputs;
    more.push_back(more.back());
    fewer.pop_back();
    for (const std::vector<TensorDesc>& wrong : {more, fewer, {}}) {
      expect_throws([&] { rule.operation->infer_shape(wrong); }, ErrorKind::kValue,
                    modeltorch::concat("got ", wrong.size()));
    }
  }
}

TEST(odd_halves_are_refused) {
  const std::vector<TensorDesc> odd = {t({5, 6, 7}), t({5, 2, 7}), t({5, 7}), t({5, 7})};
  expect_throws([&] { Rope().infer_shape(odd); }, ErrorKind::kValue, "even");
  expect_throws([&] { SwiGlu().infer_shape({t({5, 7})}); }, ErrorKind::kValue, "even");
}

TEST(types_without_a_kernel_are_refused) {
  for (const ShapeRule& rule : shape_rules()) {
    std::vector<TensorDesc> inputs = rule.inputs;
    inputs[0].dtype = DType::kInt8;
    const KernelFactory factory = find_kernel(rule.operation->name(), DeviceType::kCpu);
    expect_throws([&] { factory({*rule.operation, inputs, rule.outputs, Device{}}); },
                  ErrorKind::kNotImplemented, "int8");
  }
}

TEST(operations_are_made_by_name) {
  const OperationParameters all({{"epsilon", 0.5},
                                 {"heads", 6},
                                 {"kv_heads", 2},
                                 {"head_size", 8},
                                 {"scale", 0.25},
                                 {"parts", 2},
                                 {"transposed", 0},
                                 {"has_bias", 1}});
  for (const ShapeRule& rule : shape_rules()) {
    const std::string name(rule.operation->name());
    const OperationPtr made = make_operation(name, all);
    expect(made->name() == name, name, " makes ", made->name());
    if (name != "Linear" && name != "LinearSwiGlu")
      expect(made->infer_shape(rule.inputs) == rule.outputs, name, " has other parameters");
  }
  const auto norm = std::dynamic_pointer_cast<const RmsNorm>(make_operation("RmsNorm", all));
  const auto add_norm = std::dynamic_pointer_cast<const AddRmsNorm>(make_operation("AddRmsNorm", all));
  expect(norm->epsilon == 0.5f && add_norm->epsilon == 0.5f, "epsilon");
  const auto paged = std::dynamic_pointer_cast<const PagedAttention>(make_operation("PagedAttention", all));
  const auto self = std::dynamic_pointer_cast<const SelfAttention>(make_operation("SelfAttention", all));
  for (const AttentionShape& shape : {paged->shape, self->shape}) {
    expect(shape.heads == 6 && shape.kv_heads == 2 && shape.head_size == 8 && shape.scale == 0.25f,
           "attention");
  }
  const auto linear = std::dynamic_pointer_cast<const Linear>(make_operation("Linear", all));
  expect(linear->parts.size() == 2 && !linear->parts[1].transposed && linear->parts[1].has_bias, "linear");
  const auto gated = std::dynamic_pointer_cast<const LinearSwiGlu>(make_operation("LinearSwiGlu", all));
  expect(gated->parts.size() == 2 && !gated->parts[1].transposed && gated->parts[1].has_bias, "gated linear");
  const OperationParameters none({});
  expect_throws([&] { make_operation("RmsNorm", none); }, ErrorKind::kValue, "epsilon", "missing");
  expect_throws([&] { make_operation("Nothing", none); }, ErrorKind::kValue, "unknown operation Nothing",
                "RmsNorm");
}
