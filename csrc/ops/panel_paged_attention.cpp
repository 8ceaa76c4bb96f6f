#include "ops/panel_paged_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/arithmetic.h"
#include "core/parallel.h"
#include "ops/cpu_kernel.h"

namespace modeltorch {
namespace {

constexpr int64_t kChunk = 128;       // keys of a softmax step, a multiple of 16
constexpr int64_t kPast = 32;         // weights past a chunk that may be read
constexpr int64_t kLine = 32;         // elements in a line of the processor's caches
constexpr int64_t kAlignment = 64;    // bytes
constexpr int64_t kFewestKeys = 256;  // that are worth a part of their own

}  // namespace

struct PanelPagedAttention::State {
  State(float* memory, const AttentionShape& shape)
      : maxima(memory), sums(memory + shape.group()), out(memory + 2 * shape.group()) {}

  float* maxima;
  float* sums;
  float* out;
};

PanelPagedAttention::PanelPagedAttention(const AttentionShape& shape, int64_t sequences)
    : shape_(shape), tasks_(sequences * shape.kv_heads), threads_(pool_width()) {}

// Scores in float32 and weights in bfloat16 of one chunk.
size_t PanelPagedAttention::scratch_bytes() const {
  return static_cast<size_t>(round_up(shape_.group() * kChunk * 4, kAlignment) +
                             round_up(shape_.group() * (kChunk + kPast) * 2, kAlignment));
}

size_t PanelPagedAttention::workspace_bytes() const {
  const int64_t states = (tasks_ + 2 * threads_) * state_floats() * 4;
  return static_cast<size_t>(round_up(states, kAlignment)) + static_cast<size_t>(threads_) * scratch_bytes();
}

// Parts of every context: one, or as many as give each thread two.
int64_t PanelPagedAttention::part_count(const KernelArgs& args) const {
  const int64_t sequences = args.in(4).dims[0];
  const int64_t tasks = sequences * shape_.kv_heads;
  if (tasks >= threads_) return 1;
  const int32_t* lengths = args.in(4).as<int32_t>();
  const int64_t longest = *std::max_element(lengths, lengths + sequences);
  return std::max<int64_t>(1, std::min(2 * threads_ / tasks, longest / kFewestKeys));
}

void PanelPagedAttention::run(const KernelArgs& args) {
  const int64_t tasks = args.in(4).dims[0] * shape_.kv_heads;
  if (tasks == 0) return;
  const int64_t parts = part_count(args);
  const int32_t* lengths = args.in(4).as<int32_t>();
  auto* states = static_cast<float*>(args.workspace);
  char* scratch =
      static_cast<char*>(args.workspace) + round_up((tasks_ + 2 * threads_) * state_floats() * 4, kAlignment);
  const int64_t total = std::accumulate(lengths, lengths + args.in(4).dims[0], int64_t{0}) * shape_.kv_heads;
  parallel_for(threads_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      // A thread takes neighbours, as many as make its share of the keys: the heads of a sequence lie side by
      // side in memory.
      int64_t before = 0;
      for (int64_t item = 0; item < tasks * parts; ++item) {
        const int64_t task = item / parts;
        const int64_t length = lengths[task / shape_.kv_heads];
        const int64_t each = divide_up(length, parts);
        const int64_t first = std::min(length, item % parts * each);
        const int64_t last = std::min(length, first + each);
        // By the middle of its keys: equal shares end between tasks, or nearly there.
        const int64_t middle = 2 * before + last - first;
        const int64_t owner = std::min(threads_ - 1, middle * threads_ / std::max<int64_t>(1, 2 * total));
        before += last - first;
        if (owner != thread) continue;
        attend(args, task, first, last, State(states + item * state_floats(), shape_),
               scratch + thread * scratch_bytes());
      }
    }
  });
  parallel_for(tasks, grain_for(shape_.group() * shape_.head_size * parts), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      join(args, task, states + task * parts * state_floats(), parts);
  });
}

