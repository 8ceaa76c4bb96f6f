#pragma once

#include <cstdint>

#include "core/half_floats.h"

namespace modeltorch {

/// A run of keys and values that lie at fixed strides: one block of a paged cache, or a whole prompt.
template <class T>
struct KeyRun {
  const T* keys = nullptr;    ///< key j starts at keys + j * stride
  const T* values = nullptr;  ///< value j starts at values + j * stride
  int64_t stride = 0;         ///< in elements
  int64_t first = 0;          ///< position of key 0 in its sequence
  int64_t count = 0;
};

/// The query rows of one task: `rows` rows that attend to the same keys, and their running softmax.
///
/// Row r sees the keys at positions below limits[r]. The state follows Milakov and Gimelshein, "Online
/// normalizer calculation for softmax" (2018): after every run, out[r] / sums[r] is the attention over the
/// keys so far.
struct AttentionState {
  int64_t rows = 0;
  int64_t head_size = 0;
  const float* queries = nullptr;   ///< [rows, head_size], scaled
  const int64_t* limits = nullptr;  ///< [rows]
  float* maxima = nullptr;          ///< [rows], largest score so far
  float* sums = nullptr;            ///< [rows], sum of exp(score - maximum)
  float* out = nullptr;             ///< [rows, head_size], weighted values, not yet divided by sums
  float* scores = nullptr;          ///< [rows, kKeyChunk], scratch
};

/// Keys are scored this many at a time.
inline constexpr int64_t kKeyChunk = 64;

/// y = x . w^T + bias for a few rows of x.
template <class T>
struct SmallLinear {
  const T* x = nullptr;     ///< [m, k], dense
  const T* w = nullptr;     ///< [n, k] for linear_nk, [k, n] for linear_kn
  const T* bias = nullptr;  ///< [n] or null
  T* y = nullptr;           ///< row stride y_stride
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t y_stride = 0;
};

/// The inner loops of the CPU kernels, compiled once a processor level. All sums are float32.
template <class T>
struct RowKernels {
  /// y[i] = x[i] / sqrt(mean(x^2) + epsilon) * gamma[i], i < n.
  void (*rms_norm)(const T* x, const T* gamma, float epsilon, int64_t n, T* y);
  /// y[i] = a[i] + b[i].
  void (*add)(const T* a, const T* b, int64_t n, T* y);
  /// y[i] = gate[i] / (1 + exp(-gate[i])) * up[i].
  void (*swiglu)(const T* gate, const T* up, int64_t n, T* y);
  /// y = x * cos + cat(-x[d/2:], x[:d/2]) * sin over one head of size d. y may be x.
  void (*rope)(const T* x, const T* cos, const T* sin, int64_t d, T* y);
  /// Columns [begin, end) of a SmallLinear whose weight is [n, k].
  void (*linear_nk)(const SmallLinear<T>& args, int64_t begin, int64_t end);
  /// Columns [begin, end) of a SmallLinear whose weight is [k, n].
  void (*linear_kn)(const SmallLinear<T>& args, int64_t begin, int64_t end);
  /// The first index of the largest of n > 0 elements; of the first NaN if there is one.
  int64_t (*argmax)(const T* x, int64_t n);
  /// out[i] = x[i] * scale as float32.
  void (*scale_to_float)(const T* x, float scale, int64_t n, float* out);
  /// Lets every row of `state` attend to the keys of `run`.
  void (*attend)(const AttentionState& state, const KeyRun<T>& run);
  /// y[i] = out[r][i] / sums[r] for one row; zeros where no key was seen.
  void (*finish_attention)(const AttentionState& state, int64_t row, T* y);
};

/// The kernels of the best level that this processor runs, or of the one that MODELTORCH_CPU_LEVEL names.
template <class T>
const RowKernels<T>& row_kernels();

/// Floats of scratch that an AttentionState of this size needs.
inline int64_t attention_scratch_floats(int64_t rows, int64_t head_size) {
  return rows * (2 * head_size + kKeyChunk + 2);
}

}  // namespace modeltorch
