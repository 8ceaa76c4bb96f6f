// Panels on the tiles of AMX: 32 rows by 2 panels at a time, 32 summands a tile product.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ops/panels.h"

#define MODELTORCH_LANES 16
#define MODELTORCH_NATIVE_BFLOAT16
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma")

namespace modeltorch {

namespace level_avx512_bf16 {
extern const PanelKernels kPanelKernels;
}

namespace level_amx {
namespace {

#include "ops/vec.h"

constexpr int64_t kTileRows = 16;      // rows of a tile of a, and of its sums
constexpr int64_t kTileSummands = 32;  // bfloat16 values in a row of a tile
constexpr int64_t kBlockRows = 2 * kTileRows;
constexpr int64_t kBlockColumns = 2 * kPanelRows;

// The layout that ldtilecfg reads (Intel, "Intrinsics Guide", _tile_loadconfig).
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 1 are sums of the first rows with two panels, 2 and 3 of the rows after them; 4 and 5 rows of
// a, 6 and 7 panels.
class Tiles {
 public:
  Tiles() = default;
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Rows of the tiles of a and of their sums, 1 to 16 each.
  void configure(int64_t high, int64_t low) {
    if (high == high_ && low == low_) return;
    high_ = high;
    low_ = low;
    alignas(64) TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_high = tile == 0 || tile == 1 || tile == 4;
      const bool is_low = tile == 2 || tile == 3 || tile == 5;
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(is_high ? high : is_low ? low : kTileRows);
    }
    // Not _tile_loadconfig: some versions of GCC's tell the compiler that 8 bytes are read, of 64.
    __asm__ volatile("ldtilecfg\t%0" : : "m"(config));
  }

 private:
  int64_t high_ = 0;
  int64_t low_ = 0;
};

// The compiler does not know what tiles read: what plain code wrote before is in memory here, and what it
// writes after this is not there yet.
inline void settle_memory() {
  __asm__ volatile("" : : : "memory");
}

// Lines of two panels to be asked of the memory, a few at a time.
struct Ahead {
  const BFloat16* panels = nullptr;
  int64_t panel_stride = 0;
  int64_t at = 0;
  int64_t end = 0;
  int64_t lines = 0;  // of each panel at a time

  void ask() {
    constexpr int64_t kLine = 32;
    for (int64_t line = 0; line < lines && at < end; ++line, at += kLine) {
      _mm_prefetch(panels + at, _MM_HINT_T1);
      _mm_prefetch(panels + panel_stride + at, _MM_HINT_T1);
    }
  }
};

template <int P, bool kLow>
inline void load_sums(const float* from, int64_t stride) {
  const int64_t bytes = stride * 4;
  _tile_loadd(0, from, bytes);
  if constexpr (P == 2) _tile_loadd(1, from + kPanelRows, bytes);
  if constexpr (kLow) _tile_loadd(2, from + kTileRows * stride, bytes);
  if constexpr (kLow && P == 2) _tile_loadd(3, from + kTileRows * stride + kPanelRows, bytes);
}

template <int P, bool kLow>
inline void store_sums(float* to, int64_t stride) {
  const int64_t bytes = stride * 4;
  _tile_stored(0, to, bytes);
  if constexpr (P == 2) _tile_stored(1, to + kPanelRows, bytes);
  if constexpr (kLow) _tile_stored(2, to + kTileRows * stride, bytes);
  if constexpr (kLow && P == 2) _tile_stored(3, to + kTileRows * stride + kPanelRows, bytes);
}

// The summands past the last whole tile, at most 15 pairs, with the dot products of AVX-512.
inline Vec add_last_pairs(const PanelProduct& product, Vec sum, int64_t row, int64_t panel) {
  const BFloat16* w = product.panels + panel * product.panel_stride;
  for (int64_t k = product.k / kTileSummands * kTileSummands; k < product.k; k += 2) {
    int pair;
    __builtin_memcpy(&pair, product.a + row * product.a_stride + k, sizeof(pair));
    sum = reinterpret_cast<Vec>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + k * kPanelRows)),
        reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))));
  }
  return sum;
}

