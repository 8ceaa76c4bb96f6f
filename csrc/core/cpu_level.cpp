#include "core/cpu_level.h"

#include <string>

#include "core/check.h"
#include "core/environment.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace modeltorch {
namespace {

constexpr const char* kNames[kCpuLevelCount] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

// Linux gives a process the tile registers only when it asks (Documentation/arch/x86/xstate.rst).
bool grant_amx() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 5)) != 0;
}

CpuLevel best_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuLevel::kGeneric;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return CpuLevel::kAvx2;
  if (!has_avx512_bf16()) return CpuLevel::kAvx512;
  return grant_amx() ? CpuLevel::kAmx : CpuLevel::kAvx512Bf16;
}

#else

CpuLevel best_level() {
  return CpuLevel::kGeneric;
}

#endif

CpuLevel choose_level() {
  const std::string& wanted = environment().cpu_level;
  const CpuLevel best = best_level();
  if (wanted.empty()) return best;
  for (int index = 0; index < kCpuLevelCount; ++index) {
    if (wanted != kNames[index]) continue;
    const auto level = static_cast<CpuLevel>(index);
    check(level <= best, "MODELTORCH_CPU_LEVEL=", wanted,
          " asks for more than this processor has: ", cpu_level_name(best));
    return level;
  }
  fail(ErrorKind::kValue, "MODELTORCH_CPU_LEVEL must be generic, avx2, avx512, avx512_bf16 or amx, got ",
       wanted);
}

}  // namespace

const char* cpu_level_name(CpuLevel level) {
  return kNames[static_cast<int>(level)];
}

CpuLevel cpu_level() {
  static const CpuLevel chosen = choose_level();
  return chosen;
}

}  // namespace modeltorch
