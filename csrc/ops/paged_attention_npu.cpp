#include "ops/paged_attention.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// PagedAttention as the vendor's operation of the same name, without a mask.
///
/// A cache is [blocks, block_size, kv_heads, head_size].
///
/// | vendor      | ours             | shape                 | dtype      | note           |
/// |-------------|------------------|-----------------------|------------|----------------|
/// | in 0, out 0 | q, out           | [B, heads, head_size] | fp16, bf16 | out flat here  |
/// | in 1, in 2  | k_cache, v_cache | a cache               | as q       |                |
/// | in 3        | block_tables     | [B, width]            | int32      |                |
/// | in 4        | seq_len          | [B]                   | int32      | hostData too   |
class PagedAttentionNpu final : public NpuKernel {
 public:
  PagedAttentionNpu(const KernelSetup& setup, const PagedAttention& op) : NpuKernel(setup), shape_(op.shape) {
    atb::infer::PagedAttentionParam param;
    param.headNum = static_cast<int32_t>(op.shape.heads);
    param.kvHeadNum = static_cast<int32_t>(op.shape.kv_heads);
    param.qkScale = op.shape.scale;
    param.maskType = atb::infer::PagedAttentionParam::MaskType::UNDEFINED;
    add(param);
  }

 protected:
  void bind(const KernelArgs& args) override {
    const Dims heads{args.in(0).dims[0], shape_.heads, shape_.head_size};
    set(0,
        {vendor_tensor(args.in(0)), vendor_cache(args.in(1), session()), vendor_cache(args.in(2), session()),
         vendor_tensor(args.in(3)), vendor_lengths(args.in(4), args)},
        {vendor_tensor(args.out(0), heads)});
  }

 private:
  AttentionShape shape_;
};

const bool registered = register_npu<PagedAttention, PagedAttentionNpu>();

}  // namespace
}  // namespace modeltorch
