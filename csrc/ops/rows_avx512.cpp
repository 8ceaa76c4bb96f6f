#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "ops/rows.h"

#define MODELTORCH_LEVEL level_avx512
#define MODELTORCH_LANES 16
#define MODELTORCH_TILE 4
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include "ops/rows_impl.h"
#endif
