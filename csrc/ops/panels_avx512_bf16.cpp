// Panels with the bfloat16 dot products of AVX-512: 6 rows by 4 panels at a time, all sums in registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ops/panels.h"

#define MODELTORCH_LANES 16
#define MODELTORCH_NATIVE_BFLOAT16
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

namespace modeltorch {
namespace level_avx512_bf16 {

#include "ops/vec.h"

static_assert(kLanes == kPanelRows);
constexpr int64_t kTileRows = 6;
constexpr int64_t kTilePanels = 4;

// sum[lane] += the pair of packed row `lane` . the pair at a.
static inline Vec add_pair(Vec sum, __m512bh w, const BFloat16* a) {
  int pair;
  __builtin_memcpy(&pair, a, sizeof(pair));
  const auto spread = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), w, spread));
}

// Weights that come from memory, not from the cache, are asked for this far ahead: with several rows to
// multiply, the loads alone do not run far enough ahead to keep the memory busy (bench_ops Linear, 8 rows).
constexpr int64_t kPrefetchElements = 32 * 32;

// R rows of a against P panels, all sums in registers.
template <int64_t R, int64_t P, bool kPrefetch>
static inline void multiply_tile(const PanelProduct& product, int64_t row, int64_t panel, Vec (&acc)[R][P]) {
  const BFloat16* a = product.a + row * product.a_stride;
  const BFloat16* w = product.panels + panel * product.panel_stride;
  for (int64_t k = 0; k < product.k; k += 2) {
    for (int64_t p = 0; p < P; ++p) {
      const BFloat16* pairs = w + p * product.panel_stride + k * kPanelRows;
      if constexpr (kPrefetch) __builtin_prefetch(pairs + kPrefetchElements);
      const auto packed = reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs));
      for (int64_t r = 0; r < R; ++r) acc[r][p] = add_pair(acc[r][p], packed, a + r * product.a_stride + k);
    }
  }
}

// The first `count` lanes of v (all, if there are no more; none, if count is below 1), and `other` in the
// rest.
static inline Vec first_lanes(Vec v, int64_t count, float other) {
  const auto mask = static_cast<__mmask16>(count <= 0 ? 0 : (1u << (count < kLanes ? count : kLanes)) - 1);
  return reinterpret_cast<Vec>(
      _mm512_mask_blend_ps(mask, _mm512_set1_ps(other), reinterpret_cast<__m512>(v)));
}

template <int64_t R, int64_t P>
static inline void load_sums(const PanelProduct& product, int64_t row, int64_t panel, Vec (&acc)[R][P]) {
  for (int64_t r = 0; r < R; ++r) {
    const float* from = product.sums + (row + r) * product.sums_stride + panel * kPanelRows;
    for (int64_t v = 0; v < P; ++v) acc[r][v] = product.sums == nullptr ? Vec{} : load(from + v * kPanelRows);
  }
}

struct FloatSink {
  static constexpr int64_t kStep = 1;  // panels that it needs together
  float* out;
  int64_t stride;

  template <int64_t R, int64_t P>
  inline void start(const PanelProduct& product, int64_t row, int64_t panel, Vec (&acc)[R][P]) const {
    load_sums<R, P>(product, row, panel, acc);
  }

  template <int64_t R, int64_t P>
  inline void finish(const PanelProduct&, int64_t row, int64_t panel, const Vec (&acc)[R][P]) const {
    for (int64_t r = 0; r < R; ++r) {
      float* to = out + (row + r) * stride + panel * kPanelRows;
      for (int64_t v = 0; v < P; ++v) store(to + v * kPanelRows, acc[r][v]);
    }
  }
};

struct BFloat16Sink {
  static constexpr int64_t kStep = 1;
  const BFloat16* bias;
  BFloat16* y;
  int64_t stride;

  template <int64_t R, int64_t P>
  inline void start(const PanelProduct& product, int64_t row, int64_t panel, Vec (&acc)[R][P]) const {
    load_sums<R, P>(product, row, panel, acc);
    if (bias == nullptr) return;
    for (int64_t v = 0; v < P; ++v) {
      const int64_t column = panel * kPanelRows + v * kPanelRows;
      const int64_t left = product.n - column;
      if (left <= 0) continue;
      const Vec shift = left >= kLanes ? load(bias + column) : load_some(bias + column, left);
      for (int64_t r = 0; r < R; ++r) acc[r][v] += shift;
    }
  }

