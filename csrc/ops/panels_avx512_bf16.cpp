// Panels with the bfloat16 dot products of AVX-512: 6 rows by 4 panels at a time, all sums in registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ops/panels.h"

#define MODELTORCH_LANES 16
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

// R rows of a against P panels, all sums in registers.
template <int64_t R, int64_t P>
static inline void multiply_tile(const PanelProduct& product, int64_t row, int64_t panel, Vec (&acc)[R][P]) {
  const BFloat16* a = product.a + row * product.a_stride;
  const BFloat16* w = product.panels + panel * product.panel_stride;
  for (int64_t k = 0; k < product.k; k += 2) {
    for (int64_t p = 0; p < P; ++p) {
      const BFloat16* pairs = w + p * product.panel_stride + k * kPanelRows;
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

struct FloatSink {
  bool accumulate;
  float* out;
  int64_t stride;

  template <int64_t R, int64_t P>
  inline void start(const PanelProduct&, int64_t row, int64_t panel, Vec (&acc)[R][P]) const {
    for (int64_t r = 0; r < R; ++r) {
      const float* from = out + (row + r) * stride + panel * kPanelRows;
      for (int64_t v = 0; v < P; ++v) acc[r][v] = accumulate ? load(from + v * kPanelRows) : Vec{};
    }
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
  const BFloat16* bias;
  BFloat16* y;
  int64_t stride;

  template <int64_t R, int64_t P>
  inline void start(const PanelProduct& product, int64_t, int64_t panel, Vec (&acc)[R][P]) const {
    for (int64_t v = 0; v < P; ++v) {
      const int64_t column = panel * kPanelRows + v * kPanelRows;
      const int64_t left = product.n - column;
      Vec sum{};
      if (bias != nullptr && left > 0)
        sum = left >= kLanes ? load(bias + column) : load_some(bias + column, left);
      for (int64_t r = 0; r < R; ++r) acc[r][v] = sum;
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

template <int64_t R, int64_t P, class Sink>
static inline void run_tile(const PanelProduct& product, const Sink& sink, int64_t row, int64_t panel) {
  Vec acc[R][P];
  sink.template start<R, P>(product, row, panel, acc);
  multiply_tile<R, P>(product, row, panel, acc);
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

template <class Sink>
static inline void run_product(const PanelProduct& product, const Sink& sink) {
  const int64_t panels = (product.n + kPanelRows - 1) / kPanelRows;
  int64_t panel = 0;
  for (; panel + kTilePanels <= panels; panel += kTilePanels) run_panels<kTilePanels>(product, sink, panel);
  for (; panel < panels; ++panel) run_panels<1>(product, sink, panel);
}

static void to_float(const PanelProduct& product, bool accumulate, float* out, int64_t out_stride) {
  run_product(product, FloatSink{accumulate, out, out_stride});
}

static void to_bfloat16(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride) {
  run_product(product, BFloat16Sink{bias, y, y_stride});
}

static void soften(const SoftmaxRow& row, const float* scores, int64_t visible, int64_t count,
                   BFloat16* weights) {
  const Vec scale = splat(row.scale);
  Vec best = splat(*row.maximum);
  for (int64_t j = 0; j < visible; j += kLanes) {
    const int64_t left = visible - j;
    const Vec score = load(scores + j) * scale;
    best = max_of(best, left >= kLanes ? score : first_lanes(score, left, -__builtin_inff()));
  }
  const float maximum = max_lane(best);
  const float rescale = exp_of(splat(*row.maximum - maximum))[0];
  Vec total{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t left = visible - j;
    Vec weight = exp_of(load(scores + j) * scale - maximum);
    if (left < kLanes) weight = first_lanes(weight, left, 0.0f);
    store(weights + j, weight);
    total += weight;
  }
  *row.maximum = maximum;
  *row.sum = *row.sum * rescale + sum(total);
  for (int64_t i = 0; i < row.d; i += kLanes) store(row.out + i, load(row.out + i) * rescale);
}

static void scale_to_bfloat16(const float* x, float scale, int64_t n, BFloat16* y) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i) * scale);
}

extern const PanelKernels kPanelKernels = {to_float, to_bfloat16, soften, scale_to_bfloat16};

}  // namespace level_avx512_bf16
}  // namespace modeltorch
#endif
