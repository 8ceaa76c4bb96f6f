#pragma once

// A decoder's layers with random weights, as the kernels of a decode step see them.

#include <numeric>
#include <random>
#include <type_traits>
#include <utility>

#include "harness.cuh"
#include "ops/decode_attention.h"
#include "ops/decode_stack.h"
#include "ops/few_row_linear.h"

namespace {

using namespace modeltorch;

struct Model {
  const char* name;
  int hidden, intermediate, heads, kv_heads, head_size, layers, vocabulary;
};

constexpr Model kModels[] = {{"7b", 3584, 18944, 28, 4, 128, 28, 152064},
                             {"1.5b", 1536, 8960, 12, 2, 128, 28, 151936},
                             {"0.5b", 896, 4864, 14, 2, 64, 24, 151936}};

/// What a stack is made for.
struct StackOptions {
  std::vector<int> lengths;  // contexts with the new token; 0: padding
  int block_size = 128;
  float weight_scale = 0.02f;
  bool has_parts = false;  // weights of q, k and v of their own
  bool is_broken = false;  // two bad slots and two bad blocks; needs four rows
};

/// A decoder's layer stack with random weights, the caches of its sequences and all intermediate tensors.
template <class T>
class Stack {
 public:
  Stack(const Model& model, int rows, int context)
      : Stack(model, StackOptions{.lengths = std::vector<int>(rows, context)}) {}

  Stack(const Model& model, const StackOptions& options)
      : m_(model), o_(options), rows_(static_cast<int>(options.lengths.size())) {
    const int64_t q = int64_t{m_.heads} * m_.head_size, kv = int64_t{m_.kv_heads} * m_.head_size;
    const int rows = rows_;
    weights_ = layer_weights() * m_.layers + int64_t{m_.vocabulary} * m_.hidden;
    weight_ = random<T>(weights_, o_.weight_scale);
    gamma_ = random<T>(m_.hidden * (2 * m_.layers + 1), 0.2f, 1);
    bias_ = random<T>((q + 2 * kv) * m_.layers);
    hidden_ = random<T>(int64_t{rows} * m_.hidden);
    qkv_ = random<T>(rows * (q + 2 * kv));
    attended_ = random<T>(rows * q);
    inner_ = random<T>(int64_t{rows} * m_.intermediate);
    logits_ = random<T>(int64_t{rows} * m_.vocabulary);
    workspace_ = pool.take(size_t(rows) * m_.hidden * 2);
    width_ = *std::max_element(o_.lengths.begin(), o_.lengths.end()) / o_.block_size + 1;
    blocks_ = rows * width_;
    cache_ = blocks_ * o_.block_size * kv;
    caches_ = random<T>(cache_ * 2 * m_.layers);
    cos_ = random<T>(rows * m_.head_size);
    sin_ = random<T>(rows * m_.head_size);
    std::vector<int32_t> tables(blocks_), slots(rows), lengths(o_.lengths.begin(), o_.lengths.end());
    std::iota(tables.begin(), tables.end(), 0);
    std::shuffle(tables.begin(), tables.end(), std::mt19937(1));
    for (int i = 0; i < rows; ++i) {
      const int at = lengths[i] - 1;
      slots[i] = at < 0 ? -1 : tables[i * width_ + at / o_.block_size] * o_.block_size + at % o_.block_size;
    }
    if (o_.is_broken) {
      slots[0] = -1;
      slots[1] = static_cast<int32_t>(blocks_ * o_.block_size);
      tables[2 * width_] = static_cast<int32_t>(blocks_);
      tables[3 * width_] = -5;
    }
    tables_ = upload(tables);
    slots_ = upload(slots);
    lengths_ = upload(lengths);
    fault_ = upload(std::vector<int32_t>{0});
  }

  int64_t layer_weights() const {
    return int64_t{m_.hidden} * (2 * m_.heads + 2 * m_.kv_heads) * m_.head_size +
           3 * int64_t{m_.hidden} * m_.intermediate;
  }
  int64_t kv_bytes() const {  // of a layer
    return 4LL * std::accumulate(o_.lengths.begin(), o_.lengths.end(), 0LL) * m_.kv_heads * m_.head_size;
  }
  int64_t weights() const { return weights_; }

