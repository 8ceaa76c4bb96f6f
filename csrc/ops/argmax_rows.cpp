#include "ops/argmax_rows.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> ArgmaxRows::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 1);
  check_rank("x", inputs[0], 2);
  check(inputs[0].dims[1] > 0, "x must have at least one column, got ", inputs[0]);
  return {{DType::kInt64, {inputs[0].dims[0]}, inputs[0].rows}};
}

namespace {

constexpr int64_t kParts = 8;  // of a row, so that one row keeps several threads busy

// The workspace holds the winner of each part of each row.
template <class T>
class ArgmaxRowsCpu final : public Kernel {
 public:
  explicit ArgmaxRowsCpu(int64_t rows) : rows_(rows) {}
  size_t workspace_bytes() const override { return static_cast<size_t>(rows_ * kParts) * sizeof(int64_t); }

  void run(const KernelArgs& args) override {
    const int64_t rows = args.in(0).dims[0];
    const int64_t size = args.in(0).dims[1];
    const int64_t part_size = divide_up(size, kParts);
    const T* x = args.in(0).as<T>();
    auto* winners = static_cast<int64_t*>(args.workspace);
    parallel_for(rows * kParts, grain_for(part_size / 4), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = std::min(task % kParts * part_size, size - 1);
        const int64_t count = std::min(part_size, size - first);
        winners[task] = first + row_kernels<T>().argmax(x + task / kParts * size + first, count);
      }
    });
    int64_t* y = args.out(0).as<int64_t>();
    for (int64_t row = 0; row < rows; ++row) y[row] = best_of(x + row * size, winners + row * kParts);
  }

 private:
  static int64_t best_of(const T* x, const int64_t* winners) {
    int64_t best = winners[0];
    for (int64_t part = 1; part < kParts; ++part) {
      const auto value = static_cast<float>(x[winners[part]]);
      const auto so_far = static_cast<float>(x[best]);
      if (so_far == so_far && !(value <= so_far)) best = winners[part];
    }
    return best;
  }

  int64_t rows_;
};

const bool registered = register_kernel(ArgmaxRows::kName, DeviceType::kCpu, [](const KernelSetup& setup) {
  return make_typed_kernel<ArgmaxRowsCpu>(setup, setup.inputs[0].dims[0]);
});
const bool known = register_operation(ArgmaxRows::kName, [](const OperationParameters&) -> OperationPtr {
  return std::make_shared<ArgmaxRows>();
});

}  // namespace
}  // namespace modeltorch
