#include "ops/rope_attention.h"

#include <algorithm>

#include "core/arithmetic.h"
#include "device/cuda_layers.h"
#include "ops/cuda_kernel.cuh"
#include "ops/decode_attention.h"
#include "ops/launch.cuh"
#include "ops/plain_attention.h"
#include "ops/prefill_attention.h"
#include "ops/ptx.cuh"

namespace modeltorch {
namespace {

constexpr int kMostThreads = 256;

// Turns the query and key heads of one token in place, and writes keys and values to the cache. N consecutive
// elements of each half of a head at a time.
struct RopeRows {
  int64_t heads;
  int64_t kv_heads;
  int64_t size;
  const int32_t* slots;
  int64_t cache_rows;
  int32_t* fault;
};

template <class T, int N>
struct alignas(N * sizeof(T)) Group {
  T values[N];
};

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads)
    rope_rows_kernel(T* qkv, const T* cos, const T* sin, const RopeRows rows, T* k_cache, T* v_cache) {
  using G = Group<T, N>;
  ptx::begin_behind_the_kernel_in_front();
  const int64_t token = blockIdx.x;
  const int64_t half = rows.size / 2;
  const int64_t per_half = half / N;
  const int64_t kv_size = rows.kv_heads * rows.size;
  T* row = qkv + token * (rows.heads + 2 * rows.kv_heads) * rows.size;
  int64_t slot = rows.slots[token];
  if (slot < 0 || slot >= rows.cache_rows) {
    if (slot != -1 && threadIdx.x == 0) *rows.fault = 1;
    slot = -1;
  }
  for (int64_t item = threadIdx.x; item < (rows.heads + rows.kv_heads) * per_half; item += blockDim.x) {
    const int64_t head = item / per_half;
    const int64_t at = item % per_half * N;
    G low = *reinterpret_cast<const G*>(row + head * rows.size + at);
    G high = *reinterpret_cast<const G*>(row + head * rows.size + half + at);
    const G cos_low = *reinterpret_cast<const G*>(cos + token * rows.size + at);
    const G sin_low = *reinterpret_cast<const G*>(sin + token * rows.size + at);
    const G cos_high = *reinterpret_cast<const G*>(cos + token * rows.size + half + at);
    const G sin_high = *reinterpret_cast<const G*>(sin + token * rows.size + half + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x = to_float(low.values[i]);
      const float y = to_float(high.values[i]);
      low.values[i] = from_float<T>(x * to_float(cos_low.values[i]) - y * to_float(sin_low.values[i]));
      high.values[i] = from_float<T>(y * to_float(cos_high.values[i]) + x * to_float(sin_high.values[i]));
    }
    *reinterpret_cast<G*>(row + head * rows.size + at) = low;
    *reinterpret_cast<G*>(row + head * rows.size + half + at) = high;
    if (head < rows.heads || slot < 0) continue;
    T* key = k_cache + slot * kv_size + (head - rows.heads) * rows.size;
    *reinterpret_cast<G*>(key + at) = low;
    *reinterpret_cast<G*>(key + half + at) = high;
  }
  if (slot < 0) return;
  const T* value = row + (rows.heads + rows.kv_heads) * rows.size;
  for (int64_t item = threadIdx.x; item < kv_size / N; item += blockDim.x) {
    reinterpret_cast<G*>(v_cache + slot * kv_size)[item] = reinterpret_cast<const G*>(value)[item];
  }
}

// Of a block that has so many items to go through.
int threads_for(int64_t items) {
  return static_cast<int>(std::clamp<int64_t>(round_up(items, kWarpSize), kWarpSize, kMostThreads));
}

class RopeAttentionCuda final : public CudaKernel<RopeAttention>, public HasDecodeTask {
 public:
  explicit RopeAttentionCuda(const KernelSetup& setup) : CudaKernel(setup) {
    const int64_t rows = setup.inputs[0].dims[0];
    const auto heads = static_cast<int>(op_.shape.heads);
    const auto kv_heads = static_cast<int>(op_.shape.kv_heads);
    const auto head_size = static_cast<int>(op_.shape.head_size);
    if (op_.is_paged) {
      workspace_bytes_ = decode_attention_workspace(
          {.dtype = dtype_, .sequences = rows, .heads = heads, .kv_heads = kv_heads, .head_size = head_size});
    } else {
      workspace_bytes_ = prefill_attention_workspace({.dtype = dtype_,
                                                      .tokens = rows,
                                                      .sequences = setup.inputs[6].dims[0],
                                                      .heads = heads,
                                                      .kv_heads = kv_heads,
                                                      .head_size = head_size});
    }
  }

  void run(const KernelArgs& args) override {
    if (args.in(0).dims[0] == 0) return;
    if (op_.is_paged && decode(args)) return;
    rope(args);
    if (!op_.is_paged && prefill(args)) return;
    attend(args);
  }

  size_t workspace_bytes() const override { return workspace_bytes_; }

  DecodeTask decode_task(const KernelArgs& args) const override {
    return op_.is_paged ? DecodeTask(decode_attention_of(args)) : DecodeTask();
  }

