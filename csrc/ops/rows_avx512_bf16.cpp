#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ops/rows.h"

#define MODELTORCH_LEVEL level_avx512_bf16
#define MODELTORCH_LANES 16
#define MODELTORCH_TILE 4
#define MODELTORCH_NATIVE_BFLOAT16
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include "ops/rows_impl.h"
#endif
