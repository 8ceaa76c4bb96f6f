// GraphRunner: plans, buckets, counters, bindings, errors. What it computes and what it allocates.

#include <algorithm>
#include <utility>

#include "allocations.h"
#include "graph/pack_store.h"
#include "graph/runner.h"
#include "graph/trace.h"
#include "ops/add.h"
#include "ops/linear.h"
#include "ops/panels.h"
#include "ops/rms_norm.h"
#include "tensors.h"
#include "tiny_qwen.h"

using namespace modeltorch;
using namespace test;

namespace {

// y = x + 1, after filling its scratch with garbage: a plan that puts the scratch onto a living tensor is
// caught.
struct Scribble final : Operation {
  std::string_view name() const override { return "TestScribble"; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override {
    return {inputs[0]};
  }
};

struct ScribbleKernel final : Kernel {
  size_t workspace_bytes() const override { return 1000; }
  void run(const KernelArgs& args) override {
    std::memset(args.workspace, 0xff, workspace_bytes());
    const int64_t count = args.in(0).dims.count();
    for (int64_t i = 0; i < count; ++i) args.out(0).as<float>()[i] = args.in(0).as<float>()[i] + 1.0f;
    std::memset(args.workspace, 0xff, workspace_bytes());
  }
};

// y = x, unless the first element of x is negative.
struct Fault final : Operation {
  std::string_view name() const override { return "TestFault"; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override {
    return {inputs[0]};
  }
};

struct FaultKernel final : Kernel {
  void run(const KernelArgs& args) override {
    if (args.in(0).as<float>()[0] < 0.0f) fail(ErrorKind::kRuntime, "x is negative");
    std::memcpy(args.out(0).data, args.in(0).data, args.in(0).dims.count() * sizeof(float));
  }
};

template <class T>
std::unique_ptr<Kernel> make(const KernelSetup&) {
  return std::make_unique<T>();
}

const bool scribble_known = register_kernel("TestScribble", DeviceType::kCpu, make<ScribbleKernel>);
const bool fault_known = register_kernel("TestFault", DeviceType::kCpu, make<FaultKernel>);

StepInfo step_of(int64_t tokens, int64_t sequences = 1, int64_t logit_rows = 1) {
  return {.tokens = tokens, .sequences = sequences, .logit_rows = logit_rows, .sequence_lengths = {}};
}

// y = (x + weight of every row) + 1, with an intermediate in the arena. The weight is a table of one row.
struct Rig {
  GraphRunner runner{graph(), {Rows::kTokens}, Device{}};
  std::unique_ptr<HeapArena> arena = std::make_unique<HeapArena>();

  static Graph graph() {
    GraphBuilder builder;
    const Value x = builder.input("x", 0);
    const GraphBuilder::Scope scope(builder, "block");
    const Value faulty = builder.add("fault", std::make_shared<Fault>(), {x})[0];
    const Value normed = rms_norm(builder, faulty, builder.weight("gamma", 0), 0.0f);
    builder.mark_output(builder.add("scribble", std::make_shared<Scribble>(), {normed})[0], "y", 0);
    return builder.finish();
  }

  Rig() { bind({2.0, 2.0}); }

  void bind(const std::vector<double>& values) {
    gamma = Tensor::of(DType::kFloat32, {static_cast<int64_t>(values.size())}, values);
    runner.bind_weights({gamma.view()});
  }

  // Rows of equal numbers come out as gamma + 1. The output has room for a whole bucket: what lies beyond the
  // true rows must stay untouched.
  void run(const StepInfo& step, double x = 3.0) {
    const Tensor input =
        Tensor::of(DType::kFloat32, {step.tokens, 2}, std::vector<double>(2 * step.tokens, x));
    const Tensor output(DType::kFloat32, {bucket_size(step.tokens), 2});
    const TensorView view{output.view().data, DType::kFloat32, {step.tokens, 2}};
    runner.run({&input.view(), 1}, {&view, 1}, step, *arena);
    for (int64_t i = 0; i < output.count(); ++i) {
      const double value = output.get(i);
      expect(i < 2 * step.tokens ? value == gamma.get(i % 2) + 1.0 : std::isnan(value), "element ", i, " of ",
             step.tokens, " rows: ", value);
    }
  }

