#include "ops/reshape_and_cache.h"

#include <cstring>

#include "core/parallel.h"
#include "ops/cpu_kernel.h"
#include "ops/shape_check.h"

namespace modeltorch {

std::vector<TensorDesc> ReshapeAndCache::infer_shape(const std::vector<TensorDesc>& inputs) const {
  check_count(inputs, 5);
  const TensorDesc& k = inputs[0];
  check_rank("k", k, 3);
  check_tensor("v", inputs[1], k.dims, k.dtype);
  const TensorDesc& k_cache = inputs[2];
  check_rank("k_cache", k_cache, 4);
  check_tensor("k_cache", k_cache, {k_cache.dims[0], k_cache.dims[1], k.dims[1], k.dims[2]}, k.dtype);
  check_tensor("v_cache", inputs[3], k_cache.dims, k.dtype);
  check_tensor("slots", inputs[4], {k.dims[0]}, DType::kInt32);
  return {};
}

void ReshapeAndCache::check_indices(const std::vector<TensorView>& inputs) const {
  const Dims& cache = inputs[2].dims;
  check_range("slots", inputs[4].as<int32_t>(), inputs[4].dims[0], -1, cache[0] * cache[1]);
}

void reshape_and_cache(GraphBuilder& graph, Value k, Value v, Value k_cache, Value v_cache, Value slots) {
  graph.add("reshape_and_cache", std::make_shared<ReshapeAndCache>(), {k, v, k_cache, v_cache, slots});
}

namespace {

template <class T>
void run(const ReshapeAndCache&, const KernelArgs& args) {
  const int64_t row_size = args.in(0).dims[1] * args.in(0).dims[2];
  const int32_t* slots = args.in(4).as<int32_t>();
  parallel_for(args.in(0).dims[0], grain_for(2 * row_size), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = slots[token];
      if (slot < 0) continue;
      for (const int part : {0, 1}) {
        const T* row = args.in(part).as<T>() + token * row_size;
        std::memcpy(args.in(2 + part).as<T>() + slot * row_size, row, sizeof(T) * row_size);
      }
    }
  });
}

constexpr CpuFunctions<ReshapeAndCache> kFunctions{run<float>, run<BFloat16>, run<Float16>};
const bool registered = register_cpu<ReshapeAndCache, kFunctions>();
const bool known = register_operation(ReshapeAndCache::kName, [](const OperationParameters&) -> OperationPtr {
  return std::make_shared<ReshapeAndCache>();
});

}  // namespace
}  // namespace modeltorch
