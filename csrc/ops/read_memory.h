#pragma once

#include <cstddef>

namespace modeltorch {

/// Reads device memory once from end to end, which leaves nothing else in the caches, and nothing that must
/// be written back. `bytes` is a multiple of 16; `stream` is a cudaStream_t.
void read_memory(const void* data, size_t bytes, void* stream);

}  // namespace modeltorch
