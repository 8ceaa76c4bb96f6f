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

// The tiles of sums += up to 32 rows of a with one or two panels, over the whole tiles of k.
template <int P, bool kLow>
inline void multiply(const PanelProduct& product, int64_t row, int64_t panel, Ahead& ahead) {
  const BFloat16* a = product.a + row * product.a_stride;
  const BFloat16* low = a + kTileRows * product.a_stride;
  const BFloat16* w = product.panels + panel * product.panel_stride;
  const int64_t a_bytes = product.a_stride * 2;
  const int64_t whole_k = product.k / kTileSummands * kTileSummands;
  for (int64_t k = 0; k < whole_k; k += kTileSummands) {
    // Panels come from the second-level cache for every block of rows: the hint keeps them from driving the
    // rows out of the first (8 to 12 % of a product of 128 to 2048 rows on a Xeon of 2023).
    _tile_stream_loadd(6, w + k * kPanelRows, 64);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P == 2) {
      _tile_stream_loadd(7, w + product.panel_stride + k * kPanelRows, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kLow) {
      _tile_loadd(5, low + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (P == 2) _tile_dpbf16ps(3, 5, 7);
    }
    ahead.ask();
  }
}

template <int P, bool kLow, class Sink>
inline void run_block(const PanelProduct& product, const Sink& sink, int64_t row, int64_t panel,
                      Ahead& ahead) {
  if (product.sums != nullptr) {
    load_sums<P, kLow>(product.sums + row * product.sums_stride + panel * kPanelRows, product.sums_stride);
  } else {
    _tile_zero(0);
    if constexpr (P == 2) _tile_zero(1);
    if constexpr (kLow) _tile_zero(2);
    if constexpr (kLow && P == 2) _tile_zero(3);
  }
  multiply<P, kLow>(product, row, panel, ahead);
  sink.template finish<P, kLow>(product, row, panel);
}

template <int P, class Sink>
inline void run_panels(const PanelProduct& product, const Sink& sink, int64_t panel, Tiles& tiles,
                       Ahead ahead) {
  for (int64_t row = 0; row < product.m; row += kBlockRows) {
    const int64_t rows = product.m - row < kBlockRows ? product.m - row : kBlockRows;
    if (rows > kTileRows) {
      tiles.configure(kTileRows, rows - kTileRows);
      run_block<P, true>(product, sink, row, panel, ahead);
    } else {
      tiles.configure(rows, kTileRows);
      run_block<P, false>(product, sink, row, panel, ahead);
    }
  }
}

template <class Sink>
inline void run_product(const PanelProduct& product, const Sink& sink) {
  // What plain code wrote must be in memory: the compiler does not know what tiles read.
  __asm__ volatile("" : : : "memory");
  Tiles tiles;
  const int64_t panels = (product.n + kPanelRows - 1) / kPanelRows;
  const int64_t blocks = (product.m + kBlockRows - 1) / kBlockRows;
  for (int64_t panel = 0; panel < panels; panel += 2) {
    Ahead ahead{.panel_stride = product.panel_stride, .end = product.k * kPanelRows};
    ahead.panels = panel + 4 <= panels ? product.panels + (panel + 2) * product.panel_stride : product.next;
    ahead.lines = ahead.panels == nullptr ? 0 : (kTileRows + blocks - 1) / blocks;
    if (panels - panel >= 2) {
      run_panels<2>(product, sink, panel, tiles, ahead);
    } else {
      run_panels<1>(product, sink, panel, tiles, ahead);
    }
  }
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

struct FloatSink {
  float* out;
  int64_t stride;

  template <int P, bool kLow>
  inline void finish(const PanelProduct& product, int64_t row, int64_t panel) const {
    store_sums<P, kLow>(out + row * stride + panel * kPanelRows, stride);
    if (product.k % kTileSummands == 0) return;
    const int64_t end = product.m < row + kBlockRows ? product.m : row + kBlockRows;
    for (; row < end; ++row) {
      for (int64_t p = panel; p < panel + P; ++p) {
        float* to = out + row * stride + p * kPanelRows;
        store(to, add_last_pairs(product, load(to), row, p));
      }
    }
  }
};

// Calls use(row, the sums of the row with the first panel, and with the second) for the rows of a block.
template <int P, bool kLow, class Use>
inline void each_row(const PanelProduct& product, int64_t row, int64_t panel, const Use& use) {
  alignas(64) float sums[kBlockRows * kBlockColumns];
  store_sums<P, kLow>(sums, kBlockColumns);
  const int64_t rows = product.m - row < kBlockRows ? product.m - row : kBlockRows;
  const bool is_whole = product.k % kTileSummands == 0;
  for (int64_t r = 0; r < rows; ++r) {
    Vec first = load(sums + r * kBlockColumns);
    Vec second = P == 2 ? load(sums + r * kBlockColumns + kPanelRows) : Vec{};
    if (!is_whole) {
      first = add_last_pairs(product, first, row + r, panel);
      if constexpr (P == 2) second = add_last_pairs(product, second, row + r, panel + 1);
    }
    use(row + r, first, second);
  }
}

struct BFloat16Sink {
  const BFloat16* bias;
  BFloat16* y;
  int64_t stride;

  template <int P, bool kLow>
  inline void finish(const PanelProduct& product, int64_t row, int64_t panel) const {
    const int64_t column = panel * kPanelRows;
    const int64_t left = product.n - column;
    const auto mask = static_cast<__mmask32>(left >= kBlockColumns ? ~0u : (1u << left) - 1);
    const __m512i bits =
        bias == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, bias + column);
    const Vec low = widen(reinterpret_cast<VecHalf>(_mm512_castsi512_si256(bits)));
    const Vec high = widen(reinterpret_cast<VecHalf>(_mm512_extracti64x4_epi64(bits, 1)));
    each_row<P, kLow>(product, row, panel, [&](int64_t at, Vec first, Vec second) {
      const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
          reinterpret_cast<__m512>(second + high), reinterpret_cast<__m512>(first + low)));
      _mm512_mask_storeu_epi16(y + at * stride + column, mask, rounded);
    });
  }
};

