#include "ops/add_rms_norm.h"

#include "ops/cuda_kernel.cuh"
#include "ops/norm_rows.h"

namespace modeltorch {
namespace {

class AddRmsNormCuda final : public CudaKernel<AddRmsNorm> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    norm_rows({.dtype = dtype_,
               .rows = args.in(0).dims[0],
               .size = args.in(0).dims[1],
               .x = args.in(0).data,
               .other = args.in(1).data,
               .gamma = args.in(2).data,
               .epsilon = op_.epsilon,
               .sum = args.out(0).data,
               .y = args.out(1).data},
              args.stream);
  }
};

const bool registered = register_cuda<AddRmsNorm, AddRmsNormCuda>();

}  // namespace
}  // namespace modeltorch
