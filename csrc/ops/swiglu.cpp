#include "ops/swiglu.h"

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> SwiGlu::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 1);
  check_rank("gate_up", inputs[0], 2);
  check(inputs[0].dims[1] % 2 == 0, "gate_up must have an even number of columns, got ", inputs[0]);
  TensorDesc y = inputs[0];
  y.dims[1] /= 2;
  return {y};
}

Value swiglu(GraphBuilder& graph, Value gate_up) {
  return graph.add("swiglu", std::make_shared<SwiGlu>(), {gate_up})[0];
}

namespace {

template <class T>
void run(const SwiGlu&, const KernelArgs& args) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t size = args.out(0).dims[1];
  const T* gate_up = args.in(0).as<T>();
  T* y = args.out(0).as<T>();
  parallel_for(args.in(0).dims[0], grain_for(16 * size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = gate_up + row * 2 * size;
      rows.swiglu(gate, gate + size, size, y + row * size);
    }
  });
}

constexpr CpuFunctions<SwiGlu> kFunctions{run<float>, run<BFloat16>, run<Float16>};
const bool registered = register_cpu<SwiGlu, kFunctions>();
const bool known = register_operation(
    SwiGlu::kName, [](const OperationParameters&) -> OperationPtr { return std::make_shared<SwiGlu>(); });

}  // namespace
}  // namespace modeltorch
