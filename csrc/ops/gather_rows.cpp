#include "ops/gather_rows.h"

#include <cstring>

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> GatherRows::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 2);
  check_rank("table", inputs[0], 2);
  check_rank("indices", inputs[1], 1);
  check(inputs[1].dtype == DType::kInt64, "indices must be int64, got ", inputs[1]);
  return {{inputs[0].dtype, {inputs[1].dims[0], inputs[0].dims[1]}, inputs[1].rows}};
}

Value gather_rows(GraphBuilder& graph, std::string_view name, Value table, Value indices) {
  return graph.add(name, std::make_shared<GatherRows>(), {table, indices})[0];
}

namespace {

void run(const GatherRows&, const KernelArgs& args) {
  const size_t row_bytes = static_cast<size_t>(args.in(0).dims[1]) * dtype_size(args.in(0).dtype);
  const char* table = args.in(0).as<char>();
  const int64_t* indices = args.in(1).as<int64_t>();
  char* y = args.out(0).as<char>();
  const int64_t grain = grain_for(static_cast<int64_t>(row_bytes));
  parallel_for(args.in(1).dims[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(y + row * row_bytes, table + indices[row] * row_bytes, row_bytes);
    }
  });
}

constexpr CpuFunctions<GatherRows> kFunctions{run, run, run};
const bool registered = register_cpu<GatherRows, kFunctions>();
const bool known = register_operation(GatherRows::kName, [](const OperationParameters&) -> OperationPtr {
  return std::make_shared<GatherRows>();
});

}  // namespace
}  // namespace modeltorch
