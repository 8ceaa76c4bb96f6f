#include "ops/add_rms_norm.h"

#include "core/parallel.h"
#include "graph/fusion.h"
#include "ops/add.h"
#include "ops/cpu_kernel.h"
#include "ops/rms_norm.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> AddRmsNorm::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 3);
  check_rank("a", inputs[0], 2);
  check_tensor("b", inputs[1], inputs[0].dims, inputs[0].dtype);
  check_tensor("gamma", inputs[2], {inputs[0].dims[1]}, inputs[0].dtype);
  return {inputs[0], inputs[0]};
}

namespace {

// The first RmsNorm that reads the output of the Add at `index` as its x, or -1.
int64_t norm_after(const Graph& graph, size_t index) {
  const Value sum = graph.nodes[index].outputs[0];
  for (const size_t reader : graph.consumers(sum)) {
    const Node& node = graph.nodes[reader];
    if (node.operation->name() == RmsNorm::kName && node.inputs[0] == sum)
      return static_cast<int64_t>(reader);
  }
  return -1;
}

bool fuse_add_rms_norm(Graph& graph) {
  for (size_t index = 0; index < graph.nodes.size(); ++index) {
    if (graph.nodes[index].operation->name() != Add::kName) continue;
    const int64_t reader = norm_after(graph, index);
    if (reader < 0) continue;
    const Node norm = graph.nodes[reader];
    const float epsilon = dynamic_cast<const RmsNorm&>(*norm.operation).epsilon;
    Node& fused = graph.nodes[index];
    fused.name = norm.name;
    fused.operation = std::make_shared<AddRmsNorm>(epsilon);
    fused.inputs.push_back(norm.inputs[1]);
    fused.outputs.push_back(norm.outputs[0]);
    graph.nodes.erase(graph.nodes.begin() + reader);
    return true;
  }
  return false;
}

template <class T>
void run(const AddRmsNorm& op, const KernelArgs& args) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t size = args.in(0).dims[1];
  const T* a = args.in(0).as<T>();
  const T* b = args.in(1).as<T>();
  const T* gamma = args.in(2).as<T>();
  T* sum = args.out(0).as<T>();
  T* y = args.out(1).as<T>();
  parallel_for(args.in(0).dims[0], grain_for(6 * size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * size;
      rows.add(a + at, b + at, size, sum + at);
      rows.rms_norm(sum + at, gamma, op.epsilon, size, y + at);
    }
  });
}

constexpr CpuFunctions<AddRmsNorm> kFunctions{run<float>, run<BFloat16>, run<Float16>};
const bool registered = register_cpu<AddRmsNorm, kFunctions>();
const bool fusion_registered = register_fusion(AddRmsNorm::kName, fuse_add_rms_norm);
const bool known =
    register_operation(AddRmsNorm::kName, [](const OperationParameters& parameters) -> OperationPtr {
      return std::make_shared<AddRmsNorm>(static_cast<float>(parameters.number("epsilon")));
    });

}  // namespace
}  // namespace modeltorch
