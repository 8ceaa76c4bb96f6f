#include "ops/linear_swiglu.h"

#include "graph/fusion.h"
#include "ops/cpu_kernel.h"
#include "ops/panel_linear.h"
#include "ops/panel_packing.h"
#include "ops/swiglu.h"

namespace modeltorch {

std::vector<TensorDesc> LinearSwiGlu::infer_shape(const std::vector<TensorDesc>& inputs) const {
  return SwiGlu().infer_shape(Linear(parts).infer_shape(inputs));
}

namespace {

// The SwiGlu that alone reads the output of the Linear at `index`, or -1.
int64_t activation_after(const Graph& graph, size_t index) {
  const Value y = graph.nodes[index].outputs[0];
  const std::vector<size_t> readers = graph.consumers(y);
  if (graph.values[y.id].kind != ValueKind::kIntermediate || readers.size() != 1) return -1;
  return graph.nodes[readers[0]].operation->name() == SwiGlu::kName ? static_cast<int64_t>(readers[0]) : -1;
}

bool fuse_linear_swiglu(Graph& graph) {
  for (size_t index = 0; index < graph.nodes.size(); ++index) {
    const auto* linear = dynamic_cast<const Linear*>(graph.nodes[index].operation.get());
    const int64_t reader = linear == nullptr ? -1 : activation_after(graph, index);
    if (reader < 0) continue;
    Node& fused = graph.nodes[index];
    fused.operation = std::make_shared<LinearSwiGlu>(linear->parts);
    fused.outputs = graph.nodes[reader].outputs;
    graph.nodes.erase(graph.nodes.begin() + reader);
    return true;
  }
  return false;
}

// One after the other, with the CPU's kernels for the two.
class LinearThenSwiGlu final : public Kernel {
 public:
  LinearThenSwiGlu(const KernelSetup& setup, const std::vector<LinearPart>& parts)
      : linear_op_(parts), middle_(linear_op_.infer_shape(setup.inputs)) {
    const std::vector<TensorDesc> y = swiglu_op_.infer_shape(middle_);
    linear_ = find_kernel(Linear::kName,
                          DeviceType::kCpu)({linear_op_, setup.inputs, middle_, setup.device, setup.packed});
    swiglu_ = find_kernel(SwiGlu::kName, DeviceType::kCpu)({swiglu_op_, middle_, y, setup.device});
  }

  size_t workspace_bytes() const override { return middle_bytes() + linear_->workspace_bytes(); }

  void run(const KernelArgs& args) override {
    TensorView middle = args.out(0);
    middle.dims[1] *= 2;
    middle.data = args.workspace;
    const TensorView* const between[] = {&middle};
    KernelArgs first = args;
    first.outputs = between;
    first.workspace = static_cast<std::byte*>(args.workspace) + middle_bytes();
    linear_->run(first);
    KernelArgs second = args;
    second.inputs = between;
    second.workspace = nullptr;
    swiglu_->run(second);
  }

 private:
  size_t middle_bytes() const {
    const int64_t elements = middle_[0].dims[0] * middle_[0].dims[1];
    return (static_cast<size_t>(elements) * dtype_size(middle_[0].dtype) + 63) / 64 * 64;
  }

  Linear linear_op_;
  SwiGlu swiglu_op_;
  std::vector<TensorDesc> middle_;
  std::unique_ptr<Kernel> linear_;
  std::unique_ptr<Kernel> swiglu_;
};

std::unique_ptr<Kernel> make(const KernelSetup& setup) {
  compute_dtype(setup);  // throws where there is none
  const auto& op = dynamic_cast<const LinearSwiGlu&>(setup.operation);
  const auto weight = std::dynamic_pointer_cast<const PanelWeight>(setup.packed);
  if (weight != nullptr && weight->is_gated)
    return std::make_unique<PanelLinear>(weight, setup.inputs[0].dims[0]);
  return std::make_unique<LinearThenSwiGlu>(setup, op.parts);
}

const bool registered = register_kernel(LinearSwiGlu::kName, DeviceType::kCpu, make);
const bool packer_registered =
    register_packer(LinearSwiGlu::kName, DeviceType::kCpu, panel_packer<LinearSwiGlu, PanelOrder::kGated>());
const bool fusion_registered = register_fusion(LinearSwiGlu::kName, fuse_linear_swiglu);
const bool known =
    register_operation(LinearSwiGlu::kName, [](const OperationParameters& parameters) -> OperationPtr {
      const LinearPart part{parameters.integer("transposed", 0) != 0, parameters.integer("has_bias", 0) != 0};
      return std::make_shared<LinearSwiGlu>(
          std::vector<LinearPart>(static_cast<size_t>(parameters.integer("parts", 1)), part));
    });

}  // namespace
}  // namespace modeltorch
