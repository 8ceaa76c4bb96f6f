#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "graph/kernel.h"
#include "ops/attention_shape.h"
#include "ops/cpu_kernel.h"
#include "ops/rows.h"

namespace modeltorch {

/// Consecutive queries of one sequence in one key head: the piece of attention that one thread computes
/// alone.
struct QueryBlock {
  int64_t sequence = 0;
  int64_t first_token = 0;  ///< row of q and out
  int64_t queries = 0;
  int64_t kv_head = 0;
  int64_t first_limit = 0;  ///< keys that the first query sees; each later query sees one more
};

/// What the attention kernels of the CPU share: scratch for each thread, the walk over query blocks, the
/// softmax.
template <class T>
class CpuAttention {
 public:
  /// Rows that share a pass over the keys: enough to amortise it, few enough to stay in the cache.
  static constexpr int64_t kMaxRows = 64;

  explicit CpuAttention(const AttentionShape& shape)
      : shape_(shape),
        queries_per_block_(shape.group() >= kMaxRows ? 1 : kMaxRows / shape.group()),
        threads_(pool_width()) {}

  int64_t queries_per_block() const { return queries_per_block_; }
  size_t workspace_bytes() const { return static_cast<size_t>(threads_) * scratch_bytes(); }

  /// Runs `body(mine, scratch)` once a thread: `mine()` says whether the next block in program order belongs
  /// to that thread.
  template <class Body>
  void each_thread(void* workspace, Body&& body) const {
    parallel_for(threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        int64_t next = 0;
        const auto mine = [&] { return next++ % threads_ == thread; };
        body(mine, reinterpret_cast<float*>(static_cast<char*>(workspace) + thread * scratch_bytes()));
      }
    });
  }

  /// Attends one block. `each_run(limit, use)` calls use(KeyRun) over the keys of the block below `limit`.
  template <class EachRun>
  void attend(const QueryBlock& block, const T* q, T* out, float* scratch, EachRun&& each_run) const {
    const int64_t group = shape_.group();
    const int64_t d = shape_.head_size;
    const int64_t rows = block.queries * group;
    int64_t* limits = reinterpret_cast<int64_t*>(scratch);
    AttentionState state = carve(rows, limits, scratch + 2 * max_rows());
    const auto offset = [&](int64_t row) {
      const int64_t token = block.first_token + row / group;
      return (token * shape_.heads + block.kv_head * group + row % group) * d;
    };
    const RowKernels<T>& kernels = row_kernels<T>();
    for (int64_t row = 0; row < rows; ++row) {
      kernels.scale_to_float(q + offset(row), shape_.scale, d, const_cast<float*>(state.queries) + row * d);
      limits[row] = block.first_limit + row / group;
      state.maxima[row] = -__builtin_inff();
      state.sums[row] = 0.0f;
    }
    std::fill(state.out, state.out + rows * d, 0.0f);
    each_run(block.first_limit + block.queries - 1,
             [&](const KeyRun<T>& run) { kernels.attend(state, run); });
    for (int64_t row = 0; row < rows; ++row) kernels.finish_attention(state, row, out + offset(row));
  }

 private:
  int64_t max_rows() const { return queries_per_block_ * shape_.group(); }

  size_t scratch_bytes() const {
    const int64_t floats = 2 * max_rows() + attention_scratch_floats(max_rows(), shape_.head_size);
    return (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  }

  AttentionState carve(int64_t rows, const int64_t* limits, float* memory) const {
    const int64_t d = shape_.head_size;
    AttentionState state{.rows = rows, .head_size = d, .queries = memory, .limits = limits};
    state.out = memory + rows * d;
    state.scores = state.out + rows * d;
    state.maxima = state.scores + rows * kKeyChunk;
    state.sums = state.maxima + rows;
    return state;
  }

  AttentionShape shape_;
  int64_t queries_per_block_;
  int64_t threads_;
};

}  // namespace modeltorch