  template <int64_t R, int64_t P>
  inline void finish(const PanelProduct& product, int64_t row, int64_t panel, const Vec (&acc)[R][P]) const {
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t v = 0; v < P; ++v) {
        const int64_t column = panel * kPanelRows + v * kPanelRows;
        const int64_t left = product.n - column;
        BFloat16* to = y + (row + r) * stride + column;
        if (left >= kLanes) {
          store(to, acc[r][v]);
        } else if (left > 0) {
          store_some(to, acc[r][v], left);
        }
      }
    }
  }
};

struct SwiGluSink {
  static constexpr int64_t kStep = 2;
  BFloat16* y;
  int64_t stride;

  template <int64_t R, int64_t P>
  inline void start(const PanelProduct& product, int64_t row, int64_t panel, Vec (&acc)[R][P]) const {
    load_sums<R, P>(product, row, panel, acc);
  }

  template <int64_t R, int64_t P>
  inline void finish(const PanelProduct&, int64_t row, int64_t panel, const Vec (&acc)[R][P]) const {
    for (int64_t r = 0; r < R; ++r) {
      BFloat16* to = y + (row + r) * stride + panel / 2 * kPanelRows;
      for (int64_t v = 0; v < P; v += 2) store(to + v / 2 * kPanelRows, swiglu_of(acc[r][v], acc[r][v + 1]));
    }
  }
};

template <int64_t R, int64_t P, bool kPrefetch = false, class Sink>
static inline void run_tile(const PanelProduct& product, const Sink& sink, int64_t row, int64_t panel) {
  Vec acc[R][P];
  sink.template start<R, P>(product, row, panel, acc);
  multiply_tile<R, P, kPrefetch>(product, row, panel, acc);
  sink.template finish<R, P>(product, row, panel, acc);
}

// The last rows, fewer than a full tile: the tile of exactly that many.
template <int64_t R, int64_t P, class Sink>
static inline void run_last_rows(const PanelProduct& product, const Sink& sink, int64_t row, int64_t panel) {
  if constexpr (R > 0) {
    if (product.m - row == R) return run_tile<R, P>(product, sink, row, panel);
    run_last_rows<R - 1, P>(product, sink, row, panel);
  }
}

template <int64_t P, class Sink>
static inline void run_panels(const PanelProduct& product, const Sink& sink, int64_t panel) {
  int64_t row = 0;
  for (; row + kTileRows <= product.m; row += kTileRows) run_tile<kTileRows, P>(product, sink, row, panel);
  run_last_rows<kTileRows - 1, P>(product, sink, row, panel);
}

// Few rows: all of them in one tile, so that every weight is read once, with as many panels as the registers
// hold.
template <int64_t R, bool kPrefetch, class Sink>
static inline void run_row_tile(const PanelProduct& product, const Sink& sink) {
  constexpr int64_t kMost = R == 1 ? 4 : R <= 3 ? 8 : R == 4 ? 6 : R <= 6 ? 4 : 3;
  constexpr int64_t kPanels = kMost / Sink::kStep * Sink::kStep;
  const int64_t panels = (product.n + kPanelRows - 1) / kPanelRows;
  int64_t panel = 0;
  for (; panel + kPanels <= panels; panel += kPanels)
    run_tile<R, kPanels, kPrefetch>(product, sink, 0, panel);
  for (; panel < panels; panel += Sink::kStep) run_tile<R, Sink::kStep, kPrefetch>(product, sink, 0, panel);
}

template <int64_t R, class Sink>
static inline void run_few_rows(const PanelProduct& product, const Sink& sink) {
  if (R > 4 || product.asks_ahead) return run_row_tile<R, true>(product, sink);
  if constexpr (R <= 4) run_row_tile<R, false>(product, sink);
}

