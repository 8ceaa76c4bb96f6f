#include "ops/rows.h"

#include <string>

#include "core/check.h"
#include "core/environment.h"

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

namespace {

enum class Level { kGeneric, kAvx2, kAvx512 };
constexpr const char* kLevelNames[] = {"generic", "avx2", "avx512"};

Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Level::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kAvx2;
#endif
  return Level::kGeneric;
}

Level choose_level() {
  const std::string& wanted = environment().cpu_level;
  const Level best = best_level();
  if (wanted.empty()) return best;
  for (const Level level : {Level::kGeneric, Level::kAvx2, Level::kAvx512}) {
    if (wanted != kLevelNames[static_cast<int>(level)]) continue;
    check(level <= best, "MODELTORCH_CPU_LEVEL=", wanted,
          " asks for more than this processor has: ", kLevelNames[static_cast<int>(best)]);
    return level;
  }
  fail(ErrorKind::kValue, "MODELTORCH_CPU_LEVEL must be generic, avx2 or avx512, got ", wanted);
}

Level level() {
  static const Level chosen = choose_level();
  return chosen;
}

}  // namespace

const char* cpu_level() {
  return kLevelNames[static_cast<int>(level())];
}

template <class T>
const RowKernels<T>& row_kernels() {
#if defined(__x86_64__)
  if (level() == Level::kAvx512) return level_avx512::kRowKernels<T>;
  if (level() == Level::kAvx2) return level_avx2::kRowKernels<T>;
#endif
  return level_generic::kRowKernels<T>;
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<BFloat16>& row_kernels<BFloat16>();
template const RowKernels<Float16>& row_kernels<Float16>();

}  // namespace modeltorch
