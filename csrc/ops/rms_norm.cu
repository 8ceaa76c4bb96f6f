#include "ops/rms_norm.h"

#include "ops/cuda_kernel.cuh"
#include "ops/norm_rows.h"

namespace modeltorch {
namespace {

class RmsNormCuda final : public CudaKernel<RmsNorm> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    norm_rows({.dtype = dtype_,
               .rows = args.in(0).dims[0],
               .size = args.in(0).dims[1],
               .x = args.in(0).data,
               .gamma = args.in(1).data,
               .epsilon = op_.epsilon,
               .y = args.out(0).data},
              args.stream);
  }
};

const bool registered = register_cuda<RmsNorm, RmsNormCuda>();

}  // namespace
}  // namespace modeltorch
