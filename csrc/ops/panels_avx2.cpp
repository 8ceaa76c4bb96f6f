// Panels without bfloat16 products: pairs are widened to floats as they are read, 5 rows by a panel at a time
// with all sums in registers. A weight is widened once for five rows, and memory gives half the bytes that
// floats would take. The rows of a tile are widened once for all panels.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ops/panels.h"

#define MODELTORCH_LANES 8
#pragma GCC target("avx2,fma")

namespace modeltorch {
namespace level_avx2 {
namespace {

#include "ops/vec.h"

constexpr int64_t kTileRows = 5;
constexpr int64_t kWideSummands = 5120;                 // of a tile's rows that are floats at a time
constexpr int64_t kRowPanels = 4;                       // of one row at a time
constexpr int64_t kPassPanels = 4;                      // that all rows pass before the next ones
constexpr int64_t kVecs = kPanelRows / kLanes;          // of a panel
constexpr int64_t kPrefetchElements = 32 * kPanelRows;  // how far ahead weights are asked of the memory

Vec add_product(Vec sum, Vec a, Vec b) {
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                               reinterpret_cast<__m256>(sum)));
}

// The first and the second values of pairs.
struct Pairs {
  Vec even;
  Vec odd;

  explicit Pairs(VecBits words)
      : even(reinterpret_cast<Vec>(words << 16)), odd(reinterpret_cast<Vec>(words & 0xffff0000u)) {}
};

Pairs load_pairs(const BFloat16* p) {
  VecBits words;
  __builtin_memcpy(&words, p, sizeof(words));
  return Pairs(words);
}

// One pair, in every lane.
Pairs spread_pair(const BFloat16* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return Pairs(word - VecBits{});
}

// Rows of a as floats, so that a value reaches all lanes by a load alone; 100 KiB of the thread's stack.
struct WideRows {
  alignas(32) float values[kTileRows * kWideSummands];

  // Summands [from, from + count) of `rows` rows from `row` on.
  void fill(const PanelProduct& product, int64_t row, int64_t rows, int64_t from, int64_t count) {
    for (int64_t r = 0; r < rows; ++r) {
      const BFloat16* a = product.a + (row + r) * product.a_stride + from;
      float* to = values + r * kWideSummands;
      int64_t k = 0;
      for (; k + kLanes <= count; k += kLanes) store(to + k, load(a + k));
      for (; k < count; ++k) to[k] = static_cast<float>(a[k]);
    }
  }
};

// R wide rows against summands [from, from + count) of a panel, all sums in registers.
template <int64_t R>
inline void multiply_tile(const PanelProduct& product, const WideRows& wide, bool is_first, int64_t panel,
                          int64_t from, int64_t count, Vec (&acc)[R][kVecs]) {
  const BFloat16* w = product.panels + panel * product.panel_stride + from * kPanelRows;
  Vec sums[R][kVecs];  // apart from acc, which the compiler would keep in memory
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < kVecs; ++v) sums[r][v] = acc[r][v];
  }
  for (int64_t k = 0; k < count; k += 2, w += 2 * kPanelRows) {
    if (is_first) __builtin_prefetch(w + kPrefetchElements);
    // One half of the pairs after the other: fewer values at a time, so that registers suffice.
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      Vec weights[kVecs];
      for (int64_t v = 0; v < kVecs; ++v) {
        const Pairs pairs = load_pairs(w + 2 * v * kLanes);
        weights[v] = half == 0 ? pairs.even : pairs.odd;
      }
      for (int64_t r = 0; r < R; ++r) {
        // By name: what the compiler makes of a float in all lanes needs a register more.
        const auto value =
            reinterpret_cast<Vec>(_mm256_broadcast_ss(wide.values + r * kWideSummands + k + half));
        for (int64_t v = 0; v < kVecs; ++v) sums[r][v] = add_product(sums[r][v], weights[v], value);
      }
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < kVecs; ++v) acc[r][v] = sums[r][v];
  }
}

