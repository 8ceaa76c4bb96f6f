#include "ops/decode_stack.h"

#include <algorithm>
#include <bit>
#include <climits>

#include "core/arithmetic.h"
#include "core/check.h"
#include "ops/decode_stack_kernel.cuh"
#include "ops/launch.cuh"

namespace modeltorch {
namespace {

constexpr int kSharedBytes = 227 * 1024;
constexpr int kLeastRing = 64 * 1024;
constexpr int kMaxSplits = 64;

int64_t qkv_units(const DecodeStack& stack) {
  return int64_t{stack.heads + 2 * stack.kv_heads} * stack.head_size;
}

/// How a launch is cut.
struct StackPlan {
  StackParams params{};
  int blocks = 0;
};

/// The passes of one linear. `pass_rows`: rows of the weight in a pass, at most.
StackLinear plan_linear(int64_t k, int64_t units, int blocks, int sides, int pass_rows) {
  const int64_t most = divide_up(units, blocks);
  const int64_t passes = divide_up(most * sides, pass_rows);
  const int64_t pass_units = divide_up(most, passes);
  return {
      .k = static_cast<int>(k), .units = static_cast<int>(units), .pass_units = static_cast<int>(pass_units)};
}

/// Parts of the context. A warp loads two tiles of its part ahead. Of many rows the parts are longer: blocks
/// that have attention have less room for weights.
int split_count(const DecodeStack& stack, int blocks) {
  if (stack.rows * stack.heads > blocks) return 1;  // nobody could join them
  const int64_t work = stack.rows * stack.kv_heads;
  const int64_t tokens = stack.rows <= 2 ? 130 : 320;
  int splits = 1;
  while (splits < kMaxSplits && work * splits * 2 <= blocks &&
         splits * tokens < stack.table_width * stack.block_size) {
    splits *= 2;
  }
  return splits;
}

int attention_bytes(int head_size) {
  return head_size == 64 ? stack::kAttentionBytes<64> : stack::kAttentionBytes<128>;
}

/// Where everything lies in shared memory. Returns false if there is no room for a ring.
bool place(StackParams& p, const DecodeStack& stack, int blocks) {
  const int64_t rows = stack.rows;
  const int64_t chunk_bytes = kStackChunkRows * (kStackChunk * 2 + 64) + stack.hidden * 2;
  int64_t pass_rows = 0;
  for (int kind = 0; kind < 4; ++kind) {
    const StackLinear& linear = p.linear[kind];
    pass_rows = std::max<int64_t>(pass_rows, linear.pass_units * (kind == kStackGateUp ? 2 : 1));
  }
  int64_t bytes = kStackHeaderBytes;
  const auto take = [&](int64_t size) {
    const int64_t at = bytes;
    bytes = round_up(bytes + size, 128);
    return static_cast<int>(at);
  };
  p.residual_offset = take(divide_up(stack.hidden, blocks) * rows * 4);
  p.red_pitch = static_cast<int>(round_up(pass_rows, kStackChunkRows) + 4);
  p.red_bytes = static_cast<int>(std::max<int64_t>(kStackWarps * rows * p.red_pitch * 4, stack::kJoinBytes));
  p.red_offset = take(2 * p.red_bytes);
  p.ring_offset = p.attention_offset = static_cast<int>(bytes);
  take(attention_bytes(stack.head_size));
  p.ring_offset_attention = static_cast<int>(bytes);
  p.ring_end = kSharedBytes;
  return kSharedBytes - bytes >= std::max<int64_t>(chunk_bytes, kLeastRing);
}

/// Cuts the work; false: it cannot be. Pointers are not looked at.
bool plan_stack(StackPlan& plan, const DecodeStack& stack) {
  StackParams& p = plan.params;
  const int64_t smallest = std::min({stack.hidden, stack.inner, qkv_units(stack)});
  plan.blocks = static_cast<int>(std::min<int64_t>(current_cuda_device().multiprocessors, smallest));
  const int pass_rows = stack.rows <= 4 ? 96 : 80;
  const auto cut = [&](int64_t k, int64_t units, int sides) {
    return plan_linear(k, units, plan.blocks, sides, pass_rows);
  };
  p.linear[kStackQkv] = cut(stack.hidden, qkv_units(stack), 1);
  p.linear[kStackO] = cut(int64_t{stack.heads} * stack.head_size, stack.hidden, 1);
  p.linear[kStackGateUp] = cut(stack.hidden, stack.inner, 2);
  p.linear[kStackDown] = cut(stack.inner, stack.hidden, 1);
  p.linear[kStackQkv].has_norm = p.linear[kStackGateUp].has_norm = true;
  p.rows = static_cast<int>(stack.rows);
  p.unit_shift = 8 - std::bit_width(static_cast<uint64_t>(stack.rows - 1));
  p.attention.splits = split_count(stack, plan.blocks);
  p.attention_units = static_cast<int>(stack.rows * stack.kv_heads * p.attention.splits);
  p.join_units = p.attention.splits > 1 ? static_cast<int>(stack.rows * stack.heads) : 0;
  for (int kind = 0; kind < 4; ++kind) {
    const StackLinear& linear = p.linear[kind];
    const bool one_pass = divide_up(linear.units, plan.blocks) <= linear.pass_units;
    if (!one_pass && (linear.k > kStackPart || kind == kStackQkv)) return false;
  }
  return std::max(p.attention_units, p.join_units) <= plan.blocks && place(p, stack, plan.blocks);
}

/// The state, in the order of the pointers of StackParams. Returns its bytes.
size_t place_state(StackParams& p, const DecodeStack& stack) {
  const int64_t q = int64_t{stack.heads} * stack.head_size;
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    void* at = static_cast<char*>(stack.state) + bytes;
    bytes = round_up(bytes + size, 256);
    return at;
  };
  p.linear[kStackQkv].y = take(stack.rows * qkv_units(stack) * 2);
  p.linear[kStackO].x = take(stack.rows * q * 2);
  p.linear[kStackGateUp].x = p.linear[kStackO].y = take(stack.rows * stack.hidden * 2);
  p.linear[kStackDown].x = p.linear[kStackGateUp].y = take(stack.rows * stack.inner * 2);
  p.linear[kStackQkv].x = p.linear[kStackDown].y = take(stack.rows * stack.hidden * 2);
  p.parts = static_cast<float*>(take(stack.rows * q * p.attention.splits * 4));
  p.states = static_cast<float2*>(take(stack.rows * stack.heads * p.attention.splits * 8));
  return static_cast<size_t>(bytes);
}

void fill_attention(DecodeAttentionParams& a, const DecodeStack& stack) {
  constexpr float kLog2E = 1.4426950408889634f;
  a.cos = stack.cos;
  a.sin = stack.sin;
  a.block_tables = stack.block_tables;
  a.slots = stack.slots;
  a.seq_len = stack.seq_len;
  a.fault = stack.fault;
  a.table_width = stack.table_width;
  a.heads = stack.heads;
  a.kv_heads = stack.kv_heads;
  a.block_size = static_cast<int>(stack.block_size);
  a.blocks = static_cast<int>(stack.blocks);
  a.head_tiles = 1;
  const auto size = static_cast<uint64_t>(stack.block_size);
  a.block_shift = std::has_single_bit(size) ? std::countr_zero(size) : -1;
  a.scale_log2 = stack.scale * kLog2E;
}

void fill_layers(StackParams& p, const DecodeStack& stack) {
  p.layer_count = static_cast<int>(stack.layers.size());
  for (size_t i = 0; i < stack.layers.size(); ++i) {
    const DecodeStack::Layer& from = stack.layers[i];
    StackLayer& to = p.layers[i];
    for (int part = 0; part < 3; ++part) {
      to.qkv[part] = from.qkv[part];
      to.bias[part] = from.qkv_bias[part];
    }
    to.gamma[0] = from.attention_gamma;
    to.gamma[1] = from.mlp_gamma;
    to.o = from.o;
    to.gate = from.gate;
    to.up = from.up;
    to.down = from.down;
    to.k_cache = from.k_cache;
    to.v_cache = from.v_cache;
  }
}

template <class T, int kD>
void launch(const StackPlan& plan, void* stream) {
  const auto kernel = decode_stack_kernel<T, kD>;
  allow_shared_memory(kernel, kSharedBytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kStackThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;  // no block waits for one that has no place
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, plan.params), "decode_stack");
}

