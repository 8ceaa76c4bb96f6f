#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "models/model.h"

namespace modeltorch {

/// How the linears of one layer lie in the weight list.
struct LayerPacking {
  bool qkv_packed = true;      ///< one weight for q, k and v
  bool gate_up_packed = true;  ///< one weight for gate and up
  bool qkv_bias = true;
  bool o_bias = false;
  bool gate_up_bias = false;
  bool down_bias = false;
  /// q k v o gate up down: true for [n, k], false for [k, n]. Packed weights use the entry of q and of gate.
  bool transposed[7] = {true, true, true, true, true, true, true};
};

/// The shape of a decoder's parameters, as far as set_param gives it.
struct DecoderShape {
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  bool has_embedding = true;
  bool head_transposed = true;  ///< lm_head is [vocab, hidden]
  bool is_bfloat16 = false;
};

/// Slots of one layer in the weight list (docs/contract.md, "Weights").
inline constexpr int64_t kSlotsPerLayer = 50;

/// The weight list of a decoder: the only place that knows slots by number.
class DecoderWeights {
 public:
  explicit DecoderWeights(const DecoderShape& shape) : shape_(shape) {}

  /// [embedding] + 50 a layer + final norm + lm_head.
  int64_t count() const { return first_layer_slot() + kSlotsPerLayer * shape_.layers + 2; }

  /// The slots in use under this packing (one entry a layer), in order.
  std::vector<WeightSpec> specs(const std::vector<LayerPacking>& packing) const;

  /// True if the k slot (or, for gate_up, the up slot) of a layer holds a placeholder.
  bool is_placeholder(std::span<const GivenTensor> given, int64_t layer, int64_t slot) const {
    return given[first_layer_slot() + layer * kSlotsPerLayer + slot].view.dims.count() == 1;
  }

  static constexpr int64_t kKeySlot = 10;
  static constexpr int64_t kUpSlot = 38;

 private:
  int64_t first_layer_slot() const { return shape_.has_embedding ? 1 : 0; }
  void add_layer(int64_t layer, const LayerPacking& packing, std::vector<WeightSpec>& specs) const;

  DecoderShape shape_;
};

/// What a checked weight list decides.
struct ResolvedWeights {
  DType dtype = DType::kFloat32;
  Device device;
  std::map<std::string, int64_t> sizes;  ///< symbol -> size: hidden, vocab, intermediate
  int64_t embedding_rows = 0;
};

/// Checks every listed slot: shape (symbols are bound at their first sight), one dtype and device for all,
/// contiguity. The embedding may have one row more than the vocabulary.
ResolvedWeights resolve_weights(const std::vector<WeightSpec>& specs, std::span<const GivenTensor> given);

}  // namespace modeltorch