template <int64_t R, int64_t P>
inline void load_sums(const PanelProduct& product, int64_t row, int64_t panel, Vec (&acc)[R][P * kVecs]) {
  for (int64_t r = 0; r < R; ++r) {
    const float* from = product.sums + (row + r) * product.sums_stride + panel * kPanelRows;
    for (int64_t v = 0; v < P * kVecs; ++v)
      acc[r][v] = product.sums == nullptr ? Vec{} : load(from + v * kLanes);
  }
}

struct FloatSink {
  static constexpr int64_t kStep = 1;  // panels that it needs together
  float* out;
  int64_t stride;

  template <int64_t R, int64_t P>
  void finish(const PanelProduct&, int64_t row, int64_t panel, const Vec (&acc)[R][P * kVecs]) const {
    for (int64_t r = 0; r < R; ++r) {
      float* to = out + (row + r) * stride + panel * kPanelRows;
      for (int64_t v = 0; v < P * kVecs; ++v) store(to + v * kLanes, acc[r][v]);
    }
  }
};

struct BFloat16Sink {
  static constexpr int64_t kStep = 1;
  const BFloat16* bias;
  BFloat16* y;
  int64_t stride;

  template <int64_t R, int64_t P>
  void finish(const PanelProduct& product, int64_t row, int64_t panel, const Vec (&acc)[R][P * kVecs]) const {
    for (int64_t v = 0; v < P * kVecs; ++v) {
      const int64_t column = panel * kPanelRows + v * kLanes;
      const int64_t left = product.n - column;
      if (left <= 0) break;
      Vec shift{};
      if (bias != nullptr) shift = left >= kLanes ? load(bias + column) : load_some(bias + column, left);
      for (int64_t r = 0; r < R; ++r) {
        BFloat16* to = y + (row + r) * stride + column;
        if (left >= kLanes) {
          store(to, acc[r][v] + shift);
        } else {
          store_some(to, acc[r][v] + shift, left);
        }
      }
    }
  }
};

// silu(gate) * up. Where exp(-gate) is no longer finite, silu is 0.
inline Vec swiglu_of(Vec gate, Vec up) {
  const Vec silu = gate / (exp_of(-gate) + 1.0f);
  return (gate < splat(-88.0f) ? Vec{} : silu) * up;
}

struct SwiGluSink {
  static constexpr int64_t kStep = 2;
  BFloat16* y;
  int64_t stride;

  template <int64_t R, int64_t P>
  void finish(const PanelProduct&, int64_t row, int64_t panel, const Vec (&acc)[R][P * kVecs]) const {
    for (int64_t r = 0; r < R; ++r) {
      BFloat16* to = y + (row + r) * stride + panel / 2 * kPanelRows;
      for (int64_t p = 0; p < P; p += 2, to += kPanelRows) {
        const Vec* gate = acc[r] + p * kVecs;
        for (int64_t v = 0; v < kVecs; ++v) store(to + v * kLanes, swiglu_of(gate[v], gate[kVecs + v]));
      }
    }
  }
};

// One row, whose pairs are spread as they are read: it waits for memory alone.
template <int64_t P, class Sink>
inline void run_row(const PanelProduct& product, const Sink& sink, int64_t panel) {
  Vec acc[1][P * kVecs];
  load_sums<1, P>(product, 0, panel, acc);
  const BFloat16* w = product.panels + panel * product.panel_stride;
  for (int64_t k = 0; k < product.k; k += 2) {
    const Pairs values = spread_pair(product.a + k);
    for (int64_t p = 0; p < P; ++p) {
      const BFloat16* pairs = w + p * product.panel_stride + k * kPanelRows;
      __builtin_prefetch(pairs + kPrefetchElements);
      for (int64_t v = 0; v < kVecs; ++v) {
        const Pairs weights = load_pairs(pairs + 2 * v * kLanes);
        Vec& sum = acc[0][p * kVecs + v];
        sum = add_product(add_product(sum, weights.even, values.even), weights.odd, values.odd);
      }
    }
  }
  sink.template finish<1, P>(product, 0, panel, acc);
}

