#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "ops/rows.h"

#define MODELTORCH_LEVEL level_avx2
#define MODELTORCH_LANES 8
#define MODELTORCH_TILE 2
#pragma GCC target("avx2,fma")
#include "ops/rows_impl.h"
#endif