// Tiles of sums are turned into results a few rows at a time while the next block is multiplied: the vectors
// of a core have nothing to do then.
template <class Sink>
class Results {
 public:
  Results(const PanelProduct& product, const Sink& sink) : product_(product), sink_(sink) {}

  // Takes the tiles of sums of a block.
  template <int P, bool kLow>
  void take(int64_t row, int64_t panel) {
    write(left_);
    float* sums = buffers_[which_];
    which_ ^= 1;
    store_sums<P, kLow>(sums, kBlockColumns);
    sums_ = sums;
    left_ = product_.m - row < kBlockRows ? product_.m - row : kBlockRows;
    row_ = row;
    panel_ = panel;
    panels_ = P;
    columns_ = sink_.columns(product_, panel);
  }

  // Writes the next rows, at most `rows`.
  void write(int64_t rows) {
    for (; rows > 0 && left_ > 0; --rows, --left_, ++row_, sums_ += kBlockColumns) {
      Vec first = load(sums_);
      Vec second = panels_ == 2 ? load(sums_ + kPanelRows) : Vec{};
      if (product_.k % kTileSummands != 0) {
        first = add_last_pairs(product_, first, row_, panel_);
        if (panels_ == 2) second = add_last_pairs(product_, second, row_, panel_ + 1);
      }
      sink_.write(row_, columns_, first, second);
    }
  }

  void write_rest() { write(left_); }

 private:
  alignas(64) float buffers_[2][kBlockRows * kBlockColumns];
  const PanelProduct& product_;
  const Sink& sink_;
  typename Sink::Columns columns_{};
  const float* sums_ = nullptr;
  int64_t which_ = 0;
  int64_t row_ = 0;
  int64_t left_ = 0;
  int64_t panel_ = 0;
  int64_t panels_ = 0;
};

struct BFloat16Sink {
  struct Columns {
    int64_t first;
    __mmask32 mask;
    Vec low;  // bias
    Vec high;
  };

  const BFloat16* bias;
  BFloat16* y;
  int64_t stride;

  inline Columns columns(const PanelProduct& product, int64_t panel) const {
    const int64_t first = panel * kPanelRows;
    const int64_t left = product.n - first;
    const auto mask = static_cast<__mmask32>(left >= kBlockColumns ? ~0u : (1u << left) - 1);
    const __m512i bits =
        bias == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, bias + first);
    return {first, mask, widen(reinterpret_cast<VecHalf>(_mm512_castsi512_si256(bits))),
            widen(reinterpret_cast<VecHalf>(_mm512_extracti64x4_epi64(bits, 1)))};
  }

  inline void write(int64_t row, const Columns& columns, Vec first, Vec second) const {
    const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
        reinterpret_cast<__m512>(second + columns.high), reinterpret_cast<__m512>(first + columns.low)));
    _mm512_mask_storeu_epi16(y + row * stride + columns.first, columns.mask, rounded);
  }
};

struct SwiGluSink {
  struct Columns {
    int64_t first;
  };

  BFloat16* y;
  int64_t stride;

  inline Columns columns(const PanelProduct&, int64_t panel) const { return {panel / 2 * kPanelRows}; }

  inline void write(int64_t row, const Columns& columns, Vec gate, Vec up) const {
    store(y + row * stride + columns.first, swiglu_of(gate, up));
  }
};

// Results that are the tiles of sums themselves.
class FloatResults {
 public:
  FloatResults(const PanelProduct& product, float* out, int64_t stride)
      : product_(product), out_(out), stride_(stride) {}

  template <int P, bool kLow>
  void take(int64_t row, int64_t panel) {
    store_sums<P, kLow>(out_ + row * stride_ + panel * kPanelRows, stride_);
    if (product_.k % kTileSummands == 0) return;
    const int64_t end = product_.m < row + kBlockRows ? product_.m : row + kBlockRows;
    for (; row < end; ++row) {
      for (int64_t p = panel; p < panel + P; ++p) {
        float* to = out_ + row * stride_ + p * kPanelRows;
        store(to, add_last_pairs(product_, load(to), row, p));
      }
    }
  }