  /// The launch of one kernel with its weights at `offset` elements of all weights. Returns the weights'
  /// elements.
  int64_t qkv(int64_t offset, int layer, cudaStream_t s) {
    const int64_t n = int64_t{m_.heads + 2 * m_.kv_heads} * m_.head_size;
    FewRowLinear l = linear(offset, m_.hidden, qkv_parts(), hidden_, qkv_);
    int64_t bias = n * layer;
    for (int part = 0; part < l.part_count; bias += l.parts[part++].n) l.parts[part].bias = bias_ + bias;
    l.gamma = gamma_ + 2 * layer * m_.hidden;
    few_row_linear(l, s);
    return n * m_.hidden;
  }
  void attention(int layer, cudaStream_t s) {
    DecodeAttention a;
    a.dtype = dtype();
    a.sequences = rows_;
    a.heads = m_.heads;
    a.kv_heads = m_.kv_heads;
    a.head_size = m_.head_size;
    a.scale = 1 / std::sqrt(float(m_.head_size));
    a.qkv = qkv_;
    a.cos = cos_;
    a.sin = sin_;
    a.k_cache = caches_ + cache_ * 2 * layer;
    a.v_cache = caches_ + cache_ * (2 * layer + 1);
    a.block_size = o_.block_size;
    a.block_tables = tables_;
    a.table_width = width_;
    a.max_context = width_ * o_.block_size;
    a.blocks = blocks_;
    a.slots = slots_;
    a.seq_len = lengths_;
    a.y = attended_;
    a.fault = fault_;
    decode_attention(a, s);
  }
  int64_t o(int64_t offset, int, cudaStream_t s) {
    const int64_t k = int64_t{m_.heads} * m_.head_size;
    FewRowLinear l = linear(offset, k, {m_.hidden}, attended_, hidden_);
    l.residual = hidden_;
    few_row_linear(l, s);
    return k * m_.hidden;
  }
  int64_t gate_up(int64_t offset, int layer, cudaStream_t s) {
    FewRowLinear l = linear(offset, m_.hidden, {2 * m_.intermediate}, hidden_, inner_);
    l.gamma = gamma_ + (2 * layer + 1) * m_.hidden;
    l.swiglu = true;
    few_row_linear(l, s);
    return 2LL * m_.hidden * m_.intermediate;
  }
  int64_t down(int64_t offset, int, cudaStream_t s) {
    FewRowLinear l = linear(offset, m_.intermediate, {m_.hidden}, inner_, hidden_);
    l.residual = hidden_;
    few_row_linear(l, s);
    return int64_t{m_.hidden} * m_.intermediate;
  }
  int64_t head(int64_t offset, int, cudaStream_t s) {
    FewRowLinear l = linear(offset, m_.hidden, {m_.vocabulary}, hidden_, logits_);
    l.gamma = gamma_ + 2 * m_.layers * m_.hidden;
    few_row_linear(l, s);
    return int64_t{m_.hidden} * m_.vocabulary;
  }
  void layers(cudaStream_t s) {
    int64_t at = 0;
    for (int layer = 0; layer < m_.layers; ++layer) {
      at += qkv(at, layer, s);
      attention(layer, s);
      at += o(at, layer, s);
      at += gate_up(at, layer, s);
      at += down(at, layer, s);
    }
  }
  void step(cudaStream_t s) {
    layers(s);
    head(layer_weights() * m_.layers, 0, s);
  }

  /// All layers in one launch, from hidden() to `y`; `state` is left to the caller.
  DecodeStack describe(T* y) const {
    DecodeStack stack{.dtype = dtype(),
                      .rows = rows_,
                      .hidden = m_.hidden,
                      .inner = m_.intermediate,
                      .heads = m_.heads,
                      .kv_heads = m_.kv_heads,
                      .head_size = m_.head_size,
                      .epsilon = 1e-6f,
                      .scale = 1 / std::sqrt(float(m_.head_size)),
                      .layers = {},
                      .x = hidden_,
                      .cos = cos_,
                      .sin = sin_,
                      .block_size = o_.block_size,
                      .block_tables = tables_,
                      .table_width = width_,
                      .blocks = blocks_,
                      .slots = slots_,
                      .seq_len = lengths_,
                      .y = y,
                      .fault = fault_};
    const std::vector<int64_t> parts = qkv_parts();
    std::copy(parts.begin(), parts.end(), stack.qkv_units);
    const T *at = weight_, *bias = bias_;
    const auto take = [&](int64_t elements) { return std::exchange(at, at + elements); };
    for (int i = 0; i < m_.layers; ++i) {
      DecodeStack::Layer layer;
      for (size_t part = 0; part < parts.size(); ++part) {
        layer.qkv[part] = take(parts[part] * m_.hidden);
        layer.qkv_bias[part] = std::exchange(bias, bias + parts[part]);
      }
      layer.o = take(int64_t{m_.heads} * m_.head_size * m_.hidden);
      layer.gate = take(int64_t{m_.hidden} * m_.intermediate);
      layer.up = take(int64_t{m_.hidden} * m_.intermediate);
      layer.down = take(int64_t{m_.hidden} * m_.intermediate);
      layer.attention_gamma = gamma_ + 2 * i * m_.hidden;
      layer.mlp_gamma = gamma_ + (2 * i + 1) * m_.hidden;
      layer.k_cache = caches_ + cache_ * 2 * i;
      layer.v_cache = caches_ + cache_ * (2 * i + 1);
      stack.layers.push_back(layer);
    }
    return stack;
  }

  T* hidden() const { return hidden_; }
  int64_t hidden_elements() const { return int64_t{rows_} * m_.hidden; }
  T* caches() const { return caches_; }
  int64_t cache_elements() const { return cache_ * 2 * m_.layers; }
  int32_t* fault() const { return fault_; }

 private:
  static DType dtype() { return std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16; }

  std::vector<int64_t> qkv_parts() const {
    const int64_t q = int64_t{m_.heads} * m_.head_size, kv = int64_t{m_.kv_heads} * m_.head_size;
    if (o_.has_parts) return {q, kv, kv};
    return {q + 2 * kv};
  }

  FewRowLinear linear(int64_t offset, int64_t k, std::vector<int64_t> n, const T* x, T* y) {
    FewRowLinear l;
    l.dtype = dtype();
    l.rows = rows_;
    l.k = k;
    for (const int64_t part : n) {
      l.parts[l.part_count++] = {weight_ + offset, nullptr, part};
      offset += part * k;
    }
    l.x = x;
    l.epsilon = 1e-6f;
    l.y = y;
    l.workspace = workspace_;
    return l;
  }

  Model m_;
  StackOptions o_;
  int rows_;
  int64_t weights_, width_, blocks_, cache_;
  T *weight_, *gamma_, *bias_, *hidden_, *qkv_, *attended_, *inner_, *logits_, *caches_, *cos_, *sin_;
  int32_t *tables_, *slots_, *lengths_, *fault_;
  void* workspace_;
};

}  // namespace
