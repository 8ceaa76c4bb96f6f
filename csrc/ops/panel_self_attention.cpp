#include "ops/panel_self_attention.h"

#include <algorithm>
#include <cstring>

#include "core/arithmetic.h"
#include "core/parallel.h"

namespace modeltorch {
namespace {

constexpr int64_t kMaxRows = 64;     // query rows of a block
constexpr int64_t kChunk = 128;      // keys of a pass, a multiple of kTogether
constexpr int64_t kTogether = 32;    // keys and values are filled up to a multiple of it: what a tile sums
constexpr int64_t kRowsOfTile = 16;  // rows of a block are multiplied as whole tiles

}  // namespace

int64_t PanelSelfAttention::padded(int64_t length) {
  return round_up(length, kTogether);
}

// What one thread needs for a block of `rows` query rows, filled up to whole tiles.
struct PanelSelfAttention::Scratch {
  BFloat16* queries;  // [rows, d]
  BFloat16* weights;  // [rows, kChunk]
  float* scores;      // [rows, kChunk]
  float* out;         // [rows, d]
  float* maxima;      // [rows]
  float* sums;        // [rows]

  static size_t bytes(int64_t rows, int64_t d) {
    const int64_t total = rows * ((d + kChunk) * 2 + (d + kChunk + 2) * 4);
    return static_cast<size_t>(round_up(total, 64));
  }

  Scratch(char* memory, int64_t rows, int64_t d) {
    scores = reinterpret_cast<float*>(memory);
    out = scores + rows * kChunk;
    maxima = out + rows * d;
    sums = maxima + rows;
    queries = reinterpret_cast<BFloat16*>(sums + rows);
    weights = queries + rows * d;
  }
};

PanelSelfAttention::PanelSelfAttention(const AttentionShape& shape, int64_t tokens, int64_t sequences)
    : shape_(shape),
      queries_per_block_(std::max<int64_t>(1, kMaxRows / shape.group())),
      padded_tokens_(tokens + sequences * (kTogether - 1)),
      threads_(pool_width()) {}

int64_t PanelSelfAttention::block_rows() const {
  return round_up(queries_per_block_ * shape_.group(), kRowsOfTile);
}

size_t PanelSelfAttention::workspace_bytes() const {
  const int64_t packed = 2 * padded_tokens_ * shape_.kv_heads * shape_.head_size * 2;
  const size_t scratch = Scratch::bytes(block_rows(), shape_.head_size);
  return static_cast<size_t>(round_up(packed, 64)) + static_cast<size_t>(threads_) * scratch;
}

// Packed keys of all sequences come first, then values; a sequence's heads lie one after the other.
PanelSelfAttention::Panels PanelSelfAttention::panels_of(const KernelArgs& args, int64_t padded_start,
                                                         int64_t length, int64_t head) const {
  const int64_t d = shape_.head_size;
  auto* keys = static_cast<BFloat16*>(args.workspace);
  const int64_t at = (padded_start * shape_.kv_heads + head * padded(length)) * d;
  return {keys + at, keys + padded_tokens_ * shape_.kv_heads * d + at};
}

void PanelSelfAttention::pack(const KernelArgs& args) const {
  const int64_t d = shape_.head_size;
  const int64_t stride = shape_.kv_heads * d;
  const int32_t* lengths = args.in(3).as<int32_t>();
  int64_t start = 0;
  int64_t padded_start = 0;
  for (int64_t sequence = 0; sequence < args.in(3).dims[0]; ++sequence) {
    const int64_t length = lengths[sequence];
    const int64_t key_panels = padded(length) / kPanelRows;
    parallel_for(shape_.kv_heads * key_panels, grain_for(kPanelRows * d * 4),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t head = task / key_panels;
                     const int64_t first = task % key_panels * kPanelRows;
                     const int64_t count = std::clamp<int64_t>(length - first, 0, kPanelRows);
                     const Panels to = panels_of(args, padded_start, length, head);
                     const int64_t at = (start + first) * stride + head * d;
                     const BFloat16* rows[kPanelRows] = {};
                     for (int64_t lane = 0; lane < count; ++lane)
                       rows[lane] = args.in(1).as<BFloat16>() + at + lane * stride;
                     pack_panel(rows, d, to.keys + first * d);
                     for (int64_t column = 0; column < d; column += kPanelRows) {
                       BFloat16* panel = to.values + column * padded(length) + first * kPanelRows;
                       std::memset(panel, 0, sizeof(BFloat16) * kPanelRows * kPanelRows);
                       pack_columns(args.in(2).as<BFloat16>() + at + column, stride, count, panel);
                     }
                   }
                 });
    start += length;
    padded_start += padded(length);
  }
}