  void write(int64_t) {}
  void write_rest() {}

 private:
  const PanelProduct& product_;
  float* out_;
  int64_t stride_;
};

// The tiles of sums += up to 32 rows of a with one or two panels, over the whole tiles of k.
template <int P, bool kLow, class Out>
inline void multiply(const PanelProduct& product, int64_t row, int64_t panel, Ahead& ahead, Out& out) {
  const bool has_tiles = product.tiles != nullptr;
  const int64_t a_bytes = has_tiles ? 64 : product.a_stride * 2;
  const int64_t a_step = has_tiles ? kTileRows * kTileSummands : kTileSummands;
  const BFloat16* a =
      has_tiles ? product.tiles + row / kTileRows * product.tiles_stride : product.a + row * product.a_stride;
  const BFloat16* low = a + (has_tiles ? product.tiles_stride : kTileRows * product.a_stride);
  const BFloat16* w = product.panels + panel * product.panel_stride;
  const int64_t tiles = product.k / kTileSummands;
  const int64_t rows_a_tile = tiles > 0 ? (kBlockRows + tiles - 1) / tiles : 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    // Panels come from the second-level cache for every block of rows: the hint keeps them from driving the
    // rows out of the first (5 to 12 % of a prefill on a Xeon of 2023).
    _tile_stream_loadd(6, w, 64);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P == 2) {
      _tile_stream_loadd(7, w + product.panel_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kLow) {
      _tile_loadd(5, low, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (P == 2) _tile_dpbf16ps(3, 5, 7);
    }
    a += a_step;
    low += a_step;
    w += kTileSummands * kPanelRows;
    ahead.ask();
    out.write(rows_a_tile);
  }
}

template <int P, bool kLow, class Out>
inline void run_block(const PanelProduct& product, Out& out, int64_t row, int64_t panel, Ahead& ahead) {
  if (product.sums != nullptr) {
    load_sums<P, kLow>(product.sums + row * product.sums_stride + panel * kPanelRows, product.sums_stride);
  } else {
    _tile_zero(0);
    if constexpr (P == 2) _tile_zero(1);
    if constexpr (kLow) _tile_zero(2);
    if constexpr (kLow && P == 2) _tile_zero(3);
  }
  multiply<P, kLow>(product, row, panel, ahead, out);
  out.template take<P, kLow>(row, panel);
}

template <int P, class Out>
inline void run_rows(const PanelProduct& product, Out& out, int64_t panel, int64_t row, int64_t end,
                     Tiles& tiles, Ahead ahead) {
  for (; row < end; row += kBlockRows) {
    const int64_t rows = end - row < kBlockRows ? end - row : kBlockRows;
    if (rows > kTileRows) {
      tiles.configure(kTileRows, rows - kTileRows);
      run_block<P, true>(product, out, row, panel, ahead);
    } else {
      tiles.configure(rows, kTileRows);
      run_block<P, false>(product, out, row, panel, ahead);
    }
  }
}

// Two panels with all rows, then the next two; of few rows, 32 rows with all panels, so that the rows stay in
// the nearest cache while the panels pass through.
constexpr int64_t kStreamedRows = 2 * kBlockRows;

template <class Out>
inline void run_product(const PanelProduct& product, Out& out) {
  settle_memory();
  Tiles tiles;
  const int64_t panels = (product.n + kPanelRows - 1) / kPanelRows;
  const int64_t together = product.m <= kStreamedRows ? kBlockRows : product.m;
  for (int64_t row = 0; row < product.m; row += together) {
    const int64_t end = product.m - row < together ? product.m : row + together;
    const int64_t blocks = (end - row + kBlockRows - 1) / kBlockRows;
    for (int64_t panel = 0; panel < panels; panel += 2) {
      Ahead ahead{.panel_stride = product.panel_stride, .end = product.k * kPanelRows};
      if (row == 0) {
        ahead.panels =
            panel + 4 <= panels ? product.panels + (panel + 2) * product.panel_stride : product.next;
      }
      ahead.lines = ahead.panels == nullptr ? 0 : (kTileRows + blocks - 1) / blocks;
      if (panels - panel >= 2) {
        run_rows<2>(product, out, panel, row, end, tiles, ahead);
      } else {
        run_rows<1>(product, out, panel, row, end, tiles, ahead);
      }
    }
  }
  out.write_rest();
}

