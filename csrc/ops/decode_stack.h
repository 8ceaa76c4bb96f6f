#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace modeltorch {

/// All decoder layers of a decode step of at most eight rows on one Hopper device, in one launch. A layer is
///   x += o(attention(rope(qkv(norm(x)))));  x += down(silu(gate(norm(x))) * up(norm(x)))
/// with the parts of few_row_linear.h and decode_attention.h.
///
/// | tensor           | shape                                     | dtype | note                           |
/// |------------------|-------------------------------------------|-------|--------------------------------|
/// | x                | [rows, hidden]                            | T     |                                |
/// | cos, sin         | [rows, head_size]                         | T     | rows of these tokens           |
/// | qkv              | [units, hidden]                           | T     | up to three parts, with biases |
/// | o                | [hidden, heads * head_size]               | T     |                                |
/// | gate, up         | [inner, hidden]                           | T     |                                |
/// | down             | [hidden, inner]                           | T     |                                |
/// | k_cache, v_cache | [blocks, block_size, kv_heads, head_size] | T     |                                |
/// | block_tables     | [rows, table_width]                       | int32 |                                |
/// | slots            | [rows]                                    | int32 | -1: write no row of the cache  |
/// | seq_len          | [rows]                                    | int32 | with the new token; 0: padding |
/// | y                | [rows, hidden]                            | T     | may be x                       |
/// | fault            | [1]                                       | int32 | as in decode_attention.h       |
///
/// T is bfloat16 or float16; sums are float32 and their order is fixed.
struct DecodeStack {
  struct Layer {
    const void* qkv[3] = {};
    const void* qkv_bias[3] = {};
    const void* attention_gamma = nullptr;
    const void* o = nullptr;
    const void* mlp_gamma = nullptr;
    const void* gate = nullptr;
    const void* up = nullptr;
    const void* down = nullptr;
    void* k_cache = nullptr;
    void* v_cache = nullptr;
  };

  DType dtype = DType::kBFloat16;
  int64_t rows = 0;
  int64_t hidden = 0;
  int64_t inner = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_size = 0;
  float epsilon = 0;
  float scale = 0;
  std::vector<Layer> layers;
  int64_t qkv_units[3] = {};  ///< rows of each part; 0 where there is none
  const void* x = nullptr;
  const void* cos = nullptr;
  const void* sin = nullptr;
  int64_t block_size = 0;
  const int32_t* block_tables = nullptr;
  int64_t table_width = 0;
  int64_t blocks = 0;
  const int32_t* slots = nullptr;
  const int32_t* seq_len = nullptr;
  void* y = nullptr;
  /// decode_stack_state_bytes() bytes that only launches of these sizes use, one after the other, and that
  /// were all ones (0xff) before the first.
  void* state = nullptr;
  int32_t* fault = nullptr;
#ifdef MODELTORCH_STACK_STAMPS
  long long* stamps = nullptr;
#endif
};

/// False: a device, dtype, shape or alignment that this launch does not serve.
bool decode_stack_fits(const DecodeStack& stack);

/// True if the launch fits and is faster than those of its parts.
bool decode_stack_pays(const DecodeStack& stack);

size_t decode_stack_state_bytes(const DecodeStack& stack);

/// Launches `stack` on `stream` (a cudaStream_t). Throws Error if CUDA refuses the launch.
void decode_stack(const DecodeStack& stack, void* stream);

}  // namespace modeltorch
