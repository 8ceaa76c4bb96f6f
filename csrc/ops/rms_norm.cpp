#include "ops/rms_norm.h"

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> RmsNorm::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 2);
  check_rank("x", inputs[0], 2);
  check_tensor("gamma", inputs[1], {inputs[0].dims[1]}, inputs[0].dtype);
  return {inputs[0]};
}

Value rms_norm(GraphBuilder& graph, Value x, Value gamma, float epsilon) {
  return graph.add("rms_norm", std::make_shared<RmsNorm>(epsilon), {x, gamma})[0];
}

namespace {

template <class T>
void run(const RmsNorm& op, const KernelArgs& args) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t size = args.in(0).dims[1];
  const T* x = args.in(0).as<T>();
  const T* gamma = args.in(1).as<T>();
  T* y = args.out(0).as<T>();
  parallel_for(args.in(0).dims[0], grain_for(4 * size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      rows.rms_norm(x + row * size, gamma, op.epsilon, size, y + row * size);
    }
  });
}

constexpr CpuFunctions<RmsNorm> kFunctions{run<float>, run<BFloat16>, run<Float16>};
const bool registered = register_cpu<RmsNorm, kFunctions>();
const bool known =
    register_operation(RmsNorm::kName, [](const OperationParameters& parameters) -> OperationPtr {
      return std::make_shared<RmsNorm>(static_cast<float>(parameters.number("epsilon")));
    });

}  // namespace
}  // namespace modeltorch
