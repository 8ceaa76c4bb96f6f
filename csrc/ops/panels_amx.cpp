// Panels on the tiles of AMX: 32 rows by 2 panels at a time, 32 summands a tile product.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "ops/panels.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own intrinsics
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma")

namespace modeltorch {

namespace level_avx512_bf16 {
extern const PanelKernels kPanelKernels;
}

namespace level_amx {
namespace {

constexpr int64_t kTileRows = 16;      // rows of a tile of a, and of its sums
constexpr int64_t kTileSummands = 32;  // bfloat16 values in a row of a tile

// The layout that ldtilecfg reads (Intel, "Intrinsics Guide", _tile_loadconfig).
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 rows of a, 6 and 7 panels; `low` rows in the second half of a.
inline void configure(int64_t high, int64_t low) {
  alignas(64) TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool is_high = tile == 0 || tile == 1 || tile == 4;
    const bool is_low = tile == 2 || tile == 3 || tile == 5;
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(is_high ? high : is_low ? low : kTileRows);
  }
  _tile_loadconfig(&config);
}

// sums [32, 32] of up to 32 rows with two panels (the second may be the first again when there is only one).
inline void multiply(const PanelProduct& product, int64_t row, const BFloat16* first, const BFloat16* second,
                     int64_t whole_k, bool has_low, float* sums) {
  const BFloat16* a = product.a + row * product.a_stride;
  const int64_t a_bytes = product.a_stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  if (has_low) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < whole_k; k += kTileSummands) {
    _tile_stream_loadd(6, first + k * kPanelRows, 64);
    _tile_stream_loadd(7, second + k * kPanelRows, 64);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (has_low) {
      _tile_loadd(5, a + kTileRows * product.a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t kStride = 2 * kPanelRows;
  _tile_stored(0, sums, kStride * 4);
  _tile_stored(1, sums + kPanelRows, kStride * 4);
  if (has_low) {
    _tile_stored(2, sums + kTileRows * kStride, kStride * 4);
    _tile_stored(3, sums + kTileRows * kStride + kPanelRows, kStride * 4);
  }
}

// Calls use(sums, row, rows, panel, panels) for every block of at most 32 rows and 2 panels.
template <class Use>
inline void each_block(const PanelProduct& product, const Use& use) {
  const int64_t panels = (product.n + kPanelRows - 1) / kPanelRows;
  const int64_t whole_k = product.k / kTileSummands * kTileSummands;
  alignas(64) float sums[4 * kTileRows * kPanelRows];
  int64_t configured_high = 0, configured_low = 0;
  for (int64_t panel = 0; panel < panels; panel += 2) {
    const int64_t count = panels - panel < 2 ? 1 : 2;
    const BFloat16* first = product.panels + panel * product.panel_stride;
    const BFloat16* second = first + (count - 1) * product.panel_stride;
    for (int64_t row = 0; row < product.m; row += 2 * kTileRows) {
      const int64_t rows = product.m - row < 2 * kTileRows ? product.m - row : 2 * kTileRows;
      const int64_t high = rows < kTileRows ? rows : kTileRows;
      const int64_t low = rows - high;
      if (high != configured_high || low != configured_low) {
        configure(high, low > 0 ? low : kTileRows);
        configured_high = high;
        configured_low = low;
      }
      multiply(product, row, first, second, whole_k, low > 0, sums);
      use(sums, row, rows, panel, count);
    }
  }
  _tile_release();
}

// The summands past the last whole tile, at most 15 pairs, with the dot products of AVX-512.
inline __m512 add_last_pairs(const PanelProduct& product, __m512 sum, int64_t row, int64_t panel) {
  const BFloat16* w = product.panels + panel * product.panel_stride;
  for (int64_t k = product.k / kTileSummands * kTileSummands; k < product.k; k += 2) {
    int pair;
    __builtin_memcpy(&pair, product.a + row * product.a_stride + k, sizeof(pair));
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + k * kPanelRows)),
                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
  }
  return sum;
}

// Fewer rows than this do not fill the tiles: the dot products of AVX-512 are faster.
constexpr int64_t kFewestRows = 9;

void to_float(const PanelProduct& product, bool accumulate, float* out, int64_t out_stride) {
  if (product.m < kFewestRows)
    return level_avx512_bf16::kPanelKernels.to_float(product, accumulate, out, out_stride);
  each_block(product, [&](const float* sums, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t p = 0; p < panels; ++p) {
        float* to = out + (row + r) * out_stride + (panel + p) * kPanelRows;
        __m512 sum = _mm512_load_ps(sums + r * 2 * kPanelRows + p * kPanelRows);
        sum = add_last_pairs(product, sum, row + r, panel + p);
        _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(sum, _mm512_loadu_ps(to)) : sum);
      }
    }
  });
}

inline __m512 widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void to_bfloat16(const PanelProduct& product, const BFloat16* bias, BFloat16* y, int64_t y_stride) {
  if (product.m < kFewestRows)
    return level_avx512_bf16::kPanelKernels.to_bfloat16(product, bias, y, y_stride);
  each_block(product, [&](const float* sums, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = (panel + p) * kPanelRows;
      const int64_t left = product.n - column;
      const auto mask = static_cast<__mmask16>(left >= kPanelRows ? 0xffff : (1 << left) - 1);
      const __m512 shift =
          bias == nullptr ? _mm512_setzero_ps() : widen(_mm256_maskz_loadu_epi16(mask, bias + column));
      for (int64_t r = 0; r < rows; ++r) {
        __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + r * 2 * kPanelRows + p * kPanelRows), shift);
        sum = add_last_pairs(product, sum, row + r, panel + p);
        const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum));
        _mm256_mask_storeu_epi16(y + (row + r) * y_stride + column, mask, bits);
      }
    }
  });
}

// What does not multiply whole tiles is that of the level below.
PanelKernels make_kernels() {
  PanelKernels kernels = level_avx512_bf16::kPanelKernels;
  kernels.to_float = to_float;
  kernels.to_bfloat16 = to_bfloat16;
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
