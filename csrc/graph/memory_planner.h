#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace modeltorch {

/// A tensor that must exist from node `first` (which writes it) to node `last` (which reads it last),
/// inclusive.
struct Lifetime {
  size_t bytes = 0;
  int64_t first = 0;
  int64_t last = 0;
};

/// Where each tensor lies in the arena.
struct MemoryPlan {
  std::vector<size_t> offsets;
  size_t arena_bytes = 0;
};

/// What offsets are multiples of on the CPU: a cache line, and what the widest vector load wants.
inline constexpr size_t kArenaAlignment = 64;

/// Assigns offsets, multiples of `alignment`, so that tensors whose lifetimes meet never overlap.
///
/// Greedy by size: the largest tensor first, each at the lowest offset that is free during its whole lifetime
/// (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 4.3).
/// A pure function: the same lifetimes give the same plan. A tensor of 0 bytes takes no room.
MemoryPlan plan_memory(std::span<const Lifetime> lifetimes, size_t alignment = kArenaAlignment);

}  // namespace modeltorch
