#include "ops/add.h"

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> Add::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 2);
  check_rank("a", inputs[0], 2);
  check_tensor("b", inputs[1], inputs[0].dims, inputs[0].dtype);
  return {inputs[0]};
}

Value add(GraphBuilder& graph, Value a, Value b) {
  return graph.add("add", std::make_shared<Add>(), {a, b})[0];
}

namespace {

template <class T>
void run(const Add&, const KernelArgs& args) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t size = args.in(0).dims[1];
  const T* a = args.in(0).as<T>();
  const T* b = args.in(1).as<T>();
  T* y = args.out(0).as<T>();
  parallel_for(args.in(0).dims[0], grain_for(2 * size), [&](int64_t begin, int64_t end) {
    rows.add(a + begin * size, b + begin * size, (end - begin) * size, y + begin * size);
  });
}

constexpr CpuFunctions<Add> kFunctions{run<float>, run<BFloat16>, run<Float16>};
const bool registered = register_cpu<Add, kFunctions>();
const bool known = register_operation(
    Add::kName, [](const OperationParameters&) -> OperationPtr { return std::make_shared<Add>(); });

}  // namespace
}  // namespace modeltorch
