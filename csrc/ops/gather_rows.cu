#include "ops/gather_rows.h"

#include "ops/cuda_kernel.cuh"
#include "ops/launch.cuh"
#include "ops/ptx.cuh"

namespace modeltorch {
namespace {

constexpr int kThreads = 128;

// A block a row, in units of W. A row whose index is outside the table becomes zero.
template <class W>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const W* table, const int64_t* indices, int64_t count, int64_t size, W* y, int32_t* fault) {
  // In this order: it is often the first kernel of a step, and those behind it begin to read weights, lengths
  // and block tables that what was launched before the step may still be writing.
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int64_t row = blockIdx.x;
  const int64_t index = indices[row];
  const bool known = index >= 0 && index < count;
  if (!known && threadIdx.x == 0) *fault = 1;
  for (int64_t at = threadIdx.x; at < size; at += kThreads) {
    y[row * size + at] = known ? table[index * size + at] : W{};
  }
}

class GatherRowsCuda final : public CudaKernel<GatherRows> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    const int64_t row_bytes = args.in(0).dims[1] * static_cast<int64_t>(dtype_size(args.in(0).dtype));
    if (args.in(1).dims[0] == 0 || row_bytes == 0) return;
    const auto addresses = reinterpret_cast<uintptr_t>(args.in(0).data) |
                           reinterpret_cast<uintptr_t>(args.out(0).data) | static_cast<uintptr_t>(row_bytes);
    if (addresses % sizeof(uint4) == 0) return gather<uint4>(args, row_bytes);
    gather<uint16_t>(args, row_bytes);
  }

 private:
  template <class W>
  void gather(const KernelArgs& args, int64_t row_bytes) {
    launch_kernel(gather_kernel<W>, {dim3(blocks_for(args.in(1).dims[0], 1)), kThreads}, args.stream,
                  "GatherRows", args.in(0).as<const W>(), args.in(1).as<const int64_t>(), args.in(0).dims[0],
                  row_bytes / static_cast<int64_t>(sizeof(W)), args.out(0).as<W>(),
                  session_.fault(CudaFault::kRow));
  }
};

const bool registered = register_cuda<GatherRows, GatherRowsCuda>();

}  // namespace
}  // namespace modeltorch
