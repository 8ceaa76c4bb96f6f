#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace modeltorch {

/// Causal self attention over sequences that lie one behind the other, for CUDA devices:
///
///     y[i, h] = sum over j <= i of softmax_j(scale * q[i, h] . k[j, h / group]) * v[j, h / group]
///
/// with i and j rows of the same sequence and group = heads / kv_heads. Scores, the softmax and the sums are
/// float32; the weights are rounded to T before they meet the values, as FlashAttention does.
///
/// | tensor  | shape                          | dtype | note                                              |
/// |---------|--------------------------------|-------|---------------------------------------------------|
/// | q       | [tokens, heads * head_size]    | T     | rows lie q_stride elements apart; rope is applied |
/// | k, v    | [tokens, kv_heads * head_size] | T     | rows lie k_stride and v_stride elements apart     |
/// | seq_len | [sequences]                    | int32 | read on the device; 0 is an empty sequence        |
/// | y       | [tokens, heads * head_size]    | T     | rows beyond the sum of seq_len are left alone     |
///
/// T is bfloat16 or float16. Source: Dao, "FlashAttention-2" (2023); Shah et al., "FlashAttention-3" (2024).
struct PrefillAttention {
  DType dtype = DType::kBFloat16;
  int64_t tokens = 0;     ///< rows of the bucket, at least the sum of seq_len
  int64_t sequences = 0;  ///< of the bucket
  int heads = 0;
  int kv_heads = 0;
  int head_size = 0;
  float scale = 1.0f;
  const void* q = nullptr;
  int64_t q_stride = 0;
  const void* k = nullptr;
  int64_t k_stride = 0;
  const void* v = nullptr;
  int64_t v_stride = 0;
  const int32_t* seq_len = nullptr;
  void* y = nullptr;
  void* workspace = nullptr;
};

/// Whether prefill_attention can do this: head sizes 64, 80, 96, 128 and 256, a positive scale, heads a
/// multiple of kv_heads, rows and strides on 16 bytes.
bool prefill_attention_fits(const PrefillAttention& attention);

/// Bytes of workspace; today none.
size_t prefill_attention_workspace(const PrefillAttention& attention);

/// Launches on `stream`, a cudaStream_t of the current device. Nothing of seq_len is read on the host, so a
/// captured launch serves every step of its bucket. Throws Error if the launch fails.
void prefill_attention(const PrefillAttention& attention, void* stream);

}  // namespace modeltorch
