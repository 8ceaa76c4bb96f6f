#pragma once

#include <cuda_runtime.h>

#include <cstdint>

/// How a block finds its rows among sequences whose lengths only the device knows.
namespace modeltorch {

/// A run of rows of one sequence.
struct PrefillTile {
  int start = 0;   ///< first row of the sequence in the packed tensors
  int length = 0;  ///< rows of the sequence; 0: there is no such tile
  int first = 0;   ///< first row of the tile, counted from `start`
};

/// Tiles that `sequences` sequences of `tokens` rows together can need at most.
inline int64_t prefill_tile_bound(int64_t tokens, int64_t sequences, int rows) {
  const int64_t bound = (tokens + sequences * (rows - 1)) / rows;
  return bound < 1 ? 1 : bound;
}

/// Finds tile number `order` in the order of falling weight: causal rows cost more the further they lie in
/// their sequence, so the last tiles of the longest sequences start first. A whole warp calls this together
/// and every lane gets the answer.
template <int kRows>
__device__ inline PrefillTile find_prefill_tile(const int32_t* seq_len, int sequences, int tokens,
                                                int order) {
  if (sequences == 1) {
    PrefillTile tile;
    const int length = min(seq_len[0], tokens);
    const int index = (length + kRows - 1) / kRows - 1 - order;
    if (length > 0 && index >= 0) tile = {0, length, index * kRows};
    return tile;
  }
  const int lane = threadIdx.x % 32;
  const auto tiles_of = [&](int sequence) {
    const int length = sequence < sequences ? seq_len[sequence] : 0;
    return length > 0 ? (min(length, tokens) + kRows - 1) / kRows : 0;
  };
  // Tiles whose index in their sequence is at least `index`.
  const auto tiles_from = [&](int index) {
    int count = 0;
    for (int sequence = lane; sequence < sequences; sequence += 32)
      count += max(tiles_of(sequence) - index, 0);
    return static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(count)));
  };
  PrefillTile tile;
  if (order >= tiles_from(0)) return tile;
  int most = 0;
  for (int sequence = lane; sequence < sequences; sequence += 32) most = max(most, tiles_of(sequence));
  int index = 0;
  int beyond = static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(most)));
  // tiles_from(index) > order >= tiles_from(beyond)
  while (beyond - index > 1) {
    const int middle = (index + beyond) / 2;
    (tiles_from(middle) > order ? index : beyond) = middle;
  }
  int rank = order - tiles_from(index + 1);  // among the sequences that have a tile `index`
  int start = 0;
  for (int base = 0; base < sequences; base += 32) {
    const int sequence = base + lane;
    const int length = sequence < sequences ? max(min(seq_len[sequence], tokens), 0) : 0;
    const unsigned having = __ballot_sync(0xffffffffu, tiles_of(sequence) > index);
    const int count = __popc(having);
    if (rank < count) {
      const bool mine = (having >> lane & 1) && __popc(having & ((1u << lane) - 1)) == rank;
      const int owner = __ffs(__ballot_sync(0xffffffffu, mine)) - 1;
      start +=
          static_cast<int>(__reduce_add_sync(0xffffffffu, lane < owner ? static_cast<unsigned>(length) : 0u));
      tile.start = start;
      tile.length = max(min(__shfl_sync(0xffffffffu, length, owner), tokens - start), 0);
      tile.first = index * kRows;
      if (tile.first >= tile.length) tile.length = 0;
      return tile;
    }
    rank -= count;
    start += static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(length)));
  }
  return tile;
}

}  // namespace modeltorch
