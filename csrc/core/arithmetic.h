#pragma once

#include <cstdint>

namespace modeltorch {

/// How many times `by` goes into `value`, the last time perhaps not whole. Neither is negative.
constexpr int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

/// The smallest multiple of `to` that is not below `value`.
constexpr int64_t round_up(int64_t value, int64_t to) {
  return divide_up(value, to) * to;
}

/// Whether `pointer` is a multiple of `bytes`. Null is.
inline bool is_aligned(const void* pointer, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace modeltorch
