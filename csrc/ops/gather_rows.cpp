#include "ops/gather_rows.h"

#include <cstring>

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/panel_weight.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> GatherRows::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 2);
  check_rank("table", inputs[0], 2);
  check_rank("indices", inputs[1], 1);
  check(inputs[1].dtype == DType::kInt64, "indices must be int64, got ", inputs[1]);
  return {{inputs[0].dtype, {inputs[1].dims[0], inputs[0].dims[1]}, inputs[1].rows}};
}

void GatherRows::check_indices(const std::vector<TensorView>& inputs) const {
  check_range("indices", inputs[1].as<int64_t>(), inputs[1].dims[0], 0, inputs[0].dims[0]);
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

// Reads rows of a table that a tied lm_head holds as panels.
class PanelGather final : public Kernel {
 public:
  explicit PanelGather(std::shared_ptr<const PanelWeight> table) : table_(std::move(table)) {}

  void run(const KernelArgs& args) override {
    const int64_t* indices = args.in(1).as<int64_t>();
    BFloat16* y = args.out(0).as<BFloat16>();
    parallel_for(args.in(1).dims[0], grain_for(8 * table_->k), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        unpack_panel_row(table_->data(), indices[row], table_->k, y + row * table_->k);
      }
    });
  }

 private:
  std::shared_ptr<const PanelWeight> table_;
};

std::vector<size_t> replaced_by_panels(const Operation&, const std::vector<TensorDesc>&) {
  return {0};
}

std::unique_ptr<Kernel> make(const KernelSetup& setup) {
  if (setup.packed != nullptr) {
    return std::make_unique<PanelGather>(std::dynamic_pointer_cast<const PanelWeight>(setup.packed));
  }
  return make_cpu_kernel<GatherRows, kFunctions>(setup);
}

const bool registered = register_kernel(GatherRows::kName, DeviceType::kCpu, make);
const bool packer_registered = register_packer(
    GatherRows::kName, DeviceType::kCpu, {.replaces = replaced_by_panels, .format = [](const Operation&) {
                                            return std::string(kPlainPanelFormat);
                                          }});
const bool known = register_operation(GatherRows::kName, [](const OperationParameters&) -> OperationPtr {
  return std::make_shared<GatherRows>();
});

}  // namespace
}  // namespace modeltorch
