#include "ops/rms_norm.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// RmsNorm as the vendor's RmsNorm, layer type NORM.
///
/// | vendor tensor | ours  | shape        | dtype      |
/// |---------------|-------|--------------|------------|
/// | in 0          | x     | [rows, size] | fp16, bf16 |
/// | in 1          | gamma | [size]       | as x       |
/// | out 0         | y     | [rows, size] | as x       |
class RmsNormNpu final : public PlainNpuKernel {
 public:
  RmsNormNpu(const KernelSetup& setup, const RmsNorm& op) : PlainNpuKernel(setup) {
    atb::infer::RmsNormParam param;
    param.layerType = atb::infer::RmsNormParam::RmsNormType::RMS_NORM_NORM;
    param.normParam.epsilon = op.epsilon;
    add(param);
  }
};

const bool registered = register_npu<RmsNorm, RmsNormNpu>();

}  // namespace
}  // namespace modeltorch
