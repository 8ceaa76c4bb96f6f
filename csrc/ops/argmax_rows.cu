#include "ops/argmax_rows.h"

#include "ops/cuda_kernel.cuh"

namespace modeltorch {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 32;  // of a row, so that one row keeps many multiprocessors busy

// A value with its place. NaN is the largest; of equals the first counts.
struct Candidate {
  float value;
  int64_t index;  // -1: none
};

__device__ __forceinline__ Candidate better(const Candidate& a, const Candidate& b) {
  if (a.index < 0) return b;
  if (b.index < 0) return a;
  const bool a_nan = a.value != a.value;
  const bool b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (a_nan || a.value == b.value) return a.index < b.index ? a : b;
  return a.value > b.value ? a : b;
}

__device__ __forceinline__ Candidate warp_best(Candidate mine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Candidate other{
        __shfl_xor_sync(~0u, mine.value, offset),
        static_cast<int64_t>(__shfl_xor_sync(~0u, static_cast<long long>(mine.index), offset))};
    mine = better(mine, other);
  }
  return mine;
}

// Grid: parts, rows. The best of each part of each row.
template <class T>
__global__ void __launch_bounds__(kThreads) part_kernel(const T* x, int64_t size, Candidate* best) {
  __shared__ Candidate of_warp[kThreads / kWarpSize];
  const int64_t part_size = (size + kParts - 1) / kParts;
  const int64_t begin = blockIdx.x * part_size;
  const int64_t end = begin + part_size < size ? begin + part_size : size;
  const T* row = x + blockIdx.y * size;
  Candidate mine{0.0f, -1};
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads)
    mine = better(mine, {to_float(row[at]), at});
  mine = warp_best(mine);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  constexpr int kWarps = kThreads / kWarpSize;
  mine = warp_best(threadIdx.x < kWarps ? of_warp[threadIdx.x] : Candidate{0.0f, -1});
  if (threadIdx.x == 0) best[blockIdx.y * kParts + blockIdx.x] = mine;
}

// A warp a row.
__global__ void __launch_bounds__(kWarpSize) join_kernel(const Candidate* best, int64_t* y) {
  static_assert(kParts == kWarpSize);
  const Candidate winner = warp_best(best[blockIdx.x * kParts + threadIdx.x]);
  if (threadIdx.x == 0) y[blockIdx.x] = winner.index;
}

class ArgmaxRowsCuda final : public Kernel {
 public:
  explicit ArgmaxRowsCuda(const KernelSetup& setup)
      : dtype_(setup.inputs[0].dtype), rows_(setup.inputs[0].dims[0]) {
    for_type(dtype_, [](auto) {});
  }

  size_t workspace_bytes() const override { return static_cast<size_t>(rows_ * kParts) * sizeof(Candidate); }

  void run(const KernelArgs& args) override {
    const int64_t rows = args.in(0).dims[0];
    const int64_t size = args.in(0).dims[1];
    if (rows == 0) return;
    check(rows <= 65535, "CUDA chooses among the elements of at most 65535 rows at once, got ", rows);
    auto* best = static_cast<Candidate*>(args.workspace);
    for_type(dtype_, [&](auto type) {
      using T = Pointee<decltype(type)>;
      const dim3 grid(kParts, static_cast<unsigned>(rows));
      part_kernel<<<grid, kThreads, 0, stream_of(args)>>>(args.in(0).as<const T>(), size, best);
      check_launch("ArgmaxRows");
    });
    join_kernel<<<blocks_for(rows, 1), kWarpSize, 0, stream_of(args)>>>(best, args.out(0).as<int64_t>());
    check_launch("ArgmaxRows");
  }

 private:
  DType dtype_;
  int64_t rows_;
};

const bool registered = register_cuda<ArgmaxRows, ArgmaxRowsCuda>();

}  // namespace
}  // namespace modeltorch
