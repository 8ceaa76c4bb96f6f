#include "ops/prefill_attention.h"

#include <algorithm>
#include <cmath>

#include "core/arithmetic.h"
#include "core/check.h"
#include "ops/launch.cuh"
#include "ops/prefill_attention_mma.cuh"
#include "ops/prefill_attention_sm90.cuh"

namespace modeltorch {

namespace {

using prefill::Launch;

bool fits_vectors(const void* pointer, int64_t stride) {
  return is_aligned(pointer) && stride % 8 == 0;
}

template <class T>
Launch<T> describe(const PrefillAttention& attention) {
  Launch<T> launch{};
  launch.q = static_cast<const T*>(attention.q);
  launch.k = static_cast<const T*>(attention.k);
  launch.v = static_cast<const T*>(attention.v);
  launch.y = static_cast<T*>(attention.y);
  launch.seq_len = attention.seq_len;
  launch.q_stride = attention.q_stride;
  launch.k_stride = attention.k_stride;
  launch.v_stride = attention.v_stride;
  launch.y_stride = static_cast<int64_t>(attention.heads) * attention.head_size;
  launch.tokens = static_cast<int>(attention.tokens);
  launch.sequences = static_cast<int>(attention.sequences);
  launch.heads = attention.heads;
  launch.group = attention.heads / attention.kv_heads;
  launch.scale_log2 = attention.scale * 1.44269504088896340736f;
  return launch;
}

template <class T, int kHead, int kWarps, int kKeys>
void launch_mma(const PrefillAttention& attention, cudaStream_t stream) {
  using Tile = prefill::MmaTile<T, kHead, kWarps, kKeys>;
  const auto kernel = prefill::mma_prefill_kernel<T, kHead, kWarps, kKeys>;
  allow_shared_memory(kernel, Tile::kBytes);
  const int64_t blocks =
      prefill_tile_bound(attention.tokens, attention.sequences, Tile::kRows) * attention.heads;
  launch_kernel(kernel, {dim3(static_cast<unsigned>(blocks)), Tile::kThreads, Tile::kBytes}, stream,
                "prefill_attention", describe<T>(attention));
}

/// A box of `rows` rows of one head, as slices of 64 columns.
CUtensorMap head_map(const PrefillAttention& attention, const void* data, int64_t stride, int heads,
                     int rows) {
  const uint64_t slices = attention.head_size / 64, row_bytes = stride * 2;
  return hopper::tensor_map<4>(
      {data,
       attention.dtype == DType::kBFloat16,
       {64, static_cast<uint64_t>(attention.tokens), slices, static_cast<uint64_t>(heads)},
       {row_bytes, 128, slices * 128},
       {64, static_cast<uint32_t>(rows), static_cast<uint32_t>(slices), 1}});
}

template <class T, int kHead, int kConsumers>
void launch_sm90(const PrefillAttention& attention, cudaStream_t stream, int processors) {
  using Tile = prefill::Sm90Tile<T, kHead, kConsumers>;
  const auto kernel = prefill::sm90_prefill_kernel<T, Tile>;
  allow_shared_memory(kernel, Tile::kBytes);
  const prefill::Sm90Maps maps{
      head_map(attention, attention.q, attention.q_stride, attention.heads, Tile::kRows),
      head_map(attention, attention.k, attention.k_stride, attention.kv_heads, Tile::kKeys),
      head_map(attention, attention.v, attention.v_stride, attention.kv_heads, Tile::kKeys)};
  const int items = static_cast<int>(prefill_tile_bound(attention.tokens, attention.sequences, Tile::kRows) *
                                     attention.heads);
  const int blocks = std::min(items, processors);
  launch_kernel(kernel, {dim3(blocks), Tile::kThreads, Tile::kBytes}, stream, "prefill_attention",
                describe<T>(attention), maps, items);
}

template <class T>
void launch(const PrefillAttention& attention, cudaStream_t stream) {
  const auto& [processors, hopper] = current_cuda_device();
  if (hopper && attention.head_size == 128) {
    return launch_sm90<T, 128, 2>(attention, stream, processors);
  }
  if (hopper && attention.head_size == 64) {
    // Three warpgroups hide more of the softmax, two waste less on short sequences.
    const bool long_ones = attention.tokens / attention.sequences >= 3072;
    return long_ones ? launch_sm90<T, 64, 3>(attention, stream, processors)
                     : launch_sm90<T, 64, 2>(attention, stream, processors);
  }
  switch (attention.head_size) {
    case 64:
      return launch_mma<T, 64, 4, 64>(attention, stream);
    case 80:
      return launch_mma<T, 80, 4, 64>(attention, stream);
    case 96:
      return launch_mma<T, 96, 4, 64>(attention, stream);
    case 128:
      return launch_mma<T, 128, 4, 64>(attention, stream);
    case 256:
      return launch_mma<T, 256, 4, 32>(attention, stream);
    default:
      fail(ErrorKind::kNotImplemented, "prefill_attention: no kernel for head size ", attention.head_size);
  }
}

}  // namespace

bool prefill_attention_fits(const PrefillAttention& attention) {
  const int head = attention.head_size;
  return (attention.dtype == DType::kBFloat16 || attention.dtype == DType::kFloat16) &&
         (head == 64 || head == 80 || head == 96 || head == 128 || head == 256) && attention.kv_heads > 0 &&
         attention.heads % attention.kv_heads == 0 && attention.scale > 0.0f &&
         fits_vectors(attention.q, attention.q_stride) && fits_vectors(attention.k, attention.k_stride) &&
         fits_vectors(attention.v, attention.v_stride) && fits_vectors(attention.y, 0) &&
         attention.tokens < (int64_t{1} << 30);
}

size_t prefill_attention_workspace(const PrefillAttention&) {
  return 0;
}

void prefill_attention(const PrefillAttention& attention, void* stream) {
  if (attention.tokens == 0 || attention.sequences == 0) return;
  if (attention.dtype == DType::kBFloat16) {
    launch<__nv_bfloat16>(attention, static_cast<cudaStream_t>(stream));
  } else {
    launch<__half>(attention, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace modeltorch