 private:
  DecodeAttention decode_attention_of(const KernelArgs& args) const {
    const TensorView& cache = args.in(3);
    return {.dtype = dtype_,
            .sequences = args.in(0).dims[0],
            .heads = static_cast<int>(op_.shape.heads),
            .kv_heads = static_cast<int>(op_.shape.kv_heads),
            .head_size = static_cast<int>(op_.shape.head_size),
            .scale = op_.shape.scale,
            .qkv = args.in(0).data,
            .cos = args.in(1).data,
            .sin = args.in(2).data,
            .k_cache = cache.data,
            .v_cache = args.in(4).data,
            .block_size = cache.dims[1],
            .block_tables = args.in(7).as<const int32_t>(),
            .table_width = args.in(7).dims[1],
            .blocks = cache.dims[0],
            .slots = args.in(5).as<const int32_t>(),
            .seq_len = args.in(6).as<const int32_t>(),
            .y = args.out(0).data,
            .max_context = args.in(7).dims[1] * cache.dims[1],
            .workspace = args.workspace,
            .fault = session_.fault(CudaFault::kBlock)};
  }

  // Everything in one launch, if there is a kernel for it.
  bool decode(const KernelArgs& args) {
    const DecodeAttention attention = decode_attention_of(args);
    if (!decode_attention_fits(attention)) return false;
    decode_attention(attention, args.stream);
    return true;
  }

  // Attention of roped prompts, if there is a kernel for it.
  bool prefill(const KernelArgs& args) {
    const AttentionShape& shape = op_.shape;
    const auto size = static_cast<int64_t>(dtype_size(dtype_));
    const std::byte* qkv = args.in(0).as<const std::byte>();
    const std::byte* k = qkv + shape.heads * shape.head_size * size;
    const int64_t stride = args.in(0).dims[1];
    const PrefillAttention attention{.dtype = dtype_,
                                     .tokens = args.in(0).dims[0],
                                     .sequences = args.in(6).dims[0],
                                     .heads = static_cast<int>(shape.heads),
                                     .kv_heads = static_cast<int>(shape.kv_heads),
                                     .head_size = static_cast<int>(shape.head_size),
                                     .scale = shape.scale,
                                     .q = qkv,
                                     .q_stride = stride,
                                     .k = k,
                                     .k_stride = stride,
                                     .v = k + shape.kv_heads * shape.head_size * size,
                                     .v_stride = stride,
                                     .seq_len = args.in(6).as<const int32_t>(),
                                     .y = args.out(0).data,
                                     .workspace = args.workspace};
    if (!prefill_attention_fits(attention)) return false;
    prefill_attention(attention, args.stream);
    return true;
  }

  void rope(const KernelArgs& args) {
    const AttentionShape& shape = op_.shape;
    const RopeRows rows{.heads = shape.heads,
                        .kv_heads = shape.kv_heads,
                        .size = shape.head_size,
                        .slots = args.in(5).as<const int32_t>(),
                        .cache_rows = args.in(3).dims[0] * args.in(3).dims[1],
                        .fault = session_.fault(CudaFault::kSlot)};
    const int64_t pairs = (shape.heads + shape.kv_heads) * shape.head_size / 2;
    for_type(dtype_, [&](auto type) {
      using T = Pointee<decltype(type)>;
      const auto launch = [&](auto kernel, int64_t items) {
        allow_shared_memory(kernel, 0);
        launch_kernel(kernel, {dim3(blocks_for(args.in(0).dims[0], 1)), threads_for(items)}, args.stream,
                      "RopeAttention", args.in(0).as<T>(), args.in(1).as<const T>(), args.in(2).as<const T>(),
                      rows, args.in(3).as<T>(), args.in(4).as<T>());
      };
      if (packs_fit<T>(shape.head_size / 2, args.in(0).data, args.in(1).data, args.in(2).data,
                       args.in(3).data, args.in(4).data)) {
        launch(rope_rows_kernel<T, Pack<T>::kSize>, pairs / Pack<T>::kSize);
      } else {
        launch(rope_rows_kernel<T, 1>, pairs);
      }
    });
  }

  void attend(const KernelArgs& args) {
    const AttentionShape& shape = op_.shape;
    const auto size = static_cast<int64_t>(dtype_size(dtype_));
    const std::byte* qkv = args.in(0).as<const std::byte>();
    const std::byte* k = qkv + shape.heads * shape.head_size * size;
    PlainAttention attention{.dtype = dtype_,
                             .shape = shape,
                             .rows = args.in(0).dims[0],
                             .q = qkv,
                             .q_stride = args.in(0).dims[1],
                             .k = k,
                             .v = k + shape.kv_heads * shape.head_size * size,
                             .kv_stride = args.in(0).dims[1],
                             .seq_len = args.in(6).as<const int32_t>(),
                             .sequences = args.in(6).dims[0],
                             .y = args.out(0).data,
                             .fault = session_.fault(CudaFault::kBlock)};
    if (op_.is_paged) {
      attention.k = args.in(3).data;
      attention.v = args.in(4).data;
      attention.kv_stride = shape.kv_heads * shape.head_size;
      attention.block_tables = args.in(7).as<const int32_t>();
      attention.table_width = args.in(7).dims[1];
      attention.block_size = args.in(3).dims[1];
      attention.blocks = args.in(3).dims[0];
    }
    plain_attention(attention, args.stream);
  }

  size_t workspace_bytes_ = 0;
};

const bool registered = register_cuda<RopeAttention, RopeAttentionCuda>();

}  // namespace
}  // namespace modeltorch