template <class T>
void launch_head_size(const StackPlan& plan, int head_size, void* stream) {
  head_size == 64 ? launch<T, 64>(plan, stream) : launch<T, 128>(plan, stream);
}

}  // namespace

bool decode_stack_fits(const DecodeStack& stack) {
  const DecodeStack& s = stack;
  if (!current_cuda_device().hopper) return false;
  if (s.dtype != DType::kBFloat16 && s.dtype != DType::kFloat16) return false;
  if (s.rows < 1 || s.rows > kStackMaxRows || s.layers.empty() || s.layers.size() > kStackMaxLayers)
    return false;
  if (s.head_size != 64 && s.head_size != 128) return false;
  if (s.heads < 1 || s.kv_heads < 1 || s.heads % s.kv_heads != 0 || s.heads / s.kv_heads > kDecodeHeads)
    return false;
  if (s.hidden < 32 || s.hidden % 32 != 0 || s.hidden > kStackPart || s.inner < 32 || s.inner % 32 != 0)
    return false;
  if (s.inner > (1 << 20) || s.heads > (1 << 12)) return false;
  if (s.qkv_units[0] + s.qkv_units[1] + s.qkv_units[2] != qkv_units(s)) return false;
  if (s.block_size < 1 || s.table_width < 1 || s.blocks * s.block_size >= INT_MAX ||
      s.table_width * s.block_size >= INT_MAX)
    return false;
  if (!is_aligned(s.x) || !is_aligned(s.cos) || !is_aligned(s.sin) || !is_aligned(s.y)) return false;
  for (const DecodeStack::Layer& layer : s.layers) {
    for (const void* pointer :
         {layer.qkv[0], layer.qkv[1], layer.qkv[2], layer.attention_gamma, layer.o, layer.mlp_gamma,
          layer.gate, layer.up, layer.down, static_cast<const void*>(layer.k_cache),
          static_cast<const void*>(layer.v_cache)}) {
      if (!is_aligned(pointer)) return false;
    }
  }
  StackPlan plan;
  return plan_stack(plan, stack);
}

