// SplitQkv, Rope and ReshapeAndCache as single operations; RopeAttention does all of them in one launch.

#include "ops/cuda_kernel.cuh"
#include "ops/reshape_and_cache.h"
#include "ops/rope.h"
#include "ops/split_qkv.h"

namespace modeltorch {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
    split_kernel(const T* qkv, int64_t q_size, int64_t kv_size, T* q, T* k, T* v) {
  const int64_t token = blockIdx.x;
  const int64_t row_size = q_size + 2 * kv_size;
  for (int64_t at = threadIdx.x; at < row_size; at += kThreads) {
    const T value = qkv[token * row_size + at];
    if (at < q_size) {
      q[token * q_size + at] = value;
    } else if (at < q_size + kv_size) {
      k[token * kv_size + at - q_size] = value;
    } else {
      v[token * kv_size + at - q_size - kv_size] = value;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const T* x, const T* cos, const T* sin, int64_t heads, int64_t size, T* y) {
  const int64_t token = blockIdx.x;
  const int64_t half = size / 2;
  for (int64_t pair = threadIdx.x; pair < heads * half; pair += kThreads) {
    const int64_t at = (token * heads + pair / half) * size + pair % half;
    const int64_t turn = token * size + pair % half;
    const float low = to_float(x[at]);
    const float high = to_float(x[at + half]);
    y[at] = from_float<T>(low * to_float(cos[turn]) - high * to_float(sin[turn]));
    y[at + half] = from_float<T>(high * to_float(cos[turn + half]) + low * to_float(sin[turn + half]));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cache_kernel(const T* k, const T* v, const int32_t* slots, int64_t size, int64_t cache_rows, T* k_cache,
                 T* v_cache, int32_t* fault) {
  const int64_t token = blockIdx.x;
  const int64_t slot = slots[token];
  if (slot < 0 || slot >= cache_rows) {
    if (slot != -1 && threadIdx.x == 0) *fault = 1;
    return;
  }
  for (int64_t at = threadIdx.x; at < size; at += kThreads) {
    k_cache[slot * size + at] = k[token * size + at];
    v_cache[slot * size + at] = v[token * size + at];
  }
}

class SplitQkvCuda final : public CudaKernel<SplitQkv> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    const int64_t tokens = args.in(0).dims[0];
    if (tokens == 0) return;
    for_type(dtype_, [&](auto type) {
      using T = Pointee<decltype(type)>;
      split_kernel<<<blocks_for(tokens, 1), kThreads, 0, stream_of(args)>>>(
          args.in(0).as<const T>(), op_.heads * op_.head_size, op_.kv_heads * op_.head_size,
          args.out(0).as<T>(), args.out(1).as<T>(), args.out(2).as<T>());
      check_launch("SplitQkv");
    });
  }
};

class RopeCuda final : public CudaKernel<Rope> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    if (args.in(0).dims[0] == 0) return;
    for (const int part : {0, 1}) {
      for_type(dtype_, [&](auto type) {
        using T = Pointee<decltype(type)>;
        const TensorView& x = args.in(part);
        rope_kernel<<<blocks_for(x.dims[0], 1), kThreads, 0, stream_of(args)>>>(
            x.as<const T>(), args.in(2).as<const T>(), args.in(3).as<const T>(), x.dims[1], x.dims[2],
            args.out(part).as<T>());
        check_launch("Rope");
      });
    }
  }
};

class ReshapeAndCacheCuda final : public CudaKernel<ReshapeAndCache> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    const TensorView& k = args.in(0);
    if (k.dims[0] == 0) return;
    for_type(dtype_, [&](auto type) {
      using T = Pointee<decltype(type)>;
      cache_kernel<<<blocks_for(k.dims[0], 1), kThreads, 0, stream_of(args)>>>(
          k.as<const T>(), args.in(1).as<const T>(), args.in(4).as<const int32_t>(), k.dims[1] * k.dims[2],
          args.in(2).dims[0] * args.in(2).dims[1], args.in(2).as<T>(), args.in(3).as<T>(),
          session_.fault(CudaFault::kSlot));
      check_launch("ReshapeAndCache");
    });
  }
};

const bool split_registered = register_cuda<SplitQkv, SplitQkvCuda>();
const bool rope_registered = register_cuda<Rope, RopeCuda>();
const bool cache_registered = register_cuda<ReshapeAndCache, ReshapeAndCacheCuda>();

}  // namespace
}  // namespace modeltorch
