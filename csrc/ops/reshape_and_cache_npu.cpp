#include "ops/reshape_and_cache.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// ReshapeAndCache as the vendor's operation of the same name, with its default parameters.
///
/// | vendor tensor       | ours             | shape                                     | dtype      |
/// |---------------------|------------------|-------------------------------------------|------------|
/// | in 0, in 1          | k, v             | [n, kv_heads, head_size]                  | fp16, bf16 |
/// | in 2, in 3, out 0, out 1 | k_cache, v_cache | [blocks, block_size, kv_heads, head_size] | as k  |
/// | in 4                | slots            | [n]                                       | int32      |
class ReshapeAndCacheNpu final : public NpuKernel {
 public:
  ReshapeAndCacheNpu(const KernelSetup& setup, const ReshapeAndCache&) : NpuKernel(setup) {
    add(atb::infer::ReshapeAndCacheParam());
  }

 protected:
  void bind(const KernelArgs& args) override {
    const atb::Tensor k_cache = vendor_cache(args.in(2), session());
    const atb::Tensor v_cache = vendor_cache(args.in(3), session());
    set(0,
        {vendor_tensor(args.in(0)), vendor_tensor(args.in(1)), k_cache, v_cache, vendor_tensor(args.in(4))},
        {k_cache, v_cache});
  }
};

const bool registered = register_npu<ReshapeAndCache, ReshapeAndCacheNpu>();

}  // namespace
}  // namespace modeltorch
