#include "ops/row_tile_linear.h"

#include <algorithm>
#include <climits>
#include <cstdlib>

#include "core/arithmetic.h"
#include "core/check.h"
#include "ops/launch.cuh"
#include "ops/row_tile_linear_sm90.cuh"

namespace modeltorch {
namespace {

using row_tiles::Work;

constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kMostBoxRows = 256;  // of one copy

/// How a product is cut.
struct Cut {
  int64_t tile_rows;  ///< of the weights, at most
  int splits;         ///< blocks that share k
};

/// The parts of a linear as the kernel goes through them; gate and up are one part.
struct Parts {
  int count = 0;
  int64_t units[3] = {};

  explicit Parts(const FewRowLinear& linear) {
    if (linear.swiglu) {
      count = 1;
      units[0] = linear.parts[0].n / (linear.part_count == 1 ? 2 : 1);
      return;
    }
    count = linear.part_count;
    for (int i = 0; i < count; ++i) units[i] = linear.parts[i].n;
  }
  int64_t all() const { return units[0] + units[1] + units[2]; }
  int64_t tiles(int64_t tile_units) const {
    int64_t sum = 0;
    for (const int64_t n : units) sum += divide_up(n, tile_units);
    return sum;
  }
};

/// Where there are tiles enough for all processors, rounds of tiles as large as the matrix units hold,
/// because every tile reads x; else blocks that share k.
Cut best_cut(const Work& w, const Parts& parts, int tokens) {
  const int64_t rows = parts.all() * (w.gated ? 2 : 1), processors = current_cuda_device().multiprocessors;
  constexpr int64_t kUsual = 128, kManyRows = 3072;
  if (rows >= kUsual * processors / 2) {
    const int64_t rounds = divide_up(rows, processors * 64 * row_tiles::most_groups(tokens));
    return {divide_up(rows, processors * rounds), 1};
  }
  const int64_t tile_rows = rows >= kManyRows ? kUsual : kUsual / 2;
  const int64_t tiles = parts.tiles(w.gated ? tile_rows / 2 : tile_rows);
  constexpr int64_t kMostSplits = 8, kFewestSteps = 3;
  const int64_t splits = std::min({processors / tiles, w.steps / kFewestSteps, kMostSplits});
  return {tile_rows, static_cast<int>(std::max<int64_t>(splits, 1))};
}

/// Tiles as even as can be.
void cut_tiles(Work& w, const Parts& parts, const Cut& cut) {
  const int64_t most = round_up(cut.tile_rows, w.gated ? 16 : 8) / (w.gated ? 2 : 1);
  int64_t units = 8;
  for (int i = 0; i < parts.count; ++i) {
    units = std::max(units, divide_up(parts.units[i], divide_up(parts.units[i], most)));
  }
  w.boxes = !w.gated && units > kMostBoxRows ? 2 : 1;
  w.tile_units = static_cast<int>(round_up(units, 8 * w.boxes));
  w.groups = static_cast<int>(divide_up(w.tile_units * (w.gated ? 2 : 1), 64));
  w.box_rows = w.tile_units * (w.gated ? 2 : 1) / w.boxes;
  w.units = static_cast<int>(parts.all());
  int64_t unit = 0;
  for (int i = 0; i < 3; ++i) {
    w.part_tile[i] = i < parts.count ? w.tiles : INT_MAX;
    w.part_unit[i] = static_cast<int>(unit);
    w.tiles += static_cast<int>(divide_up(parts.units[i], w.tile_units));
    unit += parts.units[i];
  }
  for (int i = parts.count; i < 4; ++i) w.part_unit[i] = w.units;
}

/// Of a block, at most. Large clusters only find room for all of a launch if two blocks fit a processor. With
/// few tokens the stages of a short range of k are many enough in less, and the kernel in front ends sooner
/// if not all of memory's queues are full.
int shared_bytes(const Work& w, int tokens) {
  constexpr int kHalf = 112 * 1024, kSome = 150 * 1024, kEasyCluster = 4;
  if (w.splits > kEasyCluster) return kHalf;
  return w.splits > 1 && tokens <= 64 ? kSome : kMaxSharedBytes;
}

/// Lays shared memory out. Returns its bytes.
int cut_memory(Work& w, int tokens) {
  const int rows = w.boxes * w.box_rows, x_bytes = tokens * row_tiles::kDepth * 2;
  w.weight_bytes = static_cast<int>(round_up(rows * row_tiles::kDepth * 2, 1024));
  w.stage_bytes = w.weight_bytes + x_bytes;
  // The matrix units read 64 rows for every warpgroup, also where the last tile has less.
  const int beyond = std::max(w.groups * 64 * row_tiles::kDepth * 2 - w.stage_bytes, 0);
  const int threads = w.groups * 128, share = static_cast<int>(divide_up(tokens / 16, w.splits));
  const int residual_bytes = w.residual != nullptr && w.vectors ? share * threads * 16 : 0;
  const int room = shared_bytes(w, tokens) - row_tiles::kHeaderBytes - beyond - residual_bytes;
  const int64_t steps = divide_up(w.steps, w.splits) * (w.splits > 1 ? 1 : w.tiles);
  w.stages = static_cast<int>(
      std::clamp<int64_t>(std::min<int64_t>(room / w.stage_bytes, steps), 2, row_tiles::kMaxStages));
  int ring = w.stages * w.stage_bytes + beyond;
  // What the other blocks send lies there in the end.
  ring = std::max(ring, (w.splits - 1) * 2 * share * threads * 16);
  w.residual_offset = row_tiles::kHeaderBytes + ring;
  return w.residual_offset + residual_bytes;
}

void make_maps(Work& w, const FewRowLinear& linear, const void* x, int tokens) {
  const bool bfloat16 = linear.dtype == DType::kBFloat16;
  const auto k = static_cast<uint64_t>(linear.k);
  w.x = hopper::tensor_map<2>({x,
                               bfloat16,
                               {k, static_cast<uint64_t>(linear.rows)},
                               {k * 2},
                               {row_tiles::kDepth, static_cast<uint32_t>(tokens)}});
  if (!w.gated) {
    for (int i = 0; i < linear.part_count; ++i) {
      w.bias[i] = linear.parts[i].bias;
      w.weight[i] = hopper::tensor_map<2>({linear.parts[i].weight,
                                           bfloat16,
                                           {k, static_cast<uint64_t>(linear.parts[i].n)},
                                           {k * 2},
                                           {row_tiles::kDepth, static_cast<uint32_t>(w.box_rows)}});
    }
    return;
  }
  const char* gate = static_cast<const char*>(linear.parts[0].weight);
  const char* up = linear.part_count == 2 ? static_cast<const char*>(linear.parts[1].weight)
                                          : gate + static_cast<int64_t>(w.units) * linear.k * 2;
  w.bias[0] = linear.parts[0].bias;
  w.bias[1] = linear.part_count == 2 || !linear.parts[0].bias
                  ? linear.parts[1].bias
                  : static_cast<const char*>(linear.parts[0].bias) + static_cast<int64_t>(w.units) * 2;
  w.flipped = up < gate;
  if (w.flipped) std::swap(gate, up);
  w.weight[0] = hopper::tensor_map<4>({gate,
                                       bfloat16,
                                       {k, 8, 2, static_cast<uint64_t>(w.units / 8)},
                                       {k * 2, static_cast<uint64_t>(up - gate), k * 16},
                                       {row_tiles::kDepth, 8, 2, static_cast<uint32_t>(w.tile_units / 8)}});
}

template <class T, int kTokens>
void launch(const FewRowLinear& linear, const void* x, void* stream) {
  const Parts parts(linear);
  Work w{};
  w.gated = linear.swiglu;
  w.residual = linear.residual;
  w.y = linear.y;
  w.rows = static_cast<int>(linear.rows);
  w.steps = static_cast<int>(divide_up(linear.k, row_tiles::kDepth));
  const Cut cut = best_cut(w, parts, kTokens);
  w.splits = cut.splits;
  cut_tiles(w, parts, cut);
  w.vectors = w.units % 8 == 0 && is_aligned(w.y) && is_aligned(w.residual);
  const int bytes = cut_memory(w, kTokens);
  make_maps(w, linear, x, kTokens);
  int clusters = w.tiles;
  if (w.splits == 1) {
    const int blocks_each = kMaxSharedBytes / 2 >= bytes ? 2 : 1;
    clusters = std::min(clusters, current_cuda_device().multiprocessors * blocks_each);
  }
  const auto kernel = row_tiles::linear_kernel<T, kTokens>;
  allow_shared_memory(kernel, kMaxSharedBytes);
  const LaunchShape shape{dim3(clusters * w.splits), w.groups * 128 + 32, static_cast<size_t>(bytes),
                          w.splits};
  launch_kernel(kernel, shape, stream, "row_tile_linear", w);
}

template <class T>
void launch_tokens(const FewRowLinear& linear, const void* x, void* stream) {
  if (linear.rows <= 16) return launch<T, 16>(linear, x, stream);
  if (linear.rows <= 32) return launch<T, 32>(linear, x, stream);
  if (linear.rows <= 64) return launch<T, 64>(linear, x, stream);
  return launch<T, 128>(linear, x, stream);
}

}  // namespace

bool row_tile_linear_fits(const FewRowLinear& linear) {
  if (linear.rows > 128) return false;
  if (!linear.swiglu) return true;
  constexpr ptrdiff_t kFarthest = ptrdiff_t{1} << 40;  // a stride of a tensor map
  const ptrdiff_t apart = linear.part_count == 1 ? 0
                                                 : static_cast<const char*>(linear.parts[1].weight) -
                                                       static_cast<const char*>(linear.parts[0].weight);
  return Parts(linear).units[0] % 8 == 0 && !linear.residual && std::abs(apart) < kFarthest;
}

void row_tile_linear(const FewRowLinear& linear, const void* x, void* stream) {
  if (linear.dtype == DType::kBFloat16) return launch_tokens<__nv_bfloat16>(linear, x, stream);
  return launch_tokens<__half>(linear, x, stream);
}

}  // namespace modeltorch
