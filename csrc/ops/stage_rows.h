#pragma once

#include <cstddef>
#include <cstdint>

namespace modeltorch {

/// Brings the inputs of a step to where its kernels read them, and pads them: the first launch of a step that
/// runs at the sizes of its bucket.
///
/// Each part is a matrix of 16-bit words. to[r, c] = from[r, c] where it has such an element, the padding in
/// further rows, 0 in further columns. Each gather is y[r] = table[from[r]] with the rows of an int64 part,
/// read where the caller has them: all parts and gathers run at once.
struct StageRows {
  static constexpr int kMaxParts = 8;
  static constexpr int kMaxGathers = 4;
  static constexpr int kGatherBytes = 16;  ///< rows and addresses of a gather are multiples of it

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

  struct Gather {
    const void* table = nullptr;
    int64_t table_rows = 0;
    int64_t row_bytes = 0;
    int part = 0;  ///< that holds the rows' numbers
    void* y = nullptr;
    int32_t* fault = nullptr;  ///< set for a number outside the table; its row becomes 0
  };

  Part parts[kMaxParts];
  int count = 0;
  Gather gathers[kMaxGathers];
  int gather_count = 0;
};

/// `stream` is a cudaStream_t.
void stage_rows(const StageRows& stage, void* stream);

}  // namespace modeltorch
