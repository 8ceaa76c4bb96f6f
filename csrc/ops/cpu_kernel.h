#pragma once

#include <memory>

#include "core/check.h"
#include "core/half_floats.h"
#include "graph/kernel.h"

namespace modeltorch {

/// The code of one operation on the CPU, a function for each element type.
template <class Op>
struct CpuFunctions {
  void (*float32)(const Op& op, const KernelArgs& args);
  void (*bfloat16)(const Op& op, const KernelArgs& args);
  void (*float16)(const Op& op, const KernelArgs& args);
};

/// The element type that a CPU kernel computes in: that of its first input.
inline DType compute_dtype(const KernelSetup& setup) {
  const DType dtype = setup.inputs[0].dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    fail(ErrorKind::kNotImplemented, "the CPU computes in float32, bfloat16 or float16, got ", dtype);
  }
  return dtype;
}

/// A kernel without state: the operation's parameters and a function.
template <class Op>
class CpuKernel final : public Kernel {
 public:
  CpuKernel(const Op& op, void (*function)(const Op&, const KernelArgs&)) : op_(op), function_(function) {}
  void run(const KernelArgs& args) override { function_(op_, args); }

 private:
  Op op_;
  void (*function_)(const Op&, const KernelArgs&);
};

/// The kernel of Op for the element type of a setup.
template <class Op, const CpuFunctions<Op>& functions>
std::unique_ptr<Kernel> make_cpu_kernel(const KernelSetup& setup) {
  const DType dtype = compute_dtype(setup);
  const auto function = dtype == DType::kFloat32    ? functions.float32
                        : dtype == DType::kBFloat16 ? functions.bfloat16
                                                    : functions.float16;
  return std::make_unique<CpuKernel<Op>>(dynamic_cast<const Op&>(setup.operation), function);
}

/// Registers `functions` as Op's CPU kernel: `const bool registered = register_cpu<Op, functions>();`
template <class Op, const CpuFunctions<Op>& functions>
bool register_cpu() {
  return register_kernel(Op::kName, DeviceType::kCpu, make_cpu_kernel<Op, functions>);
}

/// Makes a kernel class that is a template over the element type: `make_typed_kernel<SelfAttentionCpu>(setup,
/// shape)`.
template <template <class> class KernelOf, class... Args>
std::unique_ptr<Kernel> make_typed_kernel(const KernelSetup& setup, const Args&... args) {
  const DType dtype = compute_dtype(setup);
  if (dtype == DType::kFloat32) return std::make_unique<KernelOf<float>>(args...);
  if (dtype == DType::kBFloat16) return std::make_unique<KernelOf<BFloat16>>(args...);
  return std::make_unique<KernelOf<Float16>>(args...);
}

/// Items a part of a parallel_for must hold so that the work in it outweighs the cost of waking a thread.
inline int64_t grain_for(int64_t operations_per_item) {
  constexpr int64_t kOperationsPerPart = 32768;
  return operations_per_item >= kOperationsPerPart ? 1 : kOperationsPerPart / (operations_per_item + 1) + 1;
}

}  // namespace modeltorch
