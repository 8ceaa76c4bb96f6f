#include "ops/argmax_rows.h"

#include <cooperative_groups.h>

#include "ops/cuda_kernel.cuh"
#include "ops/launch.cuh"
#include "ops/ptx.cuh"

namespace modeltorch {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLoads = 4;  // of 16 bytes that a thread has on the way
constexpr int kMostParts = 8;

// A value and its place as one number, in which the larger value is the larger number, NaN the largest of
// all, and the first of equals the larger. 0 stands for none.
using Key = unsigned long long;

__device__ __forceinline__ uint32_t rank_of(float value) {
  if (value != value) return ~0u;
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 equals 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ Key larger(Key a, Key b) {
  return a > b ? a : b;
}

__device__ __forceinline__ Key warp_largest(Key key) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    key = larger(key, __shfl_xor_sync(~0u, key, offset));
  return key;
}

struct ArgmaxParams {
  const void* x;
  int64_t* y;
  uint32_t size;
  int parts;  // blocks that share a row: a cluster
};

// The largest element of this block's share of a row. N elements come with one load.
template <class T, int N>
__device__ __forceinline__ Key thread_largest(const T* row, uint32_t size, int part, int parts) {
  struct alignas(N * sizeof(T)) Load {
    T values[N];
  };
  const auto* loads = reinterpret_cast<const Load*>(row);
  const uint32_t count = size / N, step = parts * kThreads;
  uint32_t best = 0, place = 0;
  for (uint32_t first = part * kThreads + threadIdx.x; first < count; first += kLoads * step) {
    Load held[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * step < count) held[i] = loads[first + i * step];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * step >= count) break;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const uint32_t rank = rank_of(to_float(held[i].values[j]));
        if (rank <= best) continue;
        best = rank;
        place = (first + i * step) * N + j;
      }
    }
  }
  return best == 0 ? 0 : static_cast<Key>(best) << 32 | ~place;
}

// Grid: parts of the first row, parts of the second, ...
template <class T, int N>
__global__ void __launch_bounds__(kThreads) argmax_kernel(const __grid_constant__ ArgmaxParams p) {
  __shared__ Key of_warp[kWarps];
  __shared__ Key of_block[kMostParts];
  const uint32_t row = blockIdx.x / p.parts;
  const int part = static_cast<int>(blockIdx.x % p.parts);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  ptx::wait_for_dependencies();
  Key key = thread_largest<T, N>(static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.size, p.size,
                                 part, p.parts);
  key = warp_largest(key);
  if (lane == 0) of_warp[warp] = key;
  __syncthreads();
  if (warp == 0) key = warp_largest(lane < kWarps ? of_warp[lane] : 0);
#if MODELTORCH_PTX_HOPPER
  if (p.parts > 1) {
    cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    cluster.sync();  // the first block has begun
    if (threadIdx.x == 0) cluster.map_shared_rank(of_block, 0)[part] = key;
    cluster.sync();
    if (warp == 0) key = warp_largest(lane < p.parts ? of_block[lane] : 0);
  }
#endif
  if (part == 0 && threadIdx.x == 0) p.y[row] = static_cast<uint32_t>(~key);
}

class ArgmaxRowsCuda final : public Kernel {
 public:
  explicit ArgmaxRowsCuda(const KernelSetup& setup) : dtype_(setup.inputs[0].dtype) {
    for_type(dtype_, [](auto) {});
  }

  void run(const KernelArgs& args) override {
    const int64_t rows = args.in(0).dims[0];
    const int64_t size = args.in(0).dims[1];
    if (rows == 0) return;
    check(size <= INT32_MAX && rows <= INT32_MAX / kMostParts,
          "CUDA chooses among fewer than 2^31 elements in fewer than 2^28 rows, got ", args.in(0));
    ArgmaxParams params{args.in(0).data, args.out(0).as<int64_t>(), static_cast<uint32_t>(size), 1};
    const CudaDevice& device = current_cuda_device();
    while (device.hopper && params.parts < kMostParts && 2 * params.parts * rows <= device.multiprocessors &&
           size > params.parts * kThreads) {
      params.parts *= 2;
    }
    for_type(dtype_, [&](auto type) {
      using T = Pointee<decltype(type)>;
      const bool wide = packs_fit<T>(size, params.x);
      const LaunchShape shape{.grid = dim3(static_cast<unsigned>(params.parts * rows)),
                              .threads = kThreads,
                              .cluster = params.parts};
      launch_kernel(wide ? argmax_kernel<T, Pack<T>::kSize> : argmax_kernel<T, 1>, shape, args.stream,
                    "ArgmaxRows", params);
    });
  }

 private:
  DType dtype_;
};

const bool registered = register_cuda<ArgmaxRows, ArgmaxRowsCuda>();

}  // namespace
}  // namespace modeltorch
