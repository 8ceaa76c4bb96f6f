#include "ops/split_qkv.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// SplitQkv as the vendor's Split of axis 1 into parts of the given sizes.
///
/// | vendor tensor | ours | shape                                      | dtype      |
/// |---------------|------|--------------------------------------------|------------|
/// | in 0          | qkv  | [n, (heads + 2 * kv_heads) * head_size]    | fp16, bf16 |
/// | out 0         | q    | [n, heads * head_size], ours [n, heads, head_size]    | as qkv |
/// | out 1, out 2  | k, v | [n, kv_heads * head_size], ours [n, kv_heads, head_size] | as qkv |
class SplitQkvNpu final : public NpuKernel {
 public:
  SplitQkvNpu(const KernelSetup& setup, const SplitQkv& op) : NpuKernel(setup) {
    const auto q_size = static_cast<int32_t>(op.heads * op.head_size);
    const auto kv_size = static_cast<int32_t>(op.kv_heads * op.head_size);
    const atb::infer::SplitParam param = {1, 3, {q_size, kv_size, kv_size}};
    add(param);
  }

 protected:
  void bind(const KernelArgs& args) override {
    set(0, {vendor_tensor(args.in(0))}, {flat(args.out(0)), flat(args.out(1)), flat(args.out(2))});
  }

 private:
  static atb::Tensor flat(const TensorView& view) {
    return vendor_tensor(view, {view.dims[0], view.dims[1] * view.dims[2]});
  }
};

const bool registered = register_npu<SplitQkv, SplitQkvNpu>();

}  // namespace
}  // namespace modeltorch
