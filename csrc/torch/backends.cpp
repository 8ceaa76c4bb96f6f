// What lower floors ask the host library for: big matrix products, a thread pool, a profiler, warnings.

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <omp.h>

#include "core/check.h"
#include "core/gemm.h"
#include "core/parallel.h"
#include "core/warn.h"
#include "graph/trace.h"

namespace modeltorch {
namespace {

at::ScalarType gemm_type(DType dtype) {
  if (dtype == DType::kFloat32) return at::kFloat;
  if (dtype == DType::kBFloat16) return at::kBFloat16;
  if (dtype == DType::kFloat16) return at::kHalf;
  fail(ErrorKind::kNotImplemented, "gemm: no kernel for ", dtype);
}

at::Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t row_stride, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), {rows, columns}, {row_stride, 1}, at::TensorOptions(type));
}

void gemm_aten(const GemmArgs& args) {
  const at::ScalarType type = gemm_type(args.dtype);
  const at::Tensor a = matrix(args.a, args.m, args.k, args.a_stride, type);
  const at::Tensor b = args.b_transposed ? matrix(args.b, args.n, args.k, args.k, type).t()
                                         : matrix(args.b, args.k, args.n, args.n, type);
  at::Tensor c = matrix(args.c, args.m, args.n, args.c_stride, type);
  if (args.bias == nullptr) {
    at::mm_out(c, a, b);
  } else {
    at::addmm_out(c, matrix(args.bias, 1, args.n, args.n, type), a, b);
  }
}

void run_on_pool(int64_t count, int64_t grain, ParallelBody body, void* context) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

void* begin_record(const NodeEvent& event) {
  auto* record = new at::RecordFunction(at::RecordScope::FUNCTION);
  if (record->isActive()) record->before(event.name);
  return record;
}

const bool installed = [] {
  set_gemm(gemm_aten);
  set_parallel_backend({.run = run_on_pool,
                        .width = [] { return int64_t{at::get_num_threads()}; },
                        .set_width = [](int64_t width) { omp_set_num_threads(static_cast<int>(width)); }});
  set_warning_handler([](const std::string& message) { TORCH_WARN("modeltorch: ", message); });
  set_node_observer({.active = [] { return at::hasCallbacks(); },
                     .begin = begin_record,
                     .end = [](void* token) { delete static_cast<at::RecordFunction*>(token); }});
  return true;
}();

}  // namespace
}  // namespace modeltorch
