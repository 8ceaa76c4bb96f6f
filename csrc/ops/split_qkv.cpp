#include "ops/split_qkv.h"

#include <cstring>

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> SplitQkv::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 1);
  const TensorDesc& qkv = inputs[0];
  check_rank("qkv", qkv, 2);
  check_tensor("qkv", qkv, {qkv.dims[0], (heads + 2 * kv_heads) * head_size}, qkv.dtype);
  const TensorDesc q{qkv.dtype, {qkv.dims[0], heads, head_size}, qkv.rows};
  const TensorDesc kv{qkv.dtype, {qkv.dims[0], kv_heads, head_size}, qkv.rows};
  return {q, kv, kv};
}

QkvHeads split_qkv(GraphBuilder& graph, Value qkv, int64_t heads, int64_t kv_heads, int64_t head_size) {
  const std::vector<Value> parts =
      graph.add("split_qkv", std::make_shared<SplitQkv>(heads, kv_heads, head_size), {qkv});
  return {parts[0], parts[1], parts[2]};
}

namespace {

template <class T>
void run(const SplitQkv& op, const KernelArgs& args) {
  const int64_t q_size = op.heads * op.head_size;
  const int64_t kv_size = op.kv_heads * op.head_size;
  const int64_t row_size = q_size + 2 * kv_size;
  parallel_for(args.in(0).dims[0], grain_for(row_size), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* row = args.in(0).as<T>() + token * row_size;
      std::memcpy(args.out(0).as<T>() + token * q_size, row, sizeof(T) * q_size);
      std::memcpy(args.out(1).as<T>() + token * kv_size, row + q_size, sizeof(T) * kv_size);
      std::memcpy(args.out(2).as<T>() + token * kv_size, row + q_size + kv_size, sizeof(T) * kv_size);
    }
  });
}

constexpr CpuFunctions<SplitQkv> kFunctions{run<float>, run<BFloat16>, run<Float16>};
const bool registered = register_cpu<SplitQkv, kFunctions>();
const bool known =
    register_operation(SplitQkv::kName, [](const OperationParameters& parameters) -> OperationPtr {
      return std::make_shared<SplitQkv>(parameters.integer("heads", 1), parameters.integer("kv_heads", 1),
                                        parameters.integer("head_size", 1));
    });

}  // namespace
}  // namespace modeltorch
