#pragma once

#include <cstddef>
#include <cstdint>

namespace modeltorch {

/// Reads `bytes` of memory once with every thread of the pool, each walking several streams side by side, and
/// returns a value that depends on all of them. Benchmarks time it: no step that reads as much can be faster.
uint64_t read_all(const void* data, size_t bytes);

}  // namespace modeltorch
