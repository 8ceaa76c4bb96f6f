#include "ops/add.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// Add as the vendor's Elewise, type ADD.
///
/// | vendor tensor | ours | shape        | dtype      |
/// |---------------|------|--------------|------------|
/// | in 0, in 1    | a, b | [rows, size] | fp16, bf16 |
/// | out 0         | y    | [rows, size] | as a       |
class AddNpu final : public PlainNpuKernel {
 public:
  AddNpu(const KernelSetup& setup, const Add&) : PlainNpuKernel(setup) {
    atb::infer::ElewiseParam param;
    param.elewiseType = atb::infer::ElewiseParam::ElewiseType::ELEWISE_ADD;
    add(param);
  }
};

const bool registered = register_npu<Add, AddNpu>();

}  // namespace
}  // namespace modeltorch
