#include "ops/gather_rows.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// GatherRows as the vendor's Gather on axis 0.
///
/// | vendor tensor | ours    | shape         | dtype      |
/// |---------------|---------|---------------|------------|
/// | in 0          | table   | [count, size] | fp16, bf16 |
/// | in 1          | indices | [rows]        | int64      |
/// | out 0         | y       | [rows, size]  | as table   |
class GatherRowsNpu final : public PlainNpuKernel {
 public:
  GatherRowsNpu(const KernelSetup& setup, const GatherRows&) : PlainNpuKernel(setup) {
    atb::infer::GatherParam param;
    param.axis = 0;
    add(param);
  }
};

const bool registered = register_npu<GatherRows, GatherRowsNpu>();

}  // namespace
}  // namespace modeltorch