struct SwiGluSink {
  BFloat16* y;
  int64_t stride;

  template <int P, bool kLow>
  inline void finish(const PanelProduct& product, int64_t row, int64_t panel) const {
    each_row<P, kLow>(product, row, panel, [&](int64_t at, Vec gate, Vec up) {
      store(y + at * stride + panel / 2 * kPanelRows, swiglu_of(gate, up));
    });
  }
};

// For fewer rows the dot products of AVX-512 keep up with the memory; with 8 they reach two thirds of it.
constexpr int64_t kFewestRows = 5;

void to_float(const PanelProduct& product, float* out, int64_t out_stride) {
  if (product.m < kFewestRows) return level_avx512_bf16::kPanelKernels.to_float(product, out, out_stride);
  run_product(product, FloatSink{out, out_stride});
}

void to_bfloat16(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride) {
  if (product.m < kFewestRows)
    return level_avx512_bf16::kPanelKernels.to_bfloat16(product, bias, y, y_stride);
  run_product(product, BFloat16Sink{bias, y, y_stride});
}

void to_swiglu(const PanelProduct& product, BFloat16* y, int64_t y_stride) {
  if (product.m < kFewestRows) return level_avx512_bf16::kPanelKernels.to_swiglu(product, y, y_stride);
  run_product(product, SwiGluSink{y, y_stride});
}

// What does not multiply whole tiles is that of the level below. A block of rows is 896 KiB of a second-level
// cache of 2 MiB; shorter sums, whose panels would fit the first, cost more in sums than they save.
PanelKernels make_kernels() {
  PanelKernels kernels = level_avx512_bf16::kPanelKernels;
  kernels.blocking = {.least_rows = 256, .most_rows = 512, .resident = 512 * 896, .summands = 896};
  kernels.to_float = to_float;
  kernels.to_bfloat16 = to_bfloat16;
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
