#include "graph/fusion.h"
#include "ops/paged_attention.h"
#include "ops/rope.h"
#include "ops/self_attention.h"
#include "ops/shape_check.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// Rope with the lengths of the sequences, which the vendor's operation asks for beside what Rope has.
struct RopeWithLengths final : Operation {
  static constexpr std::string_view kName = "RopeWithLengths";

  std::string_view name() const override { return kName; }
  int output_count() const override { return 2; }
  std::vector<TensorDesc> infer_shape(const std::vector<TensorDesc>& inputs) const override {
    check_count(inputs, 5);
    check_rank("seq_len", inputs[4], 1);
    return Rope().infer_shape({inputs.begin(), inputs.end() - 1});
  }
};

// The seq_len of the attention that reads `q`, or an invalid value.
Value lengths_of_attention(const Graph& graph, Value q) {
  for (const size_t reader : graph.consumers(q)) {
    const Node& node = graph.nodes[reader];
    if (node.operation->name() == SelfAttention::kName) return node.inputs[3];
    if (node.operation->name() == PagedAttention::kName) return node.inputs[4];
  }
  return {};
}

bool give_rope_its_lengths(Graph& graph) {
  bool changed = false;
  for (Node& node : graph.nodes) {
    if (node.operation->name() != Rope::kName) continue;
    const Value lengths = lengths_of_attention(graph, node.outputs[0]);
    if (lengths.id < 0) continue;
    node.operation = std::make_shared<RopeWithLengths>();
    node.inputs.push_back(lengths);
    changed = true;
  }
  return changed;
}

/// RopeWithLengths as the vendor's Rope with rotaryCoeff 2, the half rotation.
///
/// | vendor tensor | ours     | shape                     | dtype      |
/// |---------------|----------|---------------------------|------------|
/// | in 0, out 0   | q, q'    | [n, heads * head_size]    | fp16, bf16 |
/// | in 1, out 1   | k, k'    | [n, kv_heads * head_size] | as q       |
/// | in 2, in 3    | cos, sin | [n, head_size]            | as q       |
/// | in 4          | seq_len  | [B]                       | int32      |
class RopeNpu final : public NpuKernel {
 public:
  RopeNpu(const KernelSetup& setup, const RopeWithLengths&) : NpuKernel(setup) {
    atb::infer::RopeParam param;
    param.rotaryCoeff = 2;
    add(param);
  }

 protected:
  void bind(const KernelArgs& args) override {
    set(0,
        {flat(args.in(0)), flat(args.in(1)), vendor_tensor(args.in(2)), vendor_tensor(args.in(3)),
         vendor_tensor(args.in(4))},
        {flat(args.out(0)), flat(args.out(1))});
  }

 private:
  static atb::Tensor flat(const TensorView& view) {
    return vendor_tensor(view, {view.dims[0], view.dims[1] * view.dims[2]});
  }
};

const bool registered = register_npu<RopeWithLengths, RopeNpu>();
const bool fusion_registered = register_fusion(RopeWithLengths::kName, give_rope_its_lengths);

}  // namespace
}  // namespace modeltorch
