#pragma once

#include <cstdint>

namespace modeltorch {

/// What a processor can do, each level with everything of those before it.
enum class CpuLevel : uint8_t {
  kGeneric,     ///< any processor
  kAvx2,        ///< AVX2 and FMA
  kAvx512,      ///< AVX-512 F, BW, VL, DQ
  kAvx512Bf16,  ///< and its bfloat16 dot products
  kAmx,         ///< and the bfloat16 tiles of AMX, which the operating system must grant
};
inline constexpr int kCpuLevelCount = 5;

/// The name that MODELTORCH_CPU_LEVEL takes: generic, avx2, avx512, avx512_bf16, amx.
const char* cpu_level_name(CpuLevel level);

/// The best level of this processor, or the one that MODELTORCH_CPU_LEVEL names. Throws Error if that name is
/// unknown or asks for more than the processor has.
CpuLevel cpu_level();

}  // namespace modeltorch
