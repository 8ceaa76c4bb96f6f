#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "models/model.h"

namespace modeltorch {

/// The inputs of a paged decoder step by name. Their values are the input slots of the graph.
enum class DecoderInput : int8_t {
  kIds,            ///< int64 [n], or embeddings [n, hidden] in the model's dtype
  kPositions,      ///< int64 [n]
  kCosTable,       ///< model dtype [max_positions, head_size]
  kSinTable,       ///< as kCosTable
  kMask,           ///< [m, m] in prefill or one element: attention is causal whatever it holds
  kBlockTables,    ///< int32 [B, width]
  kSlots,          ///< int32 [n], -1 leaves the cache alone
  kSeqLen,         ///< int32 [B]
  kLogitsIndices,  ///< int64 [rows], prefill only
  kUnused,         ///< any tensor: never read
};
inline constexpr int kDecoderInputCount = static_cast<int>(DecoderInput::kUnused);

/// A positional contract: what stands at each position of the list that execute takes (docs/contract.md,
/// "Inputs").
struct InputOrder {
  const char* generation;
  const char* other_generation_name;  ///< the model name that takes the other order
  std::array<DecoderInput, 12> positions;
};

extern const InputOrder kOrder2024;
extern const InputOrder kOrderCurrent;

/// What the inputs of one step are checked against.
struct DecoderLimits {
  bool is_prefill = false;
  bool embeds_ids = true;  ///< input 0 holds ids, not embeddings
  DType dtype = DType::kFloat32;
  Device device;
  int64_t hidden = 0;
  int64_t head_size = 0;
  int64_t embedding_rows = 0;
  int64_t blocks = 0;
  int64_t block_size = 0;
};

/// Names the list's tensors, checks them against `limits`, the parameters and each other, and counts the
/// step.
///
/// Always: number of inputs, dtype, device, shape, contiguity, seqLen. On the CPU also every id, position,
/// slot, block-table entry in use and logits index against its range. Inputs that the phase does not read are
/// not looked at.
Step prepare_decoder_step(const InputOrder& order, const DecoderLimits& limits,
                          std::span<const GivenTensor> given, const nlohmann::json& parameters);

/// Which count each graph input follows, indexed by DecoderInput.
std::vector<Rows> decoder_input_rows();

}  // namespace modeltorch