// For fewer rows the dot products of AVX-512 keep up with the memory; with 8 they reach two thirds of it.
constexpr int64_t kFewestRows = 5;

// What few rows multiply comes from memory: here it pays to ask for it early, for one row too.
PanelProduct asking_ahead(PanelProduct product) {
  product.asks_ahead = true;
  return product;
}

void to_float(const PanelProduct& product, float* out, int64_t out_stride) {
  if (product.m < kFewestRows) return level_avx512_bf16::kPanelKernels.to_float(product, out, out_stride);
  FloatResults results(product, out, out_stride);
  run_product(product, results);
}

void to_bfloat16(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride) {
  if (product.m < kFewestRows)
    return level_avx512_bf16::kPanelKernels.to_bfloat16(asking_ahead(product), bias, y, y_stride);
  const BFloat16Sink sink{bias, y, y_stride};
  Results<BFloat16Sink> results(product, sink);
  run_product(product, results);
}

void to_swiglu(const PanelProduct& product, BFloat16* y, int64_t y_stride) {
  if (product.m < kFewestRows)
    return level_avx512_bf16::kPanelKernels.to_swiglu(asking_ahead(product), y, y_stride);
  const SwiGluSink sink{y, y_stride};
  Results<SwiGluSink> results(product, sink);
  run_product(product, results);
}

// What attention of few queries multiplies is not packed: keys are rows of a tile as they lie, so that their
// scores come out transposed, and values are paired on the way.
constexpr int64_t kMostQueries = 16;
constexpr int64_t kMostHeadSize = 256;
constexpr int64_t kTileColumns = 16;

// scores[r][j] of up to 32 keys from tiles 0 and 2, which hold [key][query].
inline void transpose_scores(int64_t rows, int64_t count, float* scores, int64_t scores_stride) {
  alignas(64) float sums[kBlockRows * kTileColumns];
  _tile_stored(0, sums, 64);
  if (count > kTileRows) _tile_stored(2, sums + kTileRows * kTileColumns, 64);
  const VecInt lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto at = reinterpret_cast<__m512i>(lanes * static_cast<int32_t>(kTileColumns));
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto column =
          reinterpret_cast<Vec>(_mm512_i32gather_ps(at, sums + first * kTileColumns + row, sizeof(float)));
      float* to = scores + row * scores_stride + first;
      if (count - first >= kLanes) {
        store(to, column);
      } else {
        store_some(to, column, count - first);
      }
    }
  }
}