void PanelSelfAttention::run(const KernelArgs& args) {
  pack(args);
  const int32_t* lengths = args.in(3).as<int32_t>();
  const int64_t sequences = args.in(3).dims[0];
  const int64_t d = shape_.head_size;
  char* scratch =
      static_cast<char*>(args.workspace) + round_up(2 * padded_tokens_ * shape_.kv_heads * d * 2, 64);
  const size_t scratch_bytes = Scratch::bytes(block_rows(), d);
  parallel_for(threads_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      int64_t task = 0;
      int64_t start = 0;
      int64_t padded_start = 0;
      for (int64_t sequence = 0; sequence < sequences; ++sequence) {
        const int64_t length = lengths[sequence];
        // The last queries see the most keys: the longest blocks go first, so that threads end together.
        for (int64_t last = length; last > 0; last -= queries_per_block_) {
          const int64_t first = std::max<int64_t>(0, last - queries_per_block_);
          for (int64_t head = 0; head < shape_.kv_heads; ++head) {
            if (task++ % threads_ != thread) continue;
            const Panels panels = panels_of(args, padded_start, length, head);
            attend(args, {sequence, start + first, last - first, head, first + 1}, panels, length,
                   scratch + thread * scratch_bytes);
          }
        }
        start += length;
        padded_start += padded(length);
      }
    }
  });
}

void PanelSelfAttention::attend(const KernelArgs& args, const QueryBlock& block, const Panels& panels,
                                int64_t length, char* memory) const {
  const PanelKernels& kernels = *panel_kernels();
  const int64_t d = shape_.head_size;
  const int64_t group = shape_.group();
  const int64_t rows = block.queries * group;
  const int64_t tile_rows = round_up(rows, kRowsOfTile);
  const Scratch scratch(memory, tile_rows, d);
  const auto offset = [&](int64_t row) {
    const int64_t token = block.first_token + row / group;
    return (token * shape_.heads + block.kv_head * group + row % group) * d;
  };
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(scratch.queries + row * d, args.in(0).as<BFloat16>() + offset(row), sizeof(BFloat16) * d);
    scratch.maxima[row] = -__builtin_inff();
    scratch.sums[row] = 0.0f;
  }
  std::fill(scratch.out, scratch.out + rows * d, 0.0f);
  const int64_t keys = block.first_limit + block.queries - 1;
  for (int64_t first = 0; first < keys; first += kChunk) {
    const int64_t count = std::min(kChunk, padded(keys) - first);
    kernels.to_float({scratch.queries, d, tile_rows, panels.keys + first * d, kPanelRows * d, d, count},
                     scratch.scores, kChunk);
    kernels.soften({.scale = shape_.scale,
                    .rows = rows,
                    .group = group,
                    .first_visible = block.first_limit - first,
                    .scores = scratch.scores,
                    .scores_stride = kChunk,
                    .count = count,
                    .weights = scratch.weights,
                    .weights_stride = kChunk,
                    .maxima = scratch.maxima,
                    .sums = scratch.sums,
                    .out = scratch.out,
                    .d = d});
    kernels.to_float({scratch.weights, kChunk, tile_rows, panels.values + first * kPanelRows,
                      kPanelRows * padded(length), count, d, scratch.out, d},
                     scratch.out, d);
  }
  for (int64_t row = 0; row < rows; ++row) {
    kernels.scale_to_bfloat16(scratch.out + row * d, 1.0f / scratch.sums[row], d,
                              args.out(0).as<BFloat16>() + offset(row));
  }
}

}  // namespace modeltorch