bool decode_stack_pays(const DecodeStack& stack) {
  // Larger layers take so long to read that what lies between their launches matters less than how evenly
  // the launches read.
  return stack.hidden <= kStackChunk && decode_stack_fits(stack);
}

size_t decode_stack_state_bytes(const DecodeStack& stack) {
  StackPlan plan;
  plan_stack(plan, stack);
  return place_state(plan.params, stack);
}

void decode_stack(const DecodeStack& stack, void* stream) {
  check(decode_stack_fits(stack), "decode_stack: ", stack.rows, " rows, hidden ", stack.hidden,
        " do not fit");
  StackPlan plan;
  plan_stack(plan, stack);
  StackParams& p = plan.params;
  place_state(p, stack);
  fill_attention(p.attention, stack);
  fill_layers(p, stack);
  p.x = stack.x;
  p.y = stack.y;
  p.epsilon = stack.epsilon;
  p.inverse_hidden = 1 / static_cast<float>(stack.hidden);
#ifdef MODELTORCH_STACK_STAMPS
  p.stamps = stack.stamps;
#endif
  int64_t begin = 0;
  for (int part = 0; part < 3; ++part) {
    p.part_begin[part] = stack.qkv_units[part] ? static_cast<int>(begin) : INT_MAX;
    begin += stack.qkv_units[part];
  }
  if (stack.dtype == DType::kBFloat16) return launch_head_size<__nv_bfloat16>(plan, stack.head_size, stream);
  return launch_head_size<__half>(plan, stack.head_size, stream);
}

}  // namespace modeltorch
