#pragma once

#include <cstddef>
#include <cstdint>

namespace modeltorch {

/// Copies the inputs of a step into buffers of more rows and columns, and pads them: the first launch of a
/// step that runs at the sizes of its bucket.
///
/// Each part is a matrix of 16-bit words. to[r, c] = from[r, c] where it has such an element, the padding in
/// further rows, 0 in further columns.
struct StageRows {
  static constexpr int kMaxParts = 8;

  struct Part {
    const void* from = nullptr;
    void* to = nullptr;
    size_t offset = 0;  ///< of `to` in the buffer that all parts share
    int64_t rows = 0;
    int64_t columns = 0;
    int64_t padded_rows = 0;
    int64_t padded_columns = 0;
    int32_t padding = 0;  ///< 0 or -1, so that every word of an integer has the same bits
  };

  Part parts[kMaxParts];
  int count = 0;
};

/// `stream` is a cudaStream_t.
void stage_rows(const StageRows& stage, void* stream);

}  // namespace modeltorch
