#pragma once

#include <cstdint>

#include "core/half_floats.h"

namespace modeltorch {

/// The packed form of a bfloat16 matrix [n, k] whose rows are dotted with other rows: panels of 16 rows, and
/// in a panel the pairs (k, k + 1) of every row side by side:
///
///     element (i, j) lies at  (i / 16) * 16 * k  +  (j / 2) * 32  +  (i % 16) * 2  +  j % 2
///
/// This is what the bfloat16 dot products of AVX-512 and the tiles of AMX read, for one row of the other side
/// as for many. k is even; the rows that fill up the last panel are zeros.
inline constexpr int64_t kPanelRows = 16;

/// Elements of a packed [n, k].
inline int64_t panel_elements(int64_t n, int64_t k) {
  return (n + kPanelRows - 1) / kPanelRows * kPanelRows * k;
}

/// The name of this layout, and of the matrix with its bias behind it. It changes with the layout.
inline constexpr const char* kPanelLayout = "bfloat16 panels 16 x 2, bias last, 1";

/// Packs a panel of k columns: row i starts at rows[i]; null is a row of zeros.
void pack_panel(const BFloat16* const (&rows)[kPanelRows], int64_t k, BFloat16* panel);

/// Packs a panel of columns of a [k, 16] block for products whose summands are its rows: row j starts at
/// source + j * row_stride. An odd k is filled up with a row of zeros.
void pack_columns(const BFloat16* source, int64_t row_stride, int64_t k, BFloat16* panel);

/// Reads row `row` back.
void unpack_panel_row(const BFloat16* panels, int64_t row, int64_t k, BFloat16* out);

/// Rows of `a` times a run of panels, added to sums.
struct PanelProduct {
  const BFloat16* a = nullptr;  ///< row i starts at a + i * a_stride
  int64_t a_stride = 0;
  int64_t m = 0;
  const BFloat16* panels = nullptr;  ///< the first panel of the run; the next one starts panel_stride further
  int64_t panel_stride = 0;
  int64_t k = 0;                ///< summands, even; at most panel_stride / 16
  int64_t n = 0;                ///< columns of the result
  const float* sums = nullptr;  ///< row i starts at sums + i * sums_stride, whole panels; null: zeros
  int64_t sums_stride = 0;
  const BFloat16* next =
      nullptr;  ///< panels that are read after these, asked of the memory meanwhile, or null
  /// The whole tiles of the rows of a once more, each tile of 16 rows by 32 summands in one piece: the one of
  /// rows 16 i and on and summands 32 j and on starts at i * tiles_stride + j * 512. Null: there are none.
  const BFloat16* tiles = nullptr;
  int64_t tiles_stride = 0;
  bool asks_ahead = false;  ///< a few rows read panels that are far away
};

/// A step of the running softmax (Milakov and Gimelshein, 2018) of several rows over the same keys: row i
/// sees the first first_visible + i / group of them, none if that is below 1.
struct SoftmaxStep {
  float scale = 1.0f;
  int64_t rows = 0;
  int64_t group = 1;
  int64_t first_visible = 0;
  const float* scores = nullptr;  ///< [rows, count], rows scores_stride apart
  int64_t scores_stride = 0;
  int64_t count = 0;            ///< a multiple of 16
  BFloat16* weights = nullptr;  ///< [rows, count], rows weights_stride apart
  int64_t weights_stride = 0;
  float* maxima = nullptr;  ///< [rows], of scale * score so far
  float* sums = nullptr;    ///< [rows], of the weights so far
  float* out = nullptr;     ///< [rows, d], weighted values so far
  int64_t d = 0;            ///< a multiple of 16
};

/// How products of more than a few rows are cut so that what is read again is still in a cache.
struct PanelBlocking {
  int64_t least_rows = 0;  ///< of a block of rows that all columns are multiplied with
  int64_t most_rows = 0;
  int64_t resident = 0;  ///< elements of such a block that stay in the second-level cache
  int64_t summands = 0;  ///< of two panels that stay in the nearest one
  /// Blocks of up to so many rows stay in the nearest cache instead, streamed_summands of each at a time, and
  /// panels pass through.
  int64_t streamed_rows = 0;
  int64_t streamed_summands = 0;
  /// Columns of a thread from which on other rows are worth copying into PanelProduct::tiles. 0: never.
  int64_t tiles_columns = 0;
};

/// The inner loops over panels. Sums are float32.
struct PanelKernels {
  PanelBlocking blocking;
  /// out[i * out_stride + j] = sums + a row i . packed row j. Columns are written up to the end of the last
  /// panel; out may be the sums.
  void (*to_float)(const PanelProduct& product, float* out, int64_t out_stride);
  /// y[i * y_stride + j] = sums + a row i . packed row j + bias[j]; bias may be null. Exactly n columns are
  /// written.
  void (*to_bfloat16)(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride);
  /// The same for panels of gates and of what they let through in turn: y[i * y_stride + j] = silu(gate) * up
  /// with 16 columns of gate in panel 2 * (j / 16) and of up in the one behind it. n counts both: a multiple
  /// of 32.
  void (*to_swiglu)(const PanelProduct& product, BFloat16* y, int64_t y_stride);
  /// weights[i][j] = exp(scale * scores[i][j] - maximum[i]) for the keys that row i sees, 0 for the rest.
  /// Updates the maxima and the sums, and multiplies out by what the old maxima were off.
  void (*soften)(const SoftmaxStep& step);
  /// y[i] = x[i] * scale over n elements, a multiple of 16.
  void (*scale_to_bfloat16)(const float* x, float scale, int64_t n, BFloat16* y);
  /// scores[r * scores_stride + j] = query row r . key j, for keys that lie `stride` apart and are not
  /// packed.
  void (*score_keys)(const BFloat16* queries, int64_t rows, int64_t d, const BFloat16* keys, int64_t stride,
                     int64_t count, float* scores, int64_t scores_stride);
  /// out[r * d + i] += sum over j of weights[r * weights_stride + j] * value j [i], d a multiple of 16. As
  /// many weights after the last key as fill up a multiple of 32 may be read, and must be finite.
  void (*weigh_values)(const BFloat16* weights, int64_t weights_stride, int64_t rows, const BFloat16* values,
                       int64_t stride, int64_t count, float* out, int64_t d);
};

/// The kernels of the level that this process uses, or null where that level has no bfloat16 products: it
/// keeps matrices as they are.
const PanelKernels* panel_kernels();

}  // namespace modeltorch
