// The vendor's operations around the cache: ReshapeAndCache, SelfAttention, PagedAttention. A cache is either
// [blocks, block_size, kv_heads, head_size] or the same in tiles: [blocks, kv_heads * head_size / 16,
// block_size, 16].

#include <atb/atb_infer.h>

#include <numeric>

#include "driver/host_driver.h"
#include "ops/paged_attention.h"
#include "ops/reshape_and_cache.h"
#include "ops/self_attention.h"
#include "vendor/host_operation.h"

namespace ascend_host {
namespace {

using modeltorch::AttentionShape;
using modeltorch::Dims;
using modeltorch::DType;
using modeltorch::Format;
using modeltorch::TensorView;

constexpr int64_t kMaskSize = 128;

bool is_half(const TensorView& view) {
  return view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16;
}

// The sizes of a cache without its tiles.
Dims cache_dims(const TensorView& cache, int64_t kv_heads, int64_t head_size) {
  const int64_t block_size = cache.format == Format::kFractalNz ? cache.dims[2] : cache.dims[1];
  return {cache.dims[0], block_size, kv_heads, head_size};
}

std::string check_cache(const TensorView& cache, DType dtype, int64_t kv_heads, int64_t head_size) {
  if (cache.dtype != dtype || cache.dims.rank() != 4) return "a cache of a wrong type or rank";
  if (cache.format == Format::kPlain) {
    const bool fits = cache.dims[2] == kv_heads && cache.dims[3] == head_size;
    return fits ? "" : "a cache with other heads";
  }
  const bool fits = cache.dims[1] * cache.dims[3] == kv_heads * head_size && cache.dims[3] == 16;
  return fits ? "" : "a tiled cache with other heads";
}

// A cache as our kernels take it: itself, or a copy without tiles.
class PlainCache {
 public:
  PlainCache(const TensorView& cache, int64_t kv_heads, int64_t head_size)
      : cache_(cache), columns_(kv_heads * head_size) {
    view_ = cache;
    view_.dims = cache_dims(cache, kv_heads, head_size);
    view_.format = Format::kPlain;
    if (cache.format == Format::kPlain) return;
    copy_ = to_plain(cache, view_.dims[1], columns_);
    view_.data = copy_.data();
  }

  const TensorView& view() const { return view_; }

  void write_back() {
    if (!copy_.empty()) from_plain(copy_, cache_, view_.dims[1], columns_);
  }

