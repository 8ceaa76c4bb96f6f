#include "ops/fused_linear.h"

#include <algorithm>
#include <bit>
#include <optional>

#include "core/arithmetic.h"
#include "device/cuda_layers.h"
#include "ops/cuda_kernel.cuh"
#include "ops/elementwise.h"
#include "ops/few_row_linear.h"
#include "ops/linear_products.h"
#include "ops/many_row_linear.h"
#include "ops/norm_rows.h"

namespace modeltorch {
namespace {

constexpr int64_t kAlignment = 256;  // of what lies in the workspace

// The tensors of one run, told apart by the operation's parameters.
struct Tensors {
  const TensorView* x = nullptr;
  const TensorView* gamma = nullptr;
  const TensorView* residual = nullptr;
  const TensorView* y = nullptr;
  std::vector<LinearProducts::Part> parts;
};

class FusedLinearCuda final : public CudaKernel<FusedLinear>, public HasDecodeTask {
 public:
  explicit FusedLinearCuda(const KernelSetup& setup) : CudaKernel(setup) {
    const Dims& x = setup.inputs[0].dims;
    const auto size = static_cast<int64_t>(dtype_size(dtype_));
    bucket_rows_ = x[0];
    columns_ = setup.outputs[0].dims[1] * (op_.swiglu ? 2 : 1);
    if (op_.has_norm) norm_bytes_ = static_cast<size_t>(round_up(bucket_rows_ * x[1] * size, kAlignment));
    if (op_.swiglu)
      product_bytes_ = static_cast<size_t>(round_up(bucket_rows_ * columns_ * size, kAlignment));
    FewRowLinear few{
        .dtype = dtype_, .rows = bucket_rows_, .k = x[1], .gamma = op_.has_norm ? this : nullptr};
    few.parts[0].n = columns_;
    few.part_count = 1;
    few.swiglu = op_.swiglu;
    // Between the largest buckets the choice is the same: it is made once for each power of two.
    const auto rows =
        static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(bucket_rows_, 1))));
    bool has_bias = false;
    for (const LinearPart& part : op_.parts) has_bias = has_bias || part.has_bias;
    key_ = {static_cast<int64_t>(dtype_),
            rows,
            x[1],
            columns_,
            static_cast<int64_t>(op_.parts.size()),
            has_bias,
            op_.has_norm,
            op_.swiglu,
            op_.has_residual};
    if (bucket_rows_ <= kFewRows && bucket_rows_ > 0) few_row_bytes_ = few_row_linear_workspace(few);
  }

  size_t workspace_bytes() const override {
    return std::max(kCudaGemmWorkspace + norm_bytes_ + product_bytes_, few_row_bytes_);
  }

  void run(const KernelArgs& args) override {
    const Tensors tensors = tensors_of(args);
    if (tensors.x->dims[0] == 0) return;
    // So few rows are read at the rate of memory, and a launch that begins to load its weights before the one
    // in front has ended gains more than a measurement of it alone can show.
    if (tensors.x->dims[0] <= kMeasuredRows && run_few_rows(tensors, args)) return;
    const CudaSession::Way ways[] = {
        [&](void*) { return run_few_rows(tensors, args); },
        [&](void*) { return run_many_rows(tensors, args); },
        [&](void*) { return run_in_steps(tensors, args); },
    };
    session_.run_fastest(key_, ways, args.stream);
  }

  DecodeTask decode_task(const KernelArgs& args) const override {
    const std::optional<FewRowLinear> linear = few_rows(tensors_of(args), args);
    return linear ? DecodeTask(*linear) : DecodeTask();
  }

 private:
  static constexpr int64_t kFewRows = 128;
  static constexpr int64_t kMeasuredRows = 8;

  // As a launch of few_row_linear, if that can do it.
  std::optional<FewRowLinear> few_rows(const Tensors& tensors, const KernelArgs& args) const {
    const int64_t rows = tensors.x->dims[0];
    if (rows > kFewRows || tensors.parts.size() > 3) return std::nullopt;
    FewRowLinear linear{.dtype = dtype_,
                        .rows = rows,
                        .k = tensors.x->dims[1],
                        .x = tensors.x->data,
                        .gamma = op_.has_norm ? tensors.gamma->data : nullptr,
                        .epsilon = op_.epsilon,
                        .residual = op_.has_residual ? tensors.residual->data : nullptr,
                        .swiglu = op_.swiglu,
                        .y = tensors.y->data,
                        .workspace = args.workspace};
    for (const LinearProducts::Part& part : tensors.parts) {
      if (!part.transposed) return std::nullopt;
      linear.parts[linear.part_count++] = {part.weight, part.bias, part.n};
    }
    return few_row_linear_fits(linear) ? std::optional(linear) : std::nullopt;
  }

  bool run_few_rows(const Tensors& tensors, const KernelArgs& args) {
    const std::optional<FewRowLinear> linear = few_rows(tensors, args);
    if (linear) few_row_linear(*linear, args.stream);
    return linear.has_value();
  }

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
  bool run_in_steps(const Tensors& tensors, const KernelArgs& args) {
    auto* workspace = static_cast<std::byte*>(args.workspace);
    const int64_t rows = tensors.x->dims[0];
    if (op_.has_norm) normalise(tensors, args);
    const void* x = op_.has_norm ? normed(args) : tensors.x->data;
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
    return true;
  }

  // The norm apart, the rest in one launch, if there is a kernel for it.
  bool run_many_rows(const Tensors& tensors, const KernelArgs& args) {
    const int64_t rows = tensors.x->dims[0];
    if (rows <= kFewRows || (op_.swiglu && op_.has_residual)) return false;
    ManyRowLinear linear{.dtype = dtype_,
                         .rows = rows,
                         .k = tensors.x->dims[1],
                         .n = op_.swiglu ? columns_ / 2 : columns_,
                         .x = op_.has_norm ? normed(args) : tensors.x->data,
                         .weight = tensors.parts[0].weight,
                         .residual = op_.has_residual ? tensors.residual->data : nullptr,
                         .y = tensors.y->data};
    for (const LinearProducts::Part& part : tensors.parts) {
      if (!part.transposed || part.bias != nullptr) return false;
    }
    if (op_.swiglu) {
      if (tensors.parts.size() > 2 || tensors.parts[0].n % linear.n != 0) return false;
      linear.up = tensors.parts.size() == 2
                      ? tensors.parts[1].weight
                      : static_cast<const std::byte*>(linear.weight) +
                            linear.n * linear.k * static_cast<int64_t>(dtype_size(dtype_));
    } else if (tensors.parts.size() > 1) {
      return false;
    }
    if (!many_row_linear_fits(linear)) return false;
    if (op_.has_norm) normalise(tensors, args);
    many_row_linear(linear, args.stream);
    return true;
  }

  void* normed(const KernelArgs& args) const {
    return static_cast<std::byte*>(args.workspace) + kCudaGemmWorkspace;
  }

  void normalise(const Tensors& tensors, const KernelArgs& args) {
    norm_rows({.dtype = dtype_,
               .rows = tensors.x->dims[0],
               .size = tensors.x->dims[1],
               .x = tensors.x->data,
               .gamma = tensors.gamma->data,
               .epsilon = op_.epsilon,
               .y = normed(args)},
              args.stream);
  }

  std::vector<int64_t> key_;  ///< what the choice of a way depends on
  int64_t bucket_rows_ = 0;
  int64_t columns_ = 0;  ///< of the products
  size_t norm_bytes_ = 0;
  size_t product_bytes_ = 0;
  size_t few_row_bytes_ = 0;
};

const bool registered = register_cuda<FusedLinear, FusedLinearCuda>();

}  // namespace
}  // namespace modeltorch
