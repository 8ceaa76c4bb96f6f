#include "ops/plain_attention.h"

#include "ops/cuda_kernel.cuh"
#include "ops/paged_attention.h"
#include "ops/self_attention.h"

namespace modeltorch {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// What a block reads: one query in one head against `limit` keys.
struct Keys {
  int64_t limit = 0;
  int64_t start = 0;               // first row, for packed prompts
  const int32_t* table = nullptr;  // of the sequence, for a paged cache
};

// The sequence that packed row `row` belongs to: it sees its own rows up to itself.
__device__ Keys packed_keys(const PlainAttention& args, int64_t row) {
  int64_t start = 0;
  for (int64_t sequence = 0; sequence < args.sequences; ++sequence) {
    const int64_t length = args.seq_len[sequence];
    if (length < 0) break;
    if (row < start + length) return {row - start + 1, start, nullptr};
    start += length;
  }
  return {};
}

__device__ Keys paged_keys(const PlainAttention& args, int64_t row) {
  const int64_t length = args.seq_len[row];
  const int64_t room = args.table_width * args.block_size;
  if ((length < 0 || length > room) && threadIdx.x == 0) *args.fault = 1;
  return {length < 0 ? 0 : length > room ? room : length, 0, args.block_tables + row * args.table_width};
}

// The row of k and v that holds a key, or -1 where its block is outside the cache.
__device__ __forceinline__ int64_t key_row(const PlainAttention& args, const Keys& keys, int64_t key) {
  if (keys.table == nullptr) return keys.start + key;
  const int64_t block = keys.table[key / args.block_size];
  if (block >= 0 && block < args.blocks) return block * args.block_size + key % args.block_size;
  *args.fault = 1;
  return -1;
}

template <class T>
__device__ float dot(const float* q, const T* k, int64_t size, bool packed) {
  float sum = 0.0f;
  if (packed) {
    for (int64_t at = 0; at < size; at += Pack<T>::kSize) {
      const Pack<T> pack = load_pack(k + at);
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) sum += q[at + i] * to_float(pack.values[i]);
    }
    return sum;
  }
  for (int64_t at = 0; at < size; ++at) sum += q[at] * to_float(k[at]);
  return sum;
}

// Online softmax of one warp: 32 keys at a time, one a lane; every lane sums kPerLane elements of the output.
template <class T, int kPerLane>
struct WarpAttention {
  float most = -INFINITY;
  float total = 0.0f;
  float out[kPerLane] = {};

  __device__ void add(const PlainAttention& args, const Keys& keys, const float* q, int64_t kv_head,
                      int64_t first, bool packed) {
    const int64_t size = args.shape.head_size;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t key = first + lane;
    const int64_t row = key < keys.limit ? key_row(args, keys, key) : -1;
    const int64_t offset = row * args.kv_stride + kv_head * size;
    const float score = row < 0 ? -INFINITY : dot(q, static_cast<const T*>(args.k) + offset, size, packed);
    const float now = fmaxf(most, warp_max(score));
    if (now == -INFINITY) return;
    const float shrink = expf(most - now);
    const float weight = expf(score - now);
    total = total * shrink + warp_sum(weight);
    most = now;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[i] *= shrink;
    for (int from = 0; from < kWarpSize; ++from) {
      const float factor = __shfl_sync(~0u, weight, from);
      const int64_t value_at = __shfl_sync(~0u, offset, from);
      if (factor == 0.0f) continue;
      const T* value = static_cast<const T*>(args.v) + value_at;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int at = i * kWarpSize + lane;
        if (at < size) out[i] += factor * to_float(value[at]);
      }
    }
  }
};