template <class Sink>
static inline void run_product(const PanelProduct& product, const Sink& sink) {
  switch (product.m) {
    case 1:
      return run_few_rows<1>(product, sink);
    case 2:
      return run_few_rows<2>(product, sink);
    case 3:
      return run_few_rows<3>(product, sink);
    case 4:
      return run_few_rows<4>(product, sink);
    case 5:
      return run_few_rows<5>(product, sink);
    case 6:
      return run_few_rows<6>(product, sink);
    case 7:
      return run_few_rows<7>(product, sink);
    case 8:
      return run_few_rows<8>(product, sink);
    default:
      break;
  }
  const int64_t panels = (product.n + kPanelRows - 1) / kPanelRows;
  int64_t panel = 0;
  for (; panel + kTilePanels <= panels; panel += kTilePanels) run_panels<kTilePanels>(product, sink, panel);
  for (; panel < panels; panel += Sink::kStep) run_panels<Sink::kStep>(product, sink, panel);
}

static void to_float(const PanelProduct& product, float* out, int64_t out_stride) {
  run_product(product, FloatSink{out, out_stride});
}

static void to_bfloat16(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride) {
  run_product(product, BFloat16Sink{bias, y, y_stride});
}

static void to_swiglu(const PanelProduct& product, BFloat16* y, int64_t y_stride) {
  run_product(product, SwiGluSink{y, y_stride});
}

// weights[j] = exp(scale * scores[j] - maximum) for j < visible and 0 for the rest; returns their sum.
static inline float weigh_scores(const float* scores, float scale, float maximum, int64_t visible,
                                 int64_t count, BFloat16* weights) {
  const Vec factor = splat(scale * kLog2E);
  const Vec shift = splat(maximum * kLog2E);
  Vec total{};
  int64_t j = 0;
  for (; j + kLanes <= visible; j += kLanes) {
    const Vec weight = exp2_of(load(scores + j) * factor - shift);
    store(weights + j, weight);
    total += weight;
  }
  if (j < visible) {
    const Vec weight = first_lanes(exp2_of(load(scores + j) * factor - shift), visible - j, 0.0f);
    store(weights + j, weight);
    total += weight;
    j += kLanes;
  }
  for (; j < count; j += kLanes) store(weights + j, Vec{});
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(total));
}

static inline void soften_row(const SoftmaxStep& step, int64_t row) {
  const int64_t limit = step.first_visible + row / step.group;
  const int64_t visible = limit < 0 ? 0 : limit < step.count ? limit : step.count;
  const float* scores = step.scores + row * step.scores_stride;
  BFloat16* weights = step.weights + row * step.weights_stride;
  if (visible == 0) {
    for (int64_t j = 0; j < step.count; j += kLanes) store(weights + j, Vec{});
    return;
  }
  const Vec scale = splat(step.scale);
  const float before = step.maxima[row];
  Vec best = splat(before);
  int64_t j = 0;
  for (; j + kLanes <= visible; j += kLanes) best = max_of(best, load(scores + j) * scale);
  if (j < visible) best = max_of(best, first_lanes(load(scores + j) * scale, visible - j, -__builtin_inff()));
  const float maximum = _mm512_reduce_max_ps(reinterpret_cast<__m512>(best));
  const float sum = weigh_scores(scores, step.scale, maximum, visible, step.count, weights);
  if (maximum == before) {
    step.sums[row] += sum;
    return;
  }
  const Vec rescale = exp2_of(splat((before - maximum) * kLog2E));
  step.maxima[row] = maximum;
  step.sums[row] = step.sums[row] * rescale[0] + sum;
  float* out = step.out + row * step.d;
  for (int64_t i = 0; i < step.d; i += kLanes) store(out + i, load(out + i) * rescale);
}

static void soften(const SoftmaxStep& step) {
  for (int64_t row = 0; row < step.rows; ++row) soften_row(step, row);
}

static void scale_to_bfloat16(const float* x, float scale, int64_t n, BFloat16* y) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i) * scale);
}

