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

/// Rows of `a` times a run of panels.
struct PanelProduct {
  const BFloat16* a = nullptr;  ///< row i starts at a + i * a_stride
  int64_t a_stride = 0;
  int64_t m = 0;
  const BFloat16* panels = nullptr;  ///< the first panel of the run; the next one starts panel_stride further
  int64_t panel_stride = 0;
  int64_t k = 0;  ///< summands, even; at most panel_stride / 16
  int64_t n = 0;  ///< columns of the result
};

/// The state of one row of a running softmax (Milakov and Gimelshein, 2018).
struct SoftmaxRow {
  float scale = 1.0f;
  float* maximum = nullptr;  ///< of scale * score so far
  float* sum = nullptr;      ///< of the weights so far
  float* out = nullptr;      ///< [d], weighted values so far
  int64_t d = 0;
};

/// The inner loops over panels. Sums are float32.
struct PanelKernels {
  /// out[i * out_stride + j] = or += a row i . packed row j. Columns are written up to the end of the last
  /// panel.
  void (*to_float)(const PanelProduct& product, bool accumulate, float* out, int64_t out_stride);
  /// y[i * y_stride + j] = a row i . packed row j + bias[j]; bias may be null. Exactly n columns are written.
  void (*to_bfloat16)(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride);
  /// A step of a running softmax over one row: weights[j] = exp(scale * scores[j] - maximum) for j < visible
  /// and 0 for the rest of `count` (a multiple of 16). Updates the maximum and the sum, and multiplies out[d]
  /// (d a multiple of 16) by what the old maximum was off.
  void (*soften)(const SoftmaxRow& row, const float* scores, int64_t visible, int64_t count,
                 BFloat16* weights);
  /// y[i] = x[i] * scale over n elements, a multiple of 16.
  void (*scale_to_bfloat16)(const float* x, float scale, int64_t n, BFloat16* y);
  /// scores[r * scores_stride + j] = query row r . key j, for keys that lie `stride` apart and are not
  /// packed.
  void (*score_keys)(const BFloat16* queries, int64_t rows, int64_t d, const BFloat16* keys, int64_t stride,
                     int64_t count, float* scores, int64_t scores_stride);
  /// out[r * d + i] += sum over j of weights[r * weights_stride + j] * value j [i], d a multiple of 16. The
  /// weight after the last key is read, and must be finite.
  void (*weigh_values)(const BFloat16* weights, int64_t weights_stride, int64_t rows, const BFloat16* values,
                       int64_t stride, int64_t count, float* out, int64_t d);
};

/// The kernels of the level that this process uses, or null where that level has no bfloat16 products: it
/// keeps matrices as they are.
const PanelKernels* panel_kernels();

}  // namespace modeltorch
