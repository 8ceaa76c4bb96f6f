#include "ops/linear.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "core/gemm.h"
#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/panel_linear.h"
#include "ops/panel_packing.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> Linear::infer_shape(const std::vector<TensorDesc>& inputs) const {
  size_t expected = 1;
  for (const LinearPart& part : parts) expected += part.has_bias ? 2 : 1;
  check_count(inputs, expected);
  const TensorDesc& x = inputs[0];
  check_rank("x", x, 2);
  int64_t columns = 0;
  size_t at = 1;
  for (const LinearPart& part : parts) {
    const TensorDesc& weight = inputs[at++];
    check_rank("weight", weight, 2);
    const int64_t n = weight.dims[part.transposed ? 0 : 1];
    const int64_t k = x.dims[1];
    check_tensor(part.transposed ? "weight [n, k]" : "weight [k, n]", weight,
                 part.transposed ? Dims{n, k} : Dims{k, n}, x.dtype);
    if (part.has_bias) check_tensor("bias", inputs[at++], {n}, x.dtype);
    columns += n;
  }
  return {{x.dtype, {x.dims[0], columns}, x.rows}};
}

Value linear(GraphBuilder& graph, std::string_view name, Value x, const std::vector<LinearWeight>& weights) {
  std::vector<Value> inputs{x};
  std::vector<LinearPart> parts;
  for (const LinearWeight& weight : weights) {
    inputs.push_back(weight.weight);
    if (weight.bias.id >= 0) inputs.push_back(weight.bias);
    parts.push_back({weight.transposed, weight.bias.id >= 0});
  }
  return graph.add(name, std::make_shared<Linear>(std::move(parts)), std::move(inputs))[0];
}

namespace {

// Up to this many rows our own loops read the weight once and beat a general matrix product (bench_ops
// linear).
constexpr int64_t kSmallRows = 8;

template <class T>
void run_small(const SmallLinear<T>& args, bool transposed) {
  const auto columns_of = transposed ? row_kernels<T>().linear_nk : row_kernels<T>().linear_kn;
  constexpr int64_t kColumnGroup = 64;
  const int64_t groups = divide_up(args.n, kColumnGroup);
  parallel_for(groups, grain_for(kColumnGroup * args.m * args.k / 8), [&](int64_t begin, int64_t end) {
    columns_of(args, begin * kColumnGroup, std::min(args.n, end * kColumnGroup));
  });
}

template <class T>
void run(const Linear& op, const KernelArgs& args) {
  const TensorView& x = args.in(0);
  const TensorView& y = args.out(0);
  const int64_t rows = x.dims[0];
  if (rows == 0) return;
  int64_t column = 0;
  size_t at = 1;
  for (const LinearPart& part : op.parts) {
    const TensorView& weight = args.in(at++);
    const T* bias = part.has_bias ? args.in(at++).template as<T>() : nullptr;
    const int64_t n = weight.dims[part.transposed ? 0 : 1];
    const int64_t k = x.dims[1];
    T* out = y.as<T>() + column;
    if (rows <= kSmallRows) {
      run_small<T>({x.as<T>(), weight.as<T>(), bias, out, rows, n, k, y.dims[1]}, part.transposed);
    } else {
      gemm({.dtype = x.dtype,
            .m = rows,
            .n = n,
            .k = k,
            .a = x.data,
            .a_stride = k,
            .b = weight.data,
            .b_transposed = part.transposed,
            .bias = bias,
            .c = out,
            .c_stride = y.dims[1]});
    }
    column += n;
  }
}

constexpr CpuFunctions<Linear> kFunctions{run<float>, run<BFloat16>, run<Float16>};

std::unique_ptr<Kernel> make(const KernelSetup& setup) {
  if (setup.packed != nullptr) {
    return std::make_unique<PanelLinear>(std::dynamic_pointer_cast<const PanelWeight>(setup.packed),
                                         setup.inputs[0].dims[0]);
  }
  return make_cpu_kernel<Linear, kFunctions>(setup);
}

const bool registered = register_kernel(Linear::kName, DeviceType::kCpu, make);
const bool packer_registered =
    register_packer(Linear::kName, DeviceType::kCpu, panel_packer<Linear, PanelOrder::kPlain>());
const bool known =
    register_operation(Linear::kName, [](const OperationParameters& parameters) -> OperationPtr {
      const LinearPart part{parameters.integer("transposed", 0) != 0, parameters.integer("has_bias", 0) != 0};
      return std::make_shared<Linear>(std::vector<LinearPart>(parameters.integer("parts", 1), part));
    });

}  // namespace
}  // namespace modeltorch
