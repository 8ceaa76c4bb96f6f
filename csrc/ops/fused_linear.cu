#include "ops/fused_linear.h"

#include "ops/cuda_kernel.cuh"
#include "ops/elementwise.h"
#include "ops/linear_products.h"
#include "ops/norm_rows.h"

namespace modeltorch {
namespace {

size_t aligned(int64_t bytes) {
  return (static_cast<size_t>(bytes) + 255) / 256 * 256;
}

// The tensors of one run, told apart by the operation's parameters.
struct Tensors {
  const TensorView* x = nullptr;
  const TensorView* gamma = nullptr;
  const TensorView* residual = nullptr;
  const TensorView* y = nullptr;
  std::vector<LinearProducts::Part> parts;
};

class FusedLinearCuda final : public CudaKernel<FusedLinear> {
 public:
  explicit FusedLinearCuda(const KernelSetup& setup) : CudaKernel(setup) {
    const Dims& x = setup.inputs[0].dims;
    const auto size = static_cast<int64_t>(dtype_size(dtype_));
    bucket_rows_ = x[0];
    columns_ = setup.outputs[0].dims[1] * (op_.swiglu ? 2 : 1);
    if (op_.has_norm) norm_bytes_ = aligned(bucket_rows_ * x[1] * size);
    if (op_.swiglu) product_bytes_ = aligned(bucket_rows_ * columns_ * size);
  }

  size_t workspace_bytes() const override { return kCudaGemmWorkspace + norm_bytes_ + product_bytes_; }

  void run(const KernelArgs& args) override {
    const Tensors tensors = tensors_of(args);
    if (tensors.x->dims[0] == 0) return;
    run_in_steps(tensors, args);
  }

 private:
  Tensors tensors_of(const KernelArgs& args) const {
    Tensors tensors{.x = &args.in(0), .y = &args.out(0), .parts = {}};
    if (op_.has_norm) tensors.gamma = &args.in(1);
    size_t at = op_.first_weight();
    for (const LinearPart& part : op_.parts) {
      const TensorView& weight = args.in(at++);
      tensors.parts.push_back({.weight = weight.data,
                               .bias = part.has_bias ? args.in(at++).data : nullptr,
                               .n = weight.dims[part.transposed ? 0 : 1],
                               .transposed = part.transposed});
    }
    if (op_.has_residual) tensors.residual = &args.in(at);
    return tensors;
  }

  // Norm, products, activation, one after the other: every dtype, shape and layout.
  void run_in_steps(const Tensors& tensors, const KernelArgs& args) {
    auto* workspace = static_cast<std::byte*>(args.workspace);
    const int64_t rows = tensors.x->dims[0];
    const void* x = tensors.x->data;
    if (op_.has_norm) {
      void* normed = workspace + kCudaGemmWorkspace;
      norm_rows({.dtype = dtype_,
                 .rows = rows,
                 .size = tensors.x->dims[1],
                 .x = x,
                 .gamma = tensors.gamma->data,
                 .epsilon = op_.epsilon,
                 .y = normed},
                args.stream);
      x = normed;
    }
    const void* residual = tensors.residual == nullptr ? nullptr : tensors.residual->data;
    void* product = op_.swiglu ? workspace + kCudaGemmWorkspace + norm_bytes_ : tensors.y->data;
    linear_products(session_.gemm(),
                    {.dtype = dtype_,
                     .rows = rows,
                     .bucket_rows = bucket_rows_,
                     .k = tensors.x->dims[1],
                     .x = x,
                     .parts = tensors.parts,
                     .residual = op_.swiglu ? nullptr : residual,
                     .y = product,
                     .workspace = workspace},
                    args.stream);
    if (op_.swiglu) {
      swiglu_rows(dtype_, product, residual, rows, columns_ / 2, tensors.y->data, args.stream);
    }
  }

  int64_t bucket_rows_ = 0;
  int64_t columns_ = 0;  ///< of the products
  size_t norm_bytes_ = 0;
  size_t product_bytes_ = 0;
};

const bool registered = register_cuda<FusedLinear, FusedLinearCuda>();

}  // namespace
}  // namespace modeltorch
