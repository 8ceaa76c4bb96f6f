#include "ops/paged_attention.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "ops/attention.h"
#include "ops/panel_paged_attention.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> PagedAttention::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 5);
  const TensorDesc& q = inputs[0];
  const TensorDesc& k_cache = inputs[1];
  check_rank("q", q, 3);
  const int64_t batch = q.dims[0];
  check_tensor("q", q, {batch, shape.heads, shape.head_size}, q.dtype);
  check_rank("k_cache", k_cache, 4);
  check_tensor("k_cache", k_cache, {k_cache.dims[0], k_cache.dims[1], shape.kv_heads, shape.head_size},
               q.dtype);
  check_tensor("v_cache", inputs[2], k_cache.dims, q.dtype);
  check_rank("block_tables", inputs[3], 2);
  check_tensor("block_tables", inputs[3], {batch, inputs[3].dims[1]}, DType::kInt32);
  check_tensor("seq_len", inputs[4], {batch}, DType::kInt32);
  return {{q.dtype, {batch, shape.heads * shape.head_size}, q.rows}};
}

void PagedAttention::check_indices(const std::vector<TensorView>& inputs) const {
  const int64_t block_size = inputs[1].dims[1];
  const int64_t width = inputs[3].dims[1];
  const auto* lengths = inputs[4].as<int32_t>();
  check_range("seq_len", lengths, inputs[4].dims[0], 0, width * block_size + 1);
  for (int64_t sequence = 0; sequence < inputs[4].dims[0]; ++sequence) {
    const int64_t used = divide_up(lengths[sequence], block_size);
    check_range("block_tables", inputs[3].as<int32_t>() + sequence * width, used, 0, inputs[1].dims[0]);
  }
}

Value paged_attention(GraphBuilder& graph, Value q, Value k_cache, Value v_cache, Value block_tables,
                      Value seq_len, const AttentionShape& shape) {
  return graph.add("paged_attention", std::make_shared<PagedAttention>(shape),
                   {q, k_cache, v_cache, block_tables, seq_len})[0];
}

namespace {

template <class T>
class PagedAttentionCpu final : public Kernel {
 public:
  explicit PagedAttentionCpu(const AttentionShape& shape) : shape_(shape), attention_(shape) {}

  size_t workspace_bytes() const override { return attention_.workspace_bytes(); }

  void run(const KernelArgs& args) override {
    const int32_t* lengths = args.in(4).as<int32_t>();
    const int64_t batch = args.in(4).dims[0];
    attention_.each_thread(args.workspace, [&](auto mine, float* scratch) {
      for (int64_t sequence = 0; sequence < batch; ++sequence) {
        for (int64_t head = 0; head < shape_.kv_heads; ++head) {
          if (mine()) attend(args, {sequence, sequence, 1, head, lengths[sequence]}, scratch);
        }
      }
    });
  }

 private:
  void attend(const KernelArgs& args, const QueryBlock& block, float* scratch) const {
    const int64_t block_size = args.in(1).dims[1];
    const int64_t stride = shape_.kv_heads * shape_.head_size;
    const int32_t* table = args.in(3).as<int32_t>() + block.sequence * args.in(3).dims[1];
    const T* keys = args.in(1).as<T>() + block.kv_head * shape_.head_size;
    const T* values = args.in(2).as<T>() + block.kv_head * shape_.head_size;
    attention_.attend(block, args.in(0).as<T>(), args.out(0).as<T>(), scratch, [&](int64_t limit, auto use) {
      for (int64_t first = 0; first < limit; first += block_size) {
        const int64_t at = table[first / block_size] * block_size * stride;
        use(KeyRun<T>{keys + at, values + at, stride, first, std::min(block_size, limit - first)});
      }
    });
  }

  AttentionShape shape_;
  CpuAttention<T> attention_;
};

std::unique_ptr<Kernel> make(const KernelSetup& setup) {
  const AttentionShape& shape = dynamic_cast<const PagedAttention&>(setup.operation).shape;
  if (compute_dtype(setup) == DType::kBFloat16 && PanelPagedAttention::serves(shape)) {
    return std::make_unique<PanelPagedAttention>(shape, setup.inputs[4].dims[0]);
  }
  return make_typed_kernel<PagedAttentionCpu>(setup, shape);
}

const bool registered = register_kernel(PagedAttention::kName, DeviceType::kCpu, make);
const bool known =
    register_operation(PagedAttention::kName, [](const OperationParameters& parameters) -> OperationPtr {
      return std::make_shared<PagedAttention>(attention_shape(parameters));
    });

}  // namespace
}  // namespace modeltorch
