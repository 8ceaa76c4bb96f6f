#include "ops/panels.h"

#include <algorithm>
#include <cstring>

#include "core/cpu_level.h"

namespace modeltorch {

#if defined(__x86_64__)

namespace level_avx2 {
extern const PanelKernels kPanelKernels;
}
namespace level_avx512_bf16 {
extern const PanelKernels kPanelKernels;
}
namespace level_amx {
const PanelKernels& panel_kernels();
}

const PanelKernels* panel_kernels() {
  if (cpu_level() >= CpuLevel::kAmx) return &level_amx::panel_kernels();
  if (cpu_level() >= CpuLevel::kAvx512Bf16) return &level_avx512_bf16::kPanelKernels;
  if (cpu_level() >= CpuLevel::kAvx2) return &level_avx2::kPanelKernels;
  return nullptr;
}

#else

const PanelKernels* panel_kernels() {
  return nullptr;
}

#endif

// A transposition of pairs, 16 at a time so that what is read and what is written stays in the nearest cache.
void pack_panel(const BFloat16* const (&rows)[kPanelRows], int64_t k, BFloat16* panel) {
  constexpr int64_t kPairs = 16;
  constexpr size_t kPair = 2 * sizeof(BFloat16);
  for (int64_t first = 0; first < k / 2; first += kPairs) {
    const int64_t pairs = std::min(kPairs, k / 2 - first);
    BFloat16* out = panel + first * 2 * kPanelRows;
    for (int64_t row = 0; row < kPanelRows; ++row) {
      const BFloat16* from = rows[row] + 2 * first;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        BFloat16* to = out + 2 * (pair * kPanelRows + row);
        if (rows[row] == nullptr) {
          std::memset(to, 0, kPair);
        } else {
          std::memcpy(to, from + 2 * pair, kPair);
        }
      }
    }
  }
}

void pack_columns(const BFloat16* source, int64_t row_stride, int64_t k, BFloat16* panel) {
  for (int64_t j = 0; j < k; j += 2, panel += 2 * kPanelRows) {
    const BFloat16* even = source + j * row_stride;
    const BFloat16* odd = even + row_stride;
    for (int64_t lane = 0; lane < kPanelRows; ++lane) {
      panel[2 * lane] = even[lane];
      panel[2 * lane + 1] = j + 1 < k ? odd[lane] : BFloat16(0.0f);
    }
  }
}

void unpack_panel_row(const BFloat16* panels, int64_t row, int64_t k, BFloat16* out) {
  const BFloat16* from = panels + row / kPanelRows * kPanelRows * k + row % kPanelRows * 2;
  for (int64_t pair = 0; pair < k / 2; ++pair) {
    out[2 * pair] = from[pair * 2 * kPanelRows];
    out[2 * pair + 1] = from[pair * 2 * kPanelRows + 1];
  }
}

}  // namespace modeltorch
