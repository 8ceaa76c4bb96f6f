#include <cstddef>
#include <cstdint>

#include "ops/rows.h"

#define MODELTORCH_LEVEL level_generic
#define MODELTORCH_LANES 4
#define MODELTORCH_TILE 2
#include "ops/rows_impl.h"
