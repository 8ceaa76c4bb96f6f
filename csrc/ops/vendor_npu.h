#pragma once

#include <atb/atb_infer.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "core/check.h"
#include "device/npu.h"
#include "graph/kernel.h"

namespace modeltorch {

/// A kernel made of operations of the vendor's library, launched one after the other.
///
/// The operations are made once, with the kernel. In every step prepare() describes the tensors, which have
/// their true sizes, and calls Setup; run() calls Execute with the very same description. The library's known
/// callers never execute twice after one Setup, so neither does this. A step that brings an empty tensor
/// launches nothing.
class NpuKernel : public Kernel {
 public:
  /// Throws unless this chip computes in the element type of the operation.
  explicit NpuKernel(const KernelSetup& setup);

  void prepare(const KernelArgs& args) final;
  void run(const KernelArgs& args) final;

 protected:
  NpuSession& session() const { return session_; }

  /// The element type of the operation: float16 or bfloat16.
  DType dtype() const { return dtype_; }

  /// Makes the next vendor operation of this kernel.
  template <class Param>
  void add(const Param& param) {
    atb::Operation* made = nullptr;
    const int64_t status = atb::CreateOperation(param, &made);
    if (status != 0 || made == nullptr)
      fail(ErrorKind::kRuntime, "the vendor's CreateOperation returned ", status);
    calls_.emplace_back().operation.reset(made);
  }

  /// Describes the tensors of every vendor operation for one step: call set() for each.
  virtual void bind(const KernelArgs& args) = 0;

  /// The tensors of vendor operation number `index`, in the vendor's order.
  void set(size_t index, std::initializer_list<atb::Tensor> inputs,
           std::initializer_list<atb::Tensor> outputs);

 private:
  struct Destroy {
    void operator()(atb::Operation* operation) const { atb::DestroyOperation(operation); }
  };

  struct Call {
    std::unique_ptr<atb::Operation, Destroy> operation;
    std::vector<atb::Tensor> inputs;  ///< what `tensors` holds, for messages
    std::vector<atb::Tensor> outputs;
    atb::VariantPack tensors;
    uint64_t workspace_bytes = 0;
    uint8_t* workspace = nullptr;
  };

  [[noreturn]] static void fail_at(const Call& call, const char* function, int64_t status);

  NpuSession& session_;
  DType dtype_;
  bool empty_ = false;
  std::vector<Call> calls_;
};

/// `view` as the vendor takes it, under its own sizes or under `dims` of the same count.
atb::Tensor vendor_tensor(const TensorView& view);
atb::Tensor vendor_tensor(const TensorView& view, const Dims& dims);

/// A paged cache as the vendor takes it: [blocks, block_size, kv_heads, head_size], or on the older chips the
/// same bytes as [blocks, kv_heads * head_size / 16, block_size, 16] in tiles.
atb::Tensor vendor_cache(const TensorView& view, const NpuSession& session);

/// An int32 tensor whose values the vendor also reads on the host: the lengths of the step's sequences.
atb::Tensor vendor_lengths(const TensorView& view, const KernelArgs& args);

/// Registers KernelOf as the Ascend kernel of Op: `const bool registered = register_npu<Op, KernelOf>();`
template <class Op, class KernelOf>
bool register_npu() {
  return register_kernel(Op::kName, DeviceType::kNpu,
                         [](const KernelSetup& setup) -> std::unique_ptr<Kernel> {
                           return std::make_unique<KernelOf>(setup, dynamic_cast<const Op&>(setup.operation));
                         });
}

/// One vendor operation with the tensors of ours, in order: what most kernels are.
class PlainNpuKernel : public NpuKernel {
 public:
  using NpuKernel::NpuKernel;

 protected:
  void bind(const KernelArgs& args) override {
    if (args.inputs.size() == 1) return set(0, {vendor_tensor(args.in(0))}, {vendor_tensor(args.out(0))});
    set(0, {vendor_tensor(args.in(0)), vendor_tensor(args.in(1))}, {vendor_tensor(args.out(0))});
  }
};

}  // namespace modeltorch