void score_keys(const BFloat16* queries, int64_t rows, int64_t d, const BFloat16* keys, int64_t stride,
                int64_t count, float* scores, int64_t scores_stride) {
  if (rows > kMostQueries || d % kTileSummands != 0 || d > kMostHeadSize) {
    return level_avx512_bf16::kPanelKernels.score_keys(queries, rows, d, keys, stride, count, scores,
                                                       scores_stride);
  }
  alignas(64) BFloat16 panel[kMostHeadSize * kPanelRows];
  __builtin_memset(panel, 0, static_cast<size_t>(d * kPanelRows) * sizeof(BFloat16));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < d; k += 2)
      __builtin_memcpy(panel + k * kPanelRows + 2 * row, queries + row * d + k, 2 * sizeof(BFloat16));
  }
  settle_memory();
  Tiles tiles;
  for (int64_t first = 0; first < count; first += kBlockRows) {
    const int64_t some = count - first < kBlockRows ? count - first : kBlockRows;
    const bool has_low = some > kTileRows;
    tiles.configure(has_low ? kTileRows : some, has_low ? some - kTileRows : kTileRows);
    const BFloat16* key = keys + first * stride;
    _tile_zero(0);
    if (has_low) _tile_zero(2);
    for (int64_t k = 0; k < d; k += kTileSummands) {
      _tile_loadd(6, panel + k * kPanelRows, 64);
      _tile_loadd(4, key + k, stride * 2);
      _tile_dpbf16ps(0, 4, 6);
      if (!has_low) continue;
      _tile_loadd(5, key + kTileRows * stride + k, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
    transpose_scores(rows, some, scores + first, scores_stride);
  }
}

// Panels of four times 16 columns of up to 32 values; zeros past the last one.
inline void pair_columns(const BFloat16* values, int64_t stride, int64_t count, BFloat16* panels) {
  for (int64_t j = 0; j < kTileSummands; j += 2) {
    for (int64_t panel = 0; panel < 4; ++panel) {
      const __m512i pairs = j < count ? reinterpret_cast<__m512i>(pair_values(
                                            values + j * stride + panel * kPanelRows, stride, j + 1 < count))
                                      : _mm512_setzero_si512();
      _mm512_storeu_si512(panels + (panel * kTileSummands + j) * kPanelRows, pairs);
    }
  }
}

void weigh_values(const BFloat16* weights, int64_t weights_stride, int64_t rows, const BFloat16* values,
                  int64_t stride, int64_t count, float* out, int64_t d) {
  constexpr int64_t kColumns = 4 * kPanelRows;
  if (rows > kMostQueries || d % kColumns != 0) {
    return level_avx512_bf16::kPanelKernels.weigh_values(weights, weights_stride, rows, values, stride, count,
                                                         out, d);
  }
  alignas(64) BFloat16 panels[kColumns * kTileSummands];
  settle_memory();
  Tiles tiles;
  tiles.configure(rows, rows);
  for (int64_t column = 0; column < d; column += kColumns) {
    float* to = out + column;
    _tile_loadd(0, to, d * 4);
    _tile_loadd(1, to + kPanelRows, d * 4);
    _tile_loadd(2, to + 2 * kPanelRows, d * 4);
    _tile_loadd(3, to + 3 * kPanelRows, d * 4);
    for (int64_t first = 0; first < count; first += kTileSummands) {
      pair_columns(values + first * stride + column, stride, count - first, panels);
      settle_memory();
      _tile_loadd(4, weights + first, weights_stride * 2);
      _tile_loadd(6, panels, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panels + kPanelRows * kTileSummands, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, panels + 2 * kPanelRows * kTileSummands, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, panels + 3 * kPanelRows * kTileSummands, 64);
      _tile_dpbf16ps(3, 4, 7);
      settle_memory();
    }
    _tile_stored(0, to, d * 4);
    _tile_stored(1, to + kPanelRows, d * 4);
    _tile_stored(2, to + 2 * kPanelRows, d * 4);
    _tile_stored(3, to + 3 * kPanelRows, d * 4);
  }
}

// What does not multiply whole tiles is that of the level below. A block of rows is 896 KiB of a second-level
// cache of 2 MiB; shorter sums, whose panels would fit the first, cost more in sums than they save. Of 32
// rows 28 KiB stay in the first, of 48.
PanelKernels make_kernels() {
  PanelKernels kernels = level_avx512_bf16::kPanelKernels;
  kernels.blocking = {.least_rows = 256,
                      .most_rows = 512,
                      .resident = 512 * 896,
                      .summands = 896,
                      .streamed_rows = kStreamedRows,
                      .streamed_summands = 448,
                      .tiles_columns = 1024};
  kernels.to_float = to_float;
  kernels.to_bfloat16 = to_bfloat16;
  kernels.score_keys = score_keys;
  kernels.weigh_values = weigh_values;
  kernels.to_swiglu = to_swiglu;
  return kernels;
}

}  // namespace

const PanelKernels& panel_kernels() {
  static const PanelKernels kernels = make_kernels();
  return kernels;
}

}  // namespace level_amx
}  // namespace modeltorch
#endif
