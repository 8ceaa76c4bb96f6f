#pragma once

#include "ops/few_row_linear.h"

namespace modeltorch {

/// A FewRowLinear of 9 to 128 rows on Hopper, but for the norm: `x` takes the place of linear.x and is
/// normalised already. The same promise about weights and biases: they are read before the kernels in front
/// are done.
void row_tile_linear(const FewRowLinear& linear, const void* x, void* stream);

/// False: with swiglu, units that do not go by eights, a residual, or gate and up too far apart in memory.
bool row_tile_linear_fits(const FewRowLinear& linear);

}  // namespace modeltorch