// R rows from `row` on and panels [begin, end), as many at a time as the sink needs together.
template <int64_t R, class Sink>
inline void run_rows(const PanelProduct& product, const Sink& sink, int64_t row, int64_t begin, int64_t end,
                     WideRows& wide) {
  constexpr int64_t kStep = Sink::kStep;
  const bool is_whole = product.k <= kWideSummands;
  if (is_whole) wide.fill(product, row, R, 0, product.k);
  for (int64_t panel = begin; panel < end; panel += kStep) {
    Vec acc[R][kStep * kVecs];
    for (int64_t part = 0; part < kStep; ++part) {
      Vec sums[R][kVecs];
      load_sums<R, 1>(product, row, panel + part, sums);
      for (int64_t from = 0; from < product.k; from += kWideSummands) {
        const int64_t left = product.k - from, count = left < kWideSummands ? left : kWideSummands;
        if (!is_whole) wide.fill(product, row, R, from, count);
        multiply_tile<R>(product, wide, row == 0, panel + part, from, count, sums);
      }
      for (int64_t r = 0; r < R; ++r) {
        for (int64_t v = 0; v < kVecs; ++v) acc[r][part * kVecs + v] = sums[r][v];
      }
    }
    sink.template finish<R, kStep>(product, row, panel, acc);
  }
}

// The same for as many rows as there are, at most R.
template <int64_t R, class Sink>
inline void run_tile(const PanelProduct& product, const Sink& sink, int64_t row, int64_t rows, int64_t begin,
                     int64_t end, WideRows& wide) {
  if constexpr (R > 0) {
    if (rows == R) return run_rows<R>(product, sink, row, begin, end, wide);
    run_tile<R - 1>(product, sink, row, rows, begin, end, wide);
  }
}

template <class Sink>
inline void run_product(const PanelProduct& product, const Sink& sink) {
  const int64_t panels = (product.n + kPanelRows - 1) / kPanelRows;
  if (product.m == 1) {
    int64_t panel = 0;
    // Memory answers more streams faster.
    for (; panel + kRowPanels <= panels; panel += kRowPanels) run_row<kRowPanels>(product, sink, panel);
    for (; panel < panels; panel += Sink::kStep) run_row<Sink::kStep>(product, sink, panel);
    return;
  }
  WideRows wide;
  const int64_t tiles = (product.m + kTileRows - 1) / kTileRows;
  // Some panels with all rows, then the next ones, so that they come from memory once.
  for (int64_t panel = 0; panel < panels; panel += kPassPanels) {
    const int64_t end = panels - panel < kPassPanels ? panels : panel + kPassPanels;
    // Tiles of nearly equal height: one of a single row would use few of the registers.
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = product.m * tile / tiles;
      run_tile<kTileRows>(product, sink, row, product.m * (tile + 1) / tiles - row, panel, end, wide);
    }
  }
}

void to_float(const PanelProduct& product, float* out, int64_t out_stride) {
  run_product(product, FloatSink{out, out_stride});
}

void to_bfloat16(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride) {
  run_product(product, BFloat16Sink{bias, y, y_stride});
}

void to_swiglu(const PanelProduct& product, BFloat16* y, int64_t y_stride) {
  run_product(product, SwiGluSink{y, y_stride});
}

// The first `count` lanes of v (all, if there are no more; none, if count is below 1), and `other` in the
// rest.
inline Vec first_lanes(Vec v, int64_t count, float other) {
  const VecInt lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const auto end = static_cast<int32_t>(count < kLanes ? count : kLanes);
  return lane < end ? v : splat(other);
}

// weights[j] = exp(scale * scores[j] - maximum) for j < visible and 0 for the rest; returns their sum.
inline float weigh_scores(const float* scores, float scale, float maximum, int64_t visible, int64_t count,
                          BFloat16* weights) {
  Vec total{};
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec weight{};
    if (j < visible) weight = first_lanes(exp_of(load(scores + j) * scale - maximum), visible - j, 0.0f);
    store(weights + j, weight);
    total += weight;
  }
  return sum(total);
}