// The 16 sums of 16 vectors, in order.
static inline Vec sum_sixteen(const Vec (&v)[16]) {
  Vec4 quads[4];
  for (int q = 0; q < 4; ++q) quads[q] = sum_each(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]);
  Vec sums;
  __builtin_memcpy(&sums, quads, sizeof(sums));
  return sums;
}

static inline __m512bh load_summands(const BFloat16* p, int64_t count) {
  const auto mask = static_cast<__mmask32>(count >= 32 ? ~0u : (1u << count) - 1);
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
}

static void score_keys(const BFloat16* queries, int64_t rows, int64_t d, const BFloat16* keys, int64_t stride,
                       int64_t count, float* scores, int64_t scores_stride) {
  for (int64_t first = 0; first < count; first += 16) {
    const int64_t group = count - first < 16 ? count - first : 16;
    for (int64_t row = 0; row < rows; ++row) {
      Vec acc[16] = {};
      for (int64_t at = 0; at < d; at += 32) {
        const __m512bh query = load_summands(queries + row * d + at, d - at);
        for (int64_t j = 0; j < 16; ++j) {
          // Rows past the last key repeat it: a row that was never written must not be read.
          const BFloat16* key = keys + (first + (j < group ? j : group - 1)) * stride + at;
          acc[j] = reinterpret_cast<Vec>(
              _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[j]), load_summands(key, d - at), query));
        }
      }
      const Vec sums = sum_sixteen(acc);
      if (group == 16) {
        store(scores + row * scores_stride + first, sums);
      } else {
        store_some(scores + row * scores_stride + first, sums, group);
      }
    }
  }
}

// R rows, C vectors of 16 columns.
template <int64_t R, int64_t C>
static inline void weigh_tile(const BFloat16* weights, int64_t weights_stride, const BFloat16* values,
                              int64_t stride, int64_t count, float* out, int64_t d) {
  Vec acc[R][C];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t c = 0; c < C; ++c) acc[r][c] = load(out + r * d + c * kLanes);
  }
  for (int64_t j = 0; j < count; j += 2) {
    for (int64_t c = 0; c < C; ++c) {
      const __m512bh pairs = pair_values(values + j * stride + c * kLanes, stride, j + 1 < count);
      for (int64_t r = 0; r < R; ++r)
        acc[r][c] = add_pair(acc[r][c], pairs, weights + r * weights_stride + j);
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t c = 0; c < C; ++c) store(out + r * d + c * kLanes, acc[r][c]);
  }
}

template <int64_t C>
static inline void weigh_columns(const BFloat16* weights, int64_t weights_stride, int64_t rows,
                                 const BFloat16* values, int64_t stride, int64_t count, float* out,
                                 int64_t d) {
  int64_t row = 0;
  for (; row + 6 <= rows; row += 6) {
    weigh_tile<6, C>(weights + row * weights_stride, weights_stride, values, stride, count, out + row * d, d);
  }
  for (; row + 3 <= rows; row += 3) {
    weigh_tile<3, C>(weights + row * weights_stride, weights_stride, values, stride, count, out + row * d, d);
  }
  for (; row < rows; ++row) {
    weigh_tile<1, C>(weights + row * weights_stride, weights_stride, values, stride, count, out + row * d, d);
  }
}

static void weigh_values(const BFloat16* weights, int64_t weights_stride, int64_t rows,
                         const BFloat16* values, int64_t stride, int64_t count, float* out, int64_t d) {
  int64_t column = 0;
  for (; column + 4 * kLanes <= d; column += 4 * kLanes) {
    weigh_columns<4>(weights, weights_stride, rows, values + column, stride, count, out + column, d);
  }
  for (; column < d; column += kLanes) {
    weigh_columns<1>(weights, weights_stride, rows, values + column, stride, count, out + column, d);
  }
}

// Two panels of 5120 summands fit a second-level cache of 1 MiB beside as long rows of x.
extern const PanelKernels kPanelKernels = {
    {.least_rows = 192, .most_rows = 192, .resident = 192 * 5120, .summands = 5120},
    to_float,
    to_bfloat16,
    to_swiglu,
    soften,
    scale_to_bfloat16,
    score_keys,
    weigh_values};

}  // namespace level_avx512_bf16
}  // namespace modeltorch
#endif