void PanelPagedAttention::attend(const KernelArgs& args, int64_t task, int64_t first, int64_t last,
                                 const State& state, char* memory) const {
  const PanelKernels& kernels = *panel_kernels();
  const int64_t group = shape_.group();
  const int64_t d = shape_.head_size;
  const int64_t sequence = task / shape_.kv_heads;
  const int64_t head = task % shape_.kv_heads;
  const int64_t block_size = args.in(1).dims[1];
  const int64_t stride = shape_.kv_heads * d;
  const int32_t* table = args.in(3).as<int32_t>() + sequence * args.in(3).dims[1];
  const BFloat16* queries = args.in(0).as<BFloat16>() + (sequence * shape_.heads + head * group) * d;
  auto* scores = reinterpret_cast<float*>(memory);
  auto* weights = reinterpret_cast<BFloat16*>(memory + round_up(group * kChunk * 4, kAlignment));
  std::fill(state.maxima, state.maxima + group, -INFINITY);
  std::fill(state.sums, state.sums + group * (d + 1), 0.0f);

  // Calls use(row of the cache, offset in the chunk, count) for every run of keys of a chunk inside one
  // block.
  const auto each_run = [&](int64_t from, int64_t to, auto&& use) {
    for (int64_t key = from; key < to;) {
      const int64_t count = std::min(block_size - key % block_size, to - key);
      use((table[key / block_size] * block_size + key % block_size) * stride + head * d, key - from, count);
      key += count;
    }
  };
  for (int64_t from = first; from < last; from += kChunk) {
    const int64_t to = std::min(last, from + kChunk);
    // Values come from memory while keys are scored.
    each_run(from, to, [&](int64_t at, int64_t, int64_t count) {
      for (int64_t key = 0; key < count; ++key) {
        const BFloat16* value = args.in(2).as<BFloat16>() + at + key * stride;
        for (int64_t i = 0; i < d; i += kLine) __builtin_prefetch(value + i);
      }
    });
    const int64_t padded = round_up(to - from, kPanelRows);
    each_run(from, to, [&](int64_t at, int64_t offset, int64_t count) {
      kernels.score_keys(queries, group, d, args.in(1).as<BFloat16>() + at, stride, count, scores + offset,
                         kChunk);
    });
    kernels.soften({.scale = shape_.scale,
                    .rows = group,
                    .group = group,
                    .first_visible = to - from,
                    .scores = scores,
                    .scores_stride = kChunk,
                    .count = padded,
                    .weights = weights,
                    .weights_stride = kChunk + kPast,
                    .maxima = state.maxima,
                    .sums = state.sums,
                    .out = state.out,
                    .d = d});
    for (int64_t row = 0; row < group; ++row)
      std::fill_n(weights + row * (kChunk + kPast) + padded, kPast, BFloat16(0.0f));
    each_run(from, to, [&](int64_t at, int64_t offset, int64_t count) {
      kernels.weigh_values(weights + offset, kChunk + kPast, group, args.in(2).as<BFloat16>() + at, stride,
                           count, state.out, d);
    });
  }
}

// out = sum over parts of exp(maximum - largest) * weighted values, over the same sum of the parts' sums.
void PanelPagedAttention::join(const KernelArgs& args, int64_t task, float* states, int64_t parts) const {
  const int64_t group = shape_.group();
  const int64_t d = shape_.head_size;
  BFloat16* out = args.out(0).as<BFloat16>() + task * group * d;
  for (int64_t row = 0; row < group; ++row) {
    const State total(states, shape_);
    for (int64_t part = 1; part < parts; ++part) {
      const State other(states + part * state_floats(), shape_);
      if (other.sums[row] == 0.0f) continue;  // no keys
      const float largest = std::max(total.maxima[row], other.maxima[row]);
      const float mine = std::exp(total.maxima[row] - largest);
      const float theirs = std::exp(other.maxima[row] - largest);
      total.maxima[row] = largest;
      total.sums[row] = total.sums[row] * mine + other.sums[row] * theirs;
      for (int64_t i = row * d; i < (row + 1) * d; ++i)
        total.out[i] = total.out[i] * mine + other.out[i] * theirs;
    }
    const float scale = total.sums[row] > 0.0f ? 1.0f / total.sums[row] : 0.0f;
    panel_kernels()->scale_to_bfloat16(total.out + row * d, scale, d, out + row * d);
  }
}

}  // namespace modeltorch