inline void soften_row(const SoftmaxStep& step, int64_t row) {
  const int64_t limit = step.first_visible + row / step.group;
  const int64_t visible = limit < 0 ? 0 : limit < step.count ? limit : step.count;
  const float* scores = step.scores + row * step.scores_stride;
  BFloat16* weights = step.weights + row * step.weights_stride;
  const float before = step.maxima[row];
  Vec best = splat(before);
  for (int64_t j = 0; j < visible; j += kLanes)
    best = max_of(best, first_lanes(load(scores + j) * step.scale, visible - j, -__builtin_inff()));
  const float maximum = visible == 0 ? before : max_lane(best);
  const float added = weigh_scores(scores, step.scale, maximum, visible, step.count, weights);
  if (maximum == before) {
    step.sums[row] += added;
    return;
  }
  const Vec rescale = exp_of(splat(before - maximum));
  step.maxima[row] = maximum;
  step.sums[row] = step.sums[row] * rescale[0] + added;
  float* out = step.out + row * step.d;
  for (int64_t i = 0; i < step.d; i += kLanes) store(out + i, load(out + i) * rescale);
}

void soften(const SoftmaxStep& step) {
  for (int64_t row = 0; row < step.rows; ++row) soften_row(step, row);
}

void scale_to_bfloat16(const float* x, float scale, int64_t n, BFloat16* y) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i) * scale);
}

void score_keys(const BFloat16* queries, int64_t rows, int64_t d, const BFloat16* keys, int64_t stride,
                int64_t count, float* scores, int64_t scores_stride) {
  constexpr int64_t kKeys = 4;
  for (int64_t first = 0; first < count; first += kKeys) {
    const int64_t group = count - first < kKeys ? count - first : kKeys;
    const BFloat16* key[kKeys];
    // Past the last key it is repeated: a row that was never written must not be read.
    for (int64_t j = 0; j < kKeys; ++j) key[j] = keys + (first + (j < group ? j : group - 1)) * stride;
    for (int64_t row = 0; row < rows; ++row) {
      Vec acc[kKeys] = {};
      for (int64_t at = 0; at < d; at += kLanes) {
        const Vec query = load(queries + row * d + at);
        for (int64_t j = 0; j < kKeys; ++j) acc[j] = add_product(acc[j], load(key[j] + at), query);
      }
      const Vec4 sums = sum_each(acc[0], acc[1], acc[2], acc[3]);
      for (int64_t j = 0; j < group; ++j) scores[row * scores_stride + first + j] = sums[j];
    }
  }
}

// R rows of weights, 16 columns of values.
template <int64_t R>
inline void weigh_tile(const BFloat16* weights, int64_t weights_stride, const BFloat16* values,
                       int64_t stride, int64_t count, float* out, int64_t d) {
  Vec acc[R][kVecs];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < kVecs; ++v) acc[r][v] = load(out + r * d + v * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    const Vec low = load(values + j * stride), high = load(values + j * stride + kLanes);
    for (int64_t r = 0; r < R; ++r) {
      const Vec weight = splat(static_cast<float>(weights[r * weights_stride + j]));
      acc[r][0] = add_product(acc[r][0], low, weight);
      acc[r][1] = add_product(acc[r][1], high, weight);
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < kVecs; ++v) store(out + r * d + v * kLanes, acc[r][v]);
  }
}

void weigh_values(const BFloat16* weights, int64_t weights_stride, int64_t rows, const BFloat16* values,
                  int64_t stride, int64_t count, float* out, int64_t d) {
  for (int64_t column = 0; column < d; column += kPanelRows) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      weigh_tile<4>(weights + row * weights_stride, weights_stride, values + column, stride, count,
                    out + row * d + column, d);
    }
    for (; row < rows; ++row) {
      weigh_tile<1>(weights + row * weights_stride, weights_stride, values + column, stride, count,
                    out + row * d + column, d);
    }
  }
}

}  // namespace

// A block of rows stays in a second-level cache of 512 KiB beside the panels that pass.
extern const PanelKernels kPanelKernels = {
    {.least_rows = 96, .most_rows = 192, .resident = 192 * 896, .summands = 5120},
    to_float,
    to_bfloat16,
    to_swiglu,
    soften,
    scale_to_bfloat16,
    score_keys,
    weigh_values};

}  // namespace level_avx2
}  // namespace modeltorch
#endif
