#include "ops/swiglu.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// SwiGlu as the vendor's Activation, type SWIGLU_FORWARD on the last axis.
///
/// | vendor tensor | ours    | shape            | dtype      |
/// |---------------|---------|------------------|------------|
/// | in 0          | gate_up | [rows, 2 * size] | fp16, bf16 |
/// | out 0         | y       | [rows, size]     | as gate_up |
class SwiGluNpu final : public PlainNpuKernel {
 public:
  explicit SwiGluNpu(const KernelSetup& setup) : PlainNpuKernel(setup) {
    atb::infer::ActivationParam param;
    param.activationType = atb::infer::ActivationType::ACTIVATION_SWIGLU_FORWARD;
    param.dim = -1;
    add(param);
  }
};

/// SwiGlu on chips without the fused activation: Split in two, Activation of type SWISH, Elewise of type MUL.
///
/// | vendor operation | in              | out                        |
/// |------------------|-----------------|----------------------------|
/// | Split            | gate_up         | gate, up [rows, size] each |
/// | Activation       | gate            | silu(gate)                 |
/// | Elewise          | silu(gate), up  | y                          |
class SplitSwiGluNpu final : public NpuKernel {
 public:
  explicit SplitSwiGluNpu(const KernelSetup& setup)
      : NpuKernel(setup), half_bytes_(aligned(setup.outputs[0].bytes())) {
    atb::infer::SplitParam split;
    split.splitDim = -1;
    split.splitNum = 2;
    add(split);
    atb::infer::ActivationParam swish;
    swish.activationType = atb::infer::ActivationType::ACTIVATION_SWISH;
    add(swish);
    atb::infer::ElewiseParam multiply;
    multiply.elewiseType = atb::infer::ElewiseParam::ElewiseType::ELEWISE_MUL;
    add(multiply);
  }

  size_t workspace_bytes() const override { return 3 * half_bytes_; }

 protected:
  void bind(const KernelArgs& args) override {
    auto* memory = static_cast<std::byte*>(args.workspace);
    const auto half = [&](int index) {
      return vendor_tensor({memory + index * half_bytes_, dtype(), args.out(0).dims});
    };
    const atb::Tensor gate = half(0);
    const atb::Tensor up = half(1);
    const atb::Tensor activated = half(2);
    set(0, {vendor_tensor(args.in(0))}, {gate, up});
    set(1, {gate}, {activated});
    set(2, {activated, up}, {vendor_tensor(args.out(0))});
  }

 private:
  size_t aligned(size_t bytes) const {
    const size_t alignment = session().alignment();
    return (bytes + alignment - 1) / alignment * alignment;
  }

  size_t half_bytes_;
};

const bool registered =
    register_kernel(SwiGlu::kName, DeviceType::kNpu, [](const KernelSetup& setup) -> std::unique_ptr<Kernel> {
      if (dynamic_cast<NpuSession&>(*setup.session).is_first_generation())
        return std::make_unique<SplitSwiGluNpu>(setup);
      return std::make_unique<SwiGluNpu>(setup);
    });

}  // namespace
}  // namespace modeltorch