// A block a row and head; its warps share the keys and join their sums at the end.
template <class T, int kPerLane>
__global__ void __launch_bounds__(kThreads) attention_kernel(const PlainAttention args, bool packed) {
  __shared__ float q[kPerLane * kWarpSize];
  __shared__ float outs[kWarps][kPerLane * kWarpSize];
  __shared__ float mosts[kWarps];
  __shared__ float totals[kWarps];
  const int64_t row = blockIdx.x;
  const int64_t head = blockIdx.y;
  const int64_t size = args.shape.head_size;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const Keys keys = args.block_tables == nullptr ? packed_keys(args, row) : paged_keys(args, row);
  const T* query = static_cast<const T*>(args.q) + row * args.q_stride + head * size;
  for (int64_t at = threadIdx.x; at < size; at += kThreads) q[at] = to_float(query[at]) * args.shape.scale;
  __syncthreads();
  WarpAttention<T, kPerLane> mine;
  for (int64_t first = warp * kWarpSize; first < keys.limit; first += kThreads)
    mine.add(args, keys, q, head / (args.shape.heads / args.shape.kv_heads), first, packed);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) outs[warp][i * kWarpSize + lane] = mine.out[i];
  if (lane == 0) {
    mosts[warp] = mine.most;
    totals[warp] = mine.total;
  }
  __syncthreads();
  float most = -INFINITY;
  for (int other = 0; other < kWarps; ++other) most = fmaxf(most, mosts[other]);
  float total = 0.0f;
  for (int other = 0; other < kWarps; ++other) {
    if (mosts[other] > -INFINITY) total += totals[other] * expf(mosts[other] - most);
  }
  T* y = static_cast<T*>(args.y) + (row * args.shape.heads + head) * size;
  for (int64_t at = threadIdx.x; at < size; at += kThreads) {
    float sum = 0.0f;
    for (int other = 0; other < kWarps; ++other) {
      if (mosts[other] > -INFINITY) sum += outs[other][at] * expf(mosts[other] - most);
    }
    y[at] = from_float<T>(total > 0.0f ? sum / total : 0.0f);
  }
}

template <class T>
void launch(const PlainAttention& args, cudaStream_t stream) {
  const int64_t size = args.shape.head_size;
  const bool packed = packs_fit<T>(size, args.k) && args.kv_stride % Pack<T>::kSize == 0;
  const dim3 grid(static_cast<unsigned>(args.rows), static_cast<unsigned>(args.shape.heads));
  const auto with = [&](auto kernel) { kernel<<<grid, kThreads, 0, stream>>>(args, packed); };
  if (size <= 64) {
    with(attention_kernel<T, 2>);
  } else if (size <= 128) {
    with(attention_kernel<T, 4>);
  } else if (size <= 256) {
    with(attention_kernel<T, 8>);
  } else if (size <= 512) {
    with(attention_kernel<T, 16>);
  } else {
    fail(ErrorKind::kNotImplemented, "CUDA has attention for heads of up to 512 elements, got ", size);
  }
  check_launch("plain_attention");
}

class SelfAttentionCuda final : public CudaKernel<SelfAttention> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    plain_attention({.dtype = dtype_,
                     .shape = op_.shape,
                     .rows = args.in(0).dims[0],
                     .q = args.in(0).data,
                     .q_stride = op_.shape.heads * op_.shape.head_size,
                     .k = args.in(1).data,
                     .v = args.in(2).data,
                     .kv_stride = op_.shape.kv_heads * op_.shape.head_size,
                     .seq_len = args.in(3).as<const int32_t>(),
                     .sequences = args.in(3).dims[0],
                     .y = args.out(0).data,
                     .fault = session_.fault(CudaFault::kBlock)},
                    args.stream);
  }
};

class PagedAttentionCuda final : public CudaKernel<PagedAttention> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    plain_attention({.dtype = dtype_,
                     .shape = op_.shape,
                     .rows = args.in(0).dims[0],
                     .q = args.in(0).data,
                     .q_stride = op_.shape.heads * op_.shape.head_size,
                     .k = args.in(1).data,
                     .v = args.in(2).data,
                     .kv_stride = op_.shape.kv_heads * op_.shape.head_size,
                     .seq_len = args.in(4).as<const int32_t>(),
                     .sequences = args.in(4).dims[0],
                     .block_tables = args.in(3).as<const int32_t>(),
                     .table_width = args.in(3).dims[1],
                     .block_size = args.in(1).dims[1],
                     .blocks = args.in(1).dims[0],
                     .y = args.out(0).data,
                     .fault = session_.fault(CudaFault::kBlock)},
                    args.stream);
  }
};

const bool self_registered = register_cuda<SelfAttention, SelfAttentionCuda>();
const bool paged_registered = register_cuda<PagedAttention, PagedAttentionCuda>();

}  // namespace

void plain_attention(const PlainAttention& args, void* stream) {
  if (args.rows == 0 || args.shape.heads == 0) return;
  for_type(args.dtype,
           [&](auto type) { launch<Pointee<decltype(type)>>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace modeltorch
