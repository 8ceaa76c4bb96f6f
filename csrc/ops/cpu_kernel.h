#pragma once

#include <memory>

#include "core/bfloat16.h"
#include "core/check.h"
#include "graph/kernel.h"

namespace modeltorch {

/// The code of one operation on the CPU, a function for each element type.
template <class Op>
struct CpuFunctions {
  void (*float32)(const Op& op, const KernelArgs& args);
  void (*bfloat16)(const Op& op, const KernelArgs& args);
};

/// The element type that a CPU kernel computes in: that of its first output, or of its first input if it has none.
inline DType compute_dtype(const KernelSetup& setup) {
  const DType dtype = setup.outputs.empty() ? setup.inputs[0].dtype : setup.outputs[0].dtype;
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16) {
    fail(ErrorKind::kNotImplemented, "the CPU computes in float32 or bfloat16, got ", dtype);
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

/// Registers `functions` as Op's CPU kernel: `const bool registered = register_cpu<Op, functions>();`
template <class Op, const CpuFunctions<Op>& functions>
bool register_cpu() {
  return register_kernel(Op::kName, DeviceType::kCpu, [](const KernelSetup& setup) -> std::unique_ptr<Kernel> {
    const bool is_float32 = compute_dtype(setup) == DType::kFloat32;
    return std::make_unique<CpuKernel<Op>>(dynamic_cast<const Op&>(setup.operation),
                                           is_float32 ? functions.float32 : functions.bfloat16);
  });
}

/// Items a part of a parallel_for must hold so that the work in it outweighs the cost of waking a thread.
inline int64_t grain_for(int64_t operations_per_item) {
  constexpr int64_t kOperationsPerPart = 32768;
  return operations_per_item >= kOperationsPerPart ? 1 : kOperationsPerPart / (operations_per_item + 1) + 1;
}

}  // namespace modeltorch
