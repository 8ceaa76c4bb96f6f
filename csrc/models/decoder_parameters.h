#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/decoder_weights.h"

namespace modeltorch {

/// The parameters of a decoder step, whatever generation of keys they came in.
struct DecoderParameters {
  DecoderShape shape;
  bool is_prefill = false;
  float epsilon = 0.0f;
  std::vector<LayerPacking> packing;     ///< one a layer
  bool packing_follows_weights = false;  ///< a layer is packed iff its k and up slots hold one element
  int64_t expected_hidden = 0;           ///< the key hiddenSize; 0: not given
  std::string packed_weight_folder;      ///< the key packedWeightFolder; "": not given
};

/// Reads the keys of 2024 (docs/contract.md, "Parameters"). Throws Error naming key, expected and given.
/// `default_packing` says which linears have a bias, since these keys do not.
DecoderParameters parse_parameters_2024(const std::string& json, const LayerPacking& default_packing);

/// Reads the current keys.
DecoderParameters parse_parameters_current(const std::string& json);

}  // namespace modeltorch
