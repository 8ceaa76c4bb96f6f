#include "ops/self_attention.h"

#include <numeric>

#include <algorithm>

#include "ops/attention.h"
#include "ops/panel_self_attention.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> SelfAttention::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 4);
  const TensorDesc& q = inputs[0];
  check_rank("q", q, 3);
  const int64_t n = q.dims[0];
  check_tensor("q", q, {n, shape.heads, shape.head_size}, q.dtype);
  check_tensor("k", inputs[1], {n, shape.kv_heads, shape.head_size}, q.dtype);
  check_tensor("v", inputs[2], {n, shape.kv_heads, shape.head_size}, q.dtype);
  check_rank("seq_len", inputs[3], 1);
  check(inputs[3].dtype == DType::kInt32, "seq_len must be int32, got ", inputs[3]);
  return {{q.dtype, {n, shape.heads * shape.head_size}, q.rows}};
}

void SelfAttention::check_indices(const std::vector<TensorView>& inputs) const {
  const auto* lengths = inputs[3].as<int32_t>();
  const int64_t sequences = inputs[3].dims[0];
  const int64_t tokens = inputs[0].dims[0];
  check_range("seq_len", lengths, sequences, 0, tokens + 1);
  const int64_t sum = std::accumulate(lengths, lengths + sequences, int64_t{0});
  check(sum == tokens, "seq_len must add up to the ", tokens, " tokens of q, got ", sum);
}

Value self_attention(GraphBuilder& graph, Value q, Value k, Value v, Value seq_len,
                     const AttentionShape& shape) {
  return graph.add("self_attention", std::make_shared<SelfAttention>(shape), {q, k, v, seq_len})[0];
}

namespace {

template <class T>
class SelfAttentionCpu final : public Kernel {
 public:
  explicit SelfAttentionCpu(const AttentionShape& shape) : shape_(shape), attention_(shape) {}

  size_t workspace_bytes() const override { return attention_.workspace_bytes(); }

  void run(const KernelArgs& args) override {
    const int32_t* lengths = args.in(3).as<int32_t>();
    const int64_t sequences = args.in(3).dims[0];
    attention_.each_thread(args.workspace, [&](auto mine, float* scratch) {
      int64_t start = 0;
      for (int64_t sequence = 0; sequence < sequences; start += lengths[sequence++]) {
        const int64_t step = attention_.queries_per_block();
        // The last queries see the most keys: the longest blocks go first, so that threads end together.
        for (int64_t end = lengths[sequence]; end > 0; end -= step) {
          const int64_t first = std::max<int64_t>(0, end - step);
          for (int64_t head = 0; head < shape_.kv_heads; ++head) {
            if (mine()) attend(args, {sequence, start + first, end - first, head, first + 1}, start, scratch);
          }
        }
      }
    });
  }

 private:
  void attend(const KernelArgs& args, const QueryBlock& block, int64_t start, float* scratch) const {
    const int64_t stride = shape_.kv_heads * shape_.head_size;
    const int64_t at = start * stride + block.kv_head * shape_.head_size;
    const T* keys = args.in(1).as<T>() + at;
    const T* values = args.in(2).as<T>() + at;
    attention_.attend(block, args.in(0).as<T>(), args.out(0).as<T>(), scratch,
                      [&](int64_t limit, auto use) { use(KeyRun<T>{keys, values, stride, 0, limit}); });
  }

  AttentionShape shape_;
  CpuAttention<T> attention_;
};

std::unique_ptr<Kernel> make(const KernelSetup& setup) {
  const AttentionShape& shape = dynamic_cast<const SelfAttention&>(setup.operation).shape;
  if (compute_dtype(setup) == DType::kBFloat16 && PanelSelfAttention::serves(shape)) {
    return std::make_unique<PanelSelfAttention>(shape, setup.inputs[0].dims[0], setup.inputs[3].dims[0]);
  }
  return make_typed_kernel<SelfAttentionCpu>(setup, shape);
}

const bool registered = register_kernel(SelfAttention::kName, DeviceType::kCpu, make);
const bool known =
    register_operation(SelfAttention::kName, [](const OperationParameters& parameters) -> OperationPtr {
      return std::make_shared<SelfAttention>(attention_shape(parameters));
    });

}  // namespace
}  // namespace modeltorch
