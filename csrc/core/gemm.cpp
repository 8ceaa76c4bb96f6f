#include "core/gemm.h"

#include <atomic>

#include "core/check.h"
#include "core/half_floats.h"

namespace modeltorch {
namespace {

template <class T>
void gemm_loop(const GemmArgs& args) {
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  const T* bias = static_cast<const T*>(args.bias);
  T* c = static_cast<T*>(args.c);
  for (int64_t i = 0; i < args.m; ++i) {
    for (int64_t j = 0; j < args.n; ++j) {
      double sum = bias == nullptr ? 0.0 : static_cast<float>(bias[j]);
      for (int64_t p = 0; p < args.k; ++p) {
        const T& weight = args.b_transposed ? b[j * args.k + p] : b[p * args.n + j];
        sum += static_cast<double>(static_cast<float>(a[i * args.a_stride + p])) * static_cast<float>(weight);
      }
      c[i * args.c_stride + j] = T(static_cast<float>(sum));
    }
  }
}

void gemm_plain(const GemmArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32:
      return gemm_loop<float>(args);
    case DType::kBFloat16:
      return gemm_loop<BFloat16>(args);
    case DType::kFloat16:
      return gemm_loop<Float16>(args);
    default:
      fail(ErrorKind::kNotImplemented, "gemm: no kernel for ", args.dtype);
  }
}

std::atomic<GemmFunction> installed_gemm{gemm_plain};

}  // namespace

void set_gemm(GemmFunction function) {
  installed_gemm.store(function);
}

void gemm(const GemmArgs& args) {
  installed_gemm.load(std::memory_order_relaxed)(args);
}

}  // namespace modeltorch