  Tensor gamma{DType::kFloat32, {2}};
};

// A random graph over two inputs: sums, norms and scribbles of anything computed so far.
Graph random_graph(Random& random, size_t& outputs) {
  GraphBuilder builder;
  std::vector<Value> values = {builder.input("x", 0), builder.input("y", 1)};
  const Value gamma = builder.weight("gamma", 0);
  const auto any = [&] { return values[random() % values.size()]; };
  const size_t nodes = 1 + random() % 16;
  for (size_t node = 0; node < nodes; ++node) {
    const uint64_t kind = random() % 4;
    if (kind == 0) values.push_back(rms_norm(builder, any(), gamma, 1e-6f));
    if (kind == 1) values.push_back(builder.add("scribble", std::make_shared<Scribble>(), {any()})[0]);
    if (kind >= 2) values.push_back(add(builder, any(), any()));
  }
  outputs = 0;
  for (size_t index = 2; index < values.size(); ++index) {
    const bool is_last = index + 1 == values.size();
    if (is_last || random() % 4 == 0)
      builder.mark_output(values[index], "out", static_cast<int32_t>(outputs++));
  }
  return builder.finish();
}

// Computes a graph node by node, each value in memory of its own.
std::vector<Tensor> run_plainly(const Graph& graph, const Tensor& x, const Tensor& y, const Tensor& gamma) {
  std::vector<Tensor> values;
  for (size_t id = 0; id < graph.values.size(); ++id) values.emplace_back(x.view().dtype, x.dims());
  std::vector<const Tensor*> current(values.size());
  for (size_t id = 0; id < values.size(); ++id) current[id] = &values[id];
  current[0] = &x;
  current[1] = &y;
  current[2] = &gamma;
  std::vector<Tensor> outputs;
  for (const Node& node : graph.nodes) {
    std::vector<const Tensor*> inputs;
    for (const Value value : node.inputs) inputs.push_back(current[value.id]);
    values[node.outputs[0].id] = std::move(run_operation(*node.operation, inputs)[0]);
  }
  for (int32_t slot = 0;; ++slot) {
    const auto found = std::find_if(graph.values.begin(), graph.values.end(), [&](const ValueInfo& info) {
      return info.kind == ValueKind::kOutput && info.slot == slot;
    });
    if (found == graph.values.end()) return outputs;
    outputs.push_back(std::move(values[found - graph.values.begin()]));
  }
}

}  // namespace

TEST(random_graphs_equal_their_nodes) {
  Random random(51);
  for (int trial = 0; trial < 300; ++trial) {
    size_t output_count = 0;
    const Graph graph = random_graph(random, output_count);
    GraphRunner runner(graph, {Rows::kTokens, Rows::kTokens}, Device{});
    const Tensor gamma = Tensor::random(random, DType::kFloat32, {5});
    runner.bind_weights({gamma.view()});
    HeapArena arena;
    for (const int64_t tokens : {3, 4, 1, 0, 70}) {
      const Tensor x = Tensor::random(random, DType::kFloat32, {tokens, 5});
      const Tensor y = Tensor::random(random, DType::kFloat32, {tokens, 5});
      const std::vector<TensorView> inputs = {x.view(), y.view()};
      std::vector<Tensor> outputs;
      std::vector<TensorView> views;
      for (size_t index = 0; index < output_count; ++index) {
        outputs.emplace_back(DType::kFloat32, x.dims());
        views.push_back(outputs.back().view());
      }
      runner.run(inputs, views, step_of(tokens), arena);
      const std::vector<Tensor> expected = run_plainly(graph, x, y, gamma);
      expect(expected.size() == output_count, "outputs");
      for (size_t index = 0; index < output_count; ++index) {
        expect(outputs[index].bits() == expected[index].bits(), "trial ", trial, ", output ", index, " of ",
               tokens, " tokens\n", runner.describe());
      }
    }
  }
}

TEST(counters_show_what_a_step_does_not_do) {
  Rig rig;
  const auto expect_counts = [&](int64_t executions, int64_t plans) {
    const Counters& counters = rig.runner.counters();
    expect(counters.executions == executions && counters.plans_built == plans, executions, " executions, ",
           plans, " plans, got ", counters.executions, " and ", counters.plans_built);
    expect(counters.shape_inferences == 3 * plans && counters.kernel_setups == 3 * plans,
           "three nodes a plan");
    expect(counters.plans_evicted == 0, "no evictions");
  };
  expect_counts(0, 0);
  rig.run(step_of(5));
  expect_counts(1, 1);
  for (const int64_t tokens : {6, 7, 8, 5}) rig.run(step_of(tokens));
  expect_counts(5, 1);
  rig.run(step_of(9));
  expect_counts(6, 2);
  rig.run(step_of(8, 2));
  expect_counts(7, 3);
  rig.run(step_of(8, 2, 3));
  expect_counts(8, 4);
  rig.run(step_of(8));
  expect_counts(9, 4);
  expect(rig.runner.plan_count() == 4, "plans");
}

TEST(the_least_recently_used_plan_goes) {
  Rig rig;
  for (int64_t bucket = 1; bucket <= 64; ++bucket) rig.run(step_of(64 * bucket));
  rig.run(step_of(64));  // now the plan for 128 is the oldest
  expect(rig.runner.plan_count() == 64 && rig.runner.counters().plans_evicted == 0, "64 plans fit");
  rig.run(step_of(64 * 65));
  expect(rig.runner.plan_count() == 64 && rig.runner.counters().plans_evicted == 1, "the 65th takes a place");
  const int64_t built = rig.runner.counters().plans_built;
  for (int64_t bucket = 3; bucket <= 65; ++bucket) rig.run(step_of(64 * bucket));
  rig.run(step_of(64));
  expect(rig.runner.counters().plans_built == built, "63 plans stayed");
  rig.run(step_of(128));
  expect(rig.runner.counters().plans_built == built + 1, "the plan for 128 was gone");
}

TEST(random_steps_keep_64_plans_at_most) {
  Rig rig;
  Random random(52);
  for (int step = 0; step < 10000; ++step) {
    rig.run(step_of(1 + random() % 500, 1 + random() % 200, 1 + random() % 200));
    expect(rig.runner.plan_count() <= GraphRunner::kMaxPlans, rig.runner.plan_count(), " plans");
  }
  const Counters& counters = rig.runner.counters();
  expect(counters.executions == 10000 && counters.plans_evicted > 1000, "evictions ", counters.plans_evicted);
  expect(counters.plans_built - counters.plans_evicted == 64, "every plan is kept or counted as evicted");
}

TEST(errors_name_the_node_and_leave_the_runner_usable) {
  Rig rig;
  rig.run(step_of(4));
  expect_throws([&] { rig.run(step_of(3), -1.0); }, ErrorKind::kRuntime, "node block.fault (TestFault)",
                "x is negative");
  rig.run(step_of(3));
  expect(rig.runner.counters().executions == 2 && rig.runner.plan_count() == 1,
         "a failed step does not count");

  rig.bind({1.0, 1.0, 1.0});  // a gamma that does not fit: found while planning
  expect_throws([&] { rig.run(step_of(4)); }, ErrorKind::kValue, "node block.rms_norm (RmsNorm)", "gamma",
                "[2]", "[3]");
  expect(rig.runner.plan_count() == 0, "half a plan was kept");
  rig.bind({5.0, -1.0});
  rig.run(step_of(4));
}

TEST(nodes_without_a_kernel_are_named) {
  expect_throws([] { GraphRunner(Rig::graph(), {Rows::kTokens}, Device{DeviceType::kOther, 0}); },
                ErrorKind::kNotImplemented, "block.fault", "TestFault", "another device");
}

TEST(new_weights_are_read) {
  Rig rig;
  rig.run(step_of(4));
  rig.bind({7.0, 9.0});
  expect(rig.runner.plan_count() == 0, "kernels may depend on weights: their plans go");
  rig.run(step_of(4));
  expect(rig.runner.counters().plans_built == 2, "one plan for each set of weights");
}

// A node that got a packed form is asked nothing more; a weight that another node reads keeps its data.
TEST(packed_weights_replace_theirs) {
  Random random(53);
  GraphBuilder builder;
  const Value x = builder.input("x", 0), w = builder.weight("w", 0), b = builder.weight("b", 1);
  const Value v = builder.weight("v", 2), y = linear(builder, "first", x, {{w, b, true}});
  builder.mark_output(linear(builder, "second", y, {{v, {}, true}}), "y", 0);
  GraphRunner runner(builder.finish(), {Rows::kTokens}, Device{});
  const Tensor weight = Tensor::random(random, DType::kBFloat16, {32, 32});
  const Tensor bias = Tensor::random(random, DType::kBFloat16, {32});
  const Tensor input = Tensor::random(random, DType::kBFloat16, {4, 32});
  const Tensor plain(DType::kBFloat16, {4, 32}), packed(DType::kBFloat16, {4, 32});
  HeapArena arena;
  runner.bind_weights({weight.view(), bias.view(), weight.view()});
  runner.run({&input.view(), 1}, {&plain.view(), 1}, step_of(4), arena);

  const std::vector<GraphRunner::PackRequest> requests = runner.pack_requests();
  if (panel_kernels() == nullptr) return expect(requests.empty(), "this level packs nothing");
  expect(requests.size() == 2 && requests[0].slots == std::vector<int32_t>{0, 1} && requests[1].slots[0] == 2,
         "slots");
  const auto& packer = *requests[0].packer;
  runner.bind_packed(requests[0],
                     PackStore("").get(packer, runner.operation(0), {weight.view(), bias.view()}));
  expect(!runner.reads_weight(0) && !runner.reads_weight(1) && runner.reads_weight(2), "what is still read");
  expect(runner.plan_count() == 0, "kernels hold packed forms: their plans go");
  runner.run({&input.view(), 1}, {&packed.view(), 1}, step_of(4), arena);
  expect(worst_row_error(packed, plain.values(), 32) < 1e-2, "packed and plain agree");
  runner.bind_weights({weight.view(), bias.view(), weight.view()});
  expect(runner.reads_weight(0) && runner.pack_requests().size() == 2, "new weights come unpacked");
}

TEST(new_caches_are_read_without_new_plans) {
  GraphBuilder builder;
  const Value sum = add(builder, builder.input("x", 0), builder.cache("cache", 0));
  builder.mark_output(sum, "y", 0);
  GraphRunner runner(builder.finish(), {Rows::kFixed}, Device{});
  runner.bind_weights({});
  HeapArena arena;
  const auto run_with = [&](int64_t rows, double value) {
    const Tensor cache = Tensor::of(DType::kFloat32, {rows, 1}, std::vector<double>(rows, value));
    const Tensor x = Tensor::of(DType::kFloat32, {rows, 1}, std::vector<double>(rows, 1.0));
    const Tensor y(DType::kFloat32, {rows, 1});
    runner.bind_caches({cache.view()});
    runner.run({&x.view(), 1}, {&y.view(), 1}, step_of(1), arena);
    for (const double sum : y.values()) expect(sum == value + 1.0, "a stale cache was read: ", sum);
  };
  run_with(2, 10.0);
  run_with(2, 20.0);
  expect(runner.counters().plans_built == 1, "the plan stays where shapes stay");
  run_with(3, 30.0);
  expect(runner.counters().plans_built == 2, "a new shape needs a new plan");
}

TEST(a_moved_arena_is_followed) {
  Rig rig;
  rig.run(step_of(8));
  const std::unique_ptr<HeapArena> former = std::exchange(rig.arena, std::make_unique<HeapArena>());
  const std::vector<std::byte> untouched(former->bytes(), std::byte{0x5a});
  std::byte* memory = former->reserve(0);
  std::copy(untouched.begin(), untouched.end(), memory);
  rig.run(step_of(8));
  expect(std::equal(untouched.begin(), untouched.end(), memory),
         "a step wrote into the arena of an earlier one");
}

TEST(a_runner_tells_what_it_does) {
  Rig rig;
  expect(rig.runner.reads_input(0) && !rig.runner.reads_input(1), "input 0 is read");
  expect(rig.runner.describe().find("block.rms_norm = RmsNorm") != std::string::npos, rig.runner.describe());
  rig.run(step_of(3));
  for (const char* text : {"plan for 4 tokens, 1 sequences", "block.rms_norm = RmsNorm(", "gamma float32[2]",
                           "-> y float32[4, 2]", "memory plan\n"}) {
    expect(rig.runner.describe().find(text) != std::string::npos, text, " is not in ", rig.runner.describe());
  }
}

namespace {

std::vector<std::string> seen;
bool watching = false;

}  // namespace

TEST(observers_see_every_node) {
  set_node_observer(
      {.active = [] { return watching; },
       .begin = [](const NodeEvent& event) -> void* {
         seen.push_back(concat(event.name, " ", *event.inputs[0], " ", *event.outputs[0]));
         return &watching;
       },
       .end = [](void* token) { seen.push_back(token == &watching ? "end" : "a wrong token"); }});
  seen.clear();
  Rig rig;
  rig.run(step_of(3));
  expect(seen.empty(), "an inactive observer is not called");
  watching = true;
  rig.run(step_of(3));
  watching = false;
  set_node_observer({});
  const std::vector<std::string> expected = {"block.fault float32[3, 2] float32[3, 2]",    "end",
                                             "block.rms_norm float32[3, 2] float32[3, 2]", "end",
                                             "block.scribble float32[3, 2] float32[3, 2]", "end"};
  expect(seen == expected, "names, true shapes and order");
}

// The promise of the design: after the first step of a bucket, a step infers, plans and allocates nothing.
TEST(steps_allocate_nothing) {
  for (const DType dtype : kFloats) {
    TinyQwen qwen(dtype);
    for (const bool is_prefill : {true, false}) {
      std::vector<TinyStep> steps;
      for (int64_t index = 0; index < 16; ++index) {
        // 33 to 48 tokens of 3 or 4 prompts, or 5 to 8 sequences: one bucket, many true sizes.
        steps.push_back(is_prefill ? qwen.prefill(prompts_of(3 + index % 2, 33 + index))
                                   : qwen.decode(prompts_of(5 + index % 4, 60)));
      }
      TinyQwen::Phase& phase = is_prefill ? qwen.prefill_phase : qwen.decode_phase;
      const int64_t before_first = allocation_count();
      phase.run(steps[0]);
      const int64_t before = allocation_count();
      expect(before > before_first, "the first step plans, so it allocates: the counter works");
      const Counters counters = phase.runner->counters();
      for (int64_t index = 0; index < 100; ++index) phase.run(steps[index % steps.size()]);
      const int64_t allocated = allocation_count() - before;
      expect(allocated == 0, allocated, " allocations in 100 steps, prefill: ", is_prefill);
      expect(phase.runner->counters().executions == counters.executions + 100, "executions");
      expect(phase.runner->counters().shape_inferences == counters.shape_inferences, "shape inferences");
    }
  }
}