 private:
  TensorView cache_;
  TensorView view_;
  int64_t columns_;
  std::vector<std::byte> copy_;
};

Behaviour reshape_and_cache() {
  const auto check = [](const KernelTensors& tensors) -> std::string {
    const TensorView& k = tensors.inputs[0];
    if (k.dims.rank() != 3 || !is_half(k) || !(tensors.inputs[1].dims == k.dims))
      return "wrong keys or values";
    for (const int index : {0, 1}) {
      const std::string fault = check_cache(tensors.inputs[2 + index], k.dtype, k.dims[1], k.dims[2]);
      if (!fault.empty()) return fault;
      if (tensors.outputs[index].data != tensors.inputs[2 + index].data)
        return "a cache that is not its output";
    }
    const TensorView& slots = tensors.inputs[4];
    return slots.dtype == DType::kInt32 && slots.dims == Dims{k.dims[0]} ? ""
                                                                         : "slots that are not int32 [n]";
  };
  const auto compute = [](const KernelTensors& tensors) -> std::string {
    const TensorView& k = tensors.inputs[0];
    PlainCache k_cache(tensors.inputs[2], k.dims[1], k.dims[2]);
    PlainCache v_cache(tensors.inputs[3], k.dims[1], k.dims[2]);
    const TensorView& slots = tensors.inputs[4];
    for (int64_t token = 0; token < slots.dims[0]; ++token) {
      const int64_t rows = k_cache.view().dims[0] * k_cache.view().dims[1];
      if (slots.as<int32_t>()[token] >= rows) return "a slot outside the cache";
    }
    run_on_cpu(modeltorch::ReshapeAndCache(), {k, tensors.inputs[1], k_cache.view(), v_cache.view(), slots},
               {});
    k_cache.write_back();
    v_cache.write_back();
    return "";
  };
  return {"ReshapeAndCacheOperation", 5, 2, check, compute};
}

std::string check_lengths(const TensorView& lengths, const std::vector<int32_t>& host) {
  if (lengths.dtype != DType::kInt32 || lengths.dims.rank() != 1) return "lengths that are not int32 [B]";
  return host.empty() ? "lengths without host data" : "";
}

// The device's lengths, and the host's as Setup saw them, must be those of the same step.
std::string compare_lengths(const TensorView& lengths, const std::vector<int32_t>& host) {
  for (size_t index = 0; index < host.size(); ++index) {
    if (host[index] != lengths.as<int32_t>()[index]) return "lengths on the host unlike those on the device";
  }
  return "";
}

TensorView flat_heads(TensorView view) {
  view.dims = {view.dims[0], view.dims[1] * view.dims[2]};
  return view;
}

std::string check_mask(const TensorView& mask, DType dtype) {
  const bool plain = mask.format == Format::kPlain && mask.dims == Dims{kMaskSize, kMaskSize};
  const bool tiled = mask.format == Format::kFractalNz && mask.dims == Dims{1, kMaskSize / 16, kMaskSize, 16};
  return mask.dtype == dtype && (plain || tiled) ? "" : "a mask of a wrong shape or type";
}

std::string compare_mask(const TensorView& mask) {
  const auto values =
      mask.format == Format::kPlain ? std::vector<std::byte>() : to_plain(mask, kMaskSize, kMaskSize);
  const auto* bits = values.empty() ? mask.as<uint16_t>() : reinterpret_cast<const uint16_t*>(values.data());
  const uint16_t hidden = mask.dtype == DType::kFloat16 ? 0xfc00 : 0x3f80;
  for (int64_t row = 0; row < kMaskSize; ++row) {
    for (int64_t column = 0; column < kMaskSize; ++column) {
      if (bits[row * kMaskSize + column] != (column > row ? hidden : 0)) return "a mask that is not causal";
    }
  }
  return "";
}

Behaviour self_attention(const atb::infer::SelfAttentionParam& param) {
  const AttentionShape heads{param.headNum, param.kvHeadNum, 0, param.qkScale};
  const auto shape_of = [heads](const KernelTensors& tensors) {
    AttentionShape shape = heads;
    shape.head_size = tensors.inputs[0].dims[2];
    return shape;
  };
  const auto check = [heads](const KernelTensors& tensors) -> std::string {
    const auto& in = tensors.inputs;
    if (in[0].dims.rank() != 3 || !is_half(in[0]) || in[0].dims[1] != heads.heads) return "wrong queries";
    const Dims kv{in[0].dims[0], heads.kv_heads, in[0].dims[2]};
    if (!(in[1].dims == kv) || !(in[2].dims == kv)) return "wrong keys or values";
    if (!(tensors.outputs[0].dims == in[0].dims)) return "an output unlike the queries";
    const std::string fault = check_mask(in[3], in[0].dtype);
    if (!fault.empty()) return fault;
    const std::string lengths = check_lengths(in[4], tensors.host[4]);
    if (!lengths.empty()) return lengths;
    const int64_t sum = std::accumulate(tensors.host[4].begin(), tensors.host[4].end(), int64_t{0});
    return sum == in[0].dims[0] ? "" : "lengths that do not add up to the tokens";
  };
  const auto compute = [shape_of](const KernelTensors& tensors) -> std::string {
    const std::string fault =
        compare_lengths(tensors.inputs[4], tensors.host[4]) + compare_mask(tensors.inputs[3]);
    if (!fault.empty()) return fault;
    run_on_cpu(modeltorch::SelfAttention(shape_of(tensors)),
               {tensors.inputs[0], tensors.inputs[1], tensors.inputs[2], tensors.inputs[4]},
               {flat_heads(tensors.outputs[0])});
    return "";
  };
  return {"SelfAttentionOperation", 5, 1, check, compute};
}

Behaviour paged_attention(const atb::infer::PagedAttentionParam& param) {
  const AttentionShape heads{param.headNum, param.kvHeadNum, 0, param.qkScale};
  const auto check = [heads](const KernelTensors& tensors) -> std::string {
    const auto& in = tensors.inputs;
    if (in[0].dims.rank() != 3 || !is_half(in[0]) || in[0].dims[1] != heads.heads) return "wrong queries";
    for (const int index : {1, 2}) {
      const std::string fault = check_cache(in[index], in[0].dtype, heads.kv_heads, in[0].dims[2]);
      if (!fault.empty()) return fault;
    }
    if (in[3].dtype != DType::kInt32 || in[3].dims.rank() != 2 || in[3].dims[0] != in[0].dims[0])
      return "wrong block tables";
    if (!(tensors.outputs[0].dims == in[0].dims)) return "an output unlike the queries";
    return check_lengths(in[4], tensors.host[4]);
  };
  const auto compute = [heads](const KernelTensors& tensors) -> std::string {
    const auto& in = tensors.inputs;
    const std::string fault = compare_lengths(in[4], tensors.host[4]);
    if (!fault.empty()) return fault;
    AttentionShape shape = heads;
    shape.head_size = in[0].dims[2];
    const PlainCache k_cache(in[1], shape.kv_heads, shape.head_size);
    const PlainCache v_cache(in[2], shape.kv_heads, shape.head_size);
    run_on_cpu(modeltorch::PagedAttention(shape), {in[0], k_cache.view(), v_cache.view(), in[3], in[4]},
               {flat_heads(tensors.outputs[0])});
    return "";
  };
  return {"PagedAttentionOperation", 5, 1, check, compute};
}

}  // namespace
}  // namespace ascend_host

namespace atb {

using namespace ascend_host;

template <>
Status CreateOperation(const infer::ReshapeAndCacheParam& param, Operation** operation) {
  if (param.compressType != infer::ReshapeAndCacheParam::COMPRESS_TYPE_UNDEFINED) return ERROR_INVALID_PARAM;
  *operation = new HostOperation(reshape_and_cache());
  return NO_ERROR;
}

template <>
Status CreateOperation(const infer::SelfAttentionParam& param, Operation** operation) {
  const bool built = param.calcType == infer::SelfAttentionParam::PA_ENCODER &&
                     param.maskType == infer::SelfAttentionParam::MASK_TYPE_NORM && param.isTriuMask == 1;
  if (!built || param.headNum <= 0 || param.kvHeadNum <= 0) return ERROR_INVALID_PARAM;
  *operation = new HostOperation(self_attention(param));
  return NO_ERROR;
}

template <>
Status CreateOperation(const infer::PagedAttentionParam& param, Operation** operation) {
  const bool built = param.maskType == infer::PagedAttentionParam::UNDEFINED;
  if (!built || param.headNum <= 0 || param.kvHeadNum <= 0) return ERROR_INVALID_PARAM;
  *operation = new HostOperation(paged_attention(param));
  return NO_ERROR;
}

}  // namespace atb
