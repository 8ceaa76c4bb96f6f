#include "ops/linear.h"

#include "ops/cuda_kernel.cuh"
#include "ops/linear_products.h"
#include "ops/plain_gemm.h"

namespace modeltorch {
namespace {

const void* after(const void* data, int64_t elements, DType dtype) {
  return static_cast<const std::byte*>(data) + elements * static_cast<int64_t>(dtype_size(dtype));
}

using Part = LinearProducts::Part;

// Whether `second` lies behind `first` as if both were one weight.
bool continues(const Part& first, const Part& second, int64_t k, DType dtype) {
  if (!first.transposed || !second.transposed || second.weight != after(first.weight, first.n * k, dtype))
    return false;
  if (first.bias == nullptr || second.bias == nullptr) return first.bias == second.bias;
  return second.bias == after(first.bias, first.n, dtype);
}

class LinearCuda final : public CudaKernel<Linear> {
 public:
  explicit LinearCuda(const KernelSetup& setup) : CudaKernel(setup), bucket_rows_(setup.inputs[0].dims[0]) {}

  size_t workspace_bytes() const override { return kCudaGemmWorkspace; }

  void run(const KernelArgs& args) override {
    LinearProducts products{.dtype = dtype_,
                            .rows = args.in(0).dims[0],
                            .bucket_rows = bucket_rows_,
                            .k = args.in(0).dims[1],
                            .x = args.in(0).data,
                            .parts = {},
                            .y = args.out(0).data,
                            .workspace = args.workspace};
    size_t at = 1;
    for (const LinearPart& part : op_.parts) {
      const TensorView& weight = args.in(at++);
      products.parts.push_back({.weight = weight.data,
                                .bias = part.has_bias ? args.in(at++).data : nullptr,
                                .n = weight.dims[part.transposed ? 0 : 1],
                                .transposed = part.transposed});
    }
    linear_products(session_.gemm(), products, args.stream);
  }

 private:
  int64_t bucket_rows_;
};

const bool registered = register_cuda<Linear, LinearCuda>();

}  // namespace

void linear_products(CudaGemm& gemm, const LinearProducts& args, void* stream) {
  int64_t columns = 0;
  std::vector<Part> joined;
  for (const Part& part : args.parts) {
    columns += part.n;
    if (!joined.empty() && continues(joined.back(), part, args.k, args.dtype)) {
      joined.back().n += part.n;
    } else {
      joined.push_back(part);
    }
  }
  if (args.rows == 0) return;
  int64_t column = 0;
  for (const Part& part : joined) {
    CudaGemmArgs product;
    product.dtype = args.dtype;
    product.m = args.rows;
    product.bucket_m = args.bucket_rows;
    product.n = part.n;
    product.k = args.k;
    product.a = args.x;
    product.a_stride = args.k;
    product.b = part.weight;
    product.b_transposed = part.transposed;
    product.bias = part.bias;
    product.c = const_cast<void*>(after(args.y, column, args.dtype));
    product.c_stride = columns;
    product.residual = args.residual == nullptr ? nullptr : after(args.residual, column, args.dtype);
    product.residual_stride = columns;
    product.workspace = args.workspace;
    if (!gemm.run(product, stream)) plain_gemm(product, stream);
    column += part.n;
  }
}

}  // namespace modeltorch
