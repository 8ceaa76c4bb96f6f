#include "ops/rows.h"

#include "core/cpu_level.h"

namespace modeltorch {

namespace level_generic {
template <class T>
extern const RowKernels<T> kRowKernels;
}
namespace level_avx2 {
template <class T>
extern const RowKernels<T> kRowKernels;
}
namespace level_avx512 {
template <class T>
extern const RowKernels<T> kRowKernels;
}
namespace level_avx512_bf16 {
template <class T>
extern const RowKernels<T> kRowKernels;
}

template <class T>
const RowKernels<T>& row_kernels() {
#if defined(__x86_64__)
  if (cpu_level() >= CpuLevel::kAvx512Bf16) return level_avx512_bf16::kRowKernels<T>;
  if (cpu_level() >= CpuLevel::kAvx512) return level_avx512::kRowKernels<T>;
  if (cpu_level() >= CpuLevel::kAvx2) return level_avx2::kRowKernels<T>;
#endif
  return level_generic::kRowKernels<T>;
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<BFloat16>& row_kernels<BFloat16>();
template const RowKernels<Float16>& row_kernels<Float16>();

}  // namespace modeltorch
