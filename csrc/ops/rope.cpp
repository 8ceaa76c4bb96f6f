#include "ops/rope.h"

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/rows.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> Rope::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 4);
  const TensorDesc& q = inputs[0];
  check_rank("q", q, 3);
  check_rank("k", inputs[1], 3);
  const int64_t head_size = q.dims[2];
  check(head_size % 2 == 0, "head_size must be even, got q ", q);
  check_tensor("k", inputs[1], {q.dims[0], inputs[1].dims[1], head_size}, q.dtype);
  check_tensor("cos", inputs[2], {q.dims[0], head_size}, q.dtype);
  check_tensor("sin", inputs[3], {q.dims[0], head_size}, q.dtype);
  return {q, inputs[1]};
}

RotatedHeads rope(GraphBuilder& graph, Value q, Value k, Value cos, Value sin) {
  const std::vector<Value> rotated = graph.add("rope", std::make_shared<Rope>(), {q, k, cos, sin});
  return {rotated[0], rotated[1]};
}

namespace {

template <class T>
void rotate(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& y) {
  const RowKernels<T>& rows = row_kernels<T>();
  const int64_t heads = x.dims[1];
  const int64_t size = x.dims[2];
  parallel_for(x.dims[0], grain_for(4 * heads * size), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* token_cos = cos.as<T>() + token * size;
      const T* token_sin = sin.as<T>() + token * size;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = (token * heads + head) * size;
        rows.rope(x.as<T>() + at, token_cos, token_sin, size, y.as<T>() + at);
      }
    }
  });
}

template <class T>
void run(const Rope&, const KernelArgs& args) {
  rotate<T>(args.in(0), args.in(2), args.in(3), args.out(0));
  rotate<T>(args.in(1), args.in(2), args.in(3), args.out(1));
}

constexpr CpuFunctions<Rope> kFunctions{run<float>, run<BFloat16>, run<Float16>};
const bool registered = register_cpu<Rope, kFunctions>();
const bool known = register_operation(
    Rope::kName, [](const OperationParameters&) -> OperationPtr { return std::make_shared<Rope>(); });

}  // namespace
}  // namespace modeltorch
