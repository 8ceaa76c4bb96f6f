#include "ops/self_attention.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// SelfAttention as the vendor's operation of the same name: calcType PA_ENCODER, maskType NORM,
/// isTriuMask 1.
///
/// | vendor      | ours    | shape                    | dtype      | note               |
/// |-------------|---------|--------------------------|------------|--------------------|
/// | in 0, out 0 | q, out  | [n, heads, head_size]    | fp16, bf16 | out flat here      |
/// | in 1, in 2  | k, v    | [n, kv_heads, head_size] | as q       |                    |
/// | in 3        |         | [128, 128]               | as q       | the session's mask |
/// | in 4        | seq_len | [B]                      | int32      | hostData too       |
class SelfAttentionNpu final : public NpuKernel {
 public:
  SelfAttentionNpu(const KernelSetup& setup, const SelfAttention& op)
      : NpuKernel(setup), shape_(op.shape), mask_(session().causal_mask(dtype())) {
    atb::infer::SelfAttentionParam param;
    param.headNum = static_cast<int32_t>(op.shape.heads);
    param.kvHeadNum = static_cast<int32_t>(op.shape.kv_heads);
    param.qkScale = op.shape.scale;
    param.calcType = atb::infer::SelfAttentionParam::CalcType::PA_ENCODER;
    param.maskType = atb::infer::SelfAttentionParam::MaskType::MASK_TYPE_NORM;
    param.isTriuMask = 1;
    add(param);
  }

 protected:
  void bind(const KernelArgs& args) override {
    const Dims heads{args.in(0).dims[0], shape_.heads, shape_.head_size};
    set(0,
        {vendor_tensor(args.in(0)), vendor_tensor(args.in(1)), vendor_tensor(args.in(2)),
         vendor_tensor(mask_), vendor_lengths(args.in(3), args)},
        {vendor_tensor(args.out(0), heads)});
  }

 private:
  AttentionShape shape_;
  TensorView mask_;
};

const bool registered = register_npu<SelfAttention, SelfAttentionNpu>();

}  // namespace
}  // namespace modeltorch
