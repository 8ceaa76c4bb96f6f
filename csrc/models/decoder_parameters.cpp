#include "models/decoder_parameters.h"

#include <algorithm>

#include "core/check.h"
#include "models/parameters.h"

namespace modeltorch {
namespace {

using enum KeyType;
using enum KeyPolicy;

// Keys that both generations know. docs/contract.md, "Parameters", says what each one means.
const std::vector<KeyRule> kSharedRules = {
    {"isPrefill", kBool, kRequired},
    {"isBF16", kBool, kRequired},
    {"isFA", kBool, kRequiredOnly, "false", "padded batches with one contiguous cache a sequence"},
    {"numAttentionHeadsPerRank", kInteger, kRequired},
    {"numKeyValueHeadsPerRank", kInteger, kRequired},
    {"hiddenSizePerAttentionHead", kInteger, kRequired},
    {"packQuantType", kArray, kOptional},
    {"linearQuantType", kArray, kOptional},
    {"isEmbeddingParallel", kBool, kMeaningless},
    {"isLmHeadParallel", kBool, kMeaningless},
    {"rankTableFile", kString, kMeaningless},
    {"enableQScale", kBool, kMeaningless},
    {"mscale", kNumber, kMeaningless},
    {"quantGroupSize", kInteger, kMeaningless},
    {"seqLen", kArray, kMeaningless},
    {"tokenOffset", kArray, kMeaningless},
    {"enableLogN", kBool, kOnly, "false", "logN attention scaling"},
    {"isLongSeq", kBool, kOnly, "false", "tables for long sequences (dynamic NTK)"},
    {"isYarn", kBool, kOnly, "false", "yarn tables computed in the graph"},
    {"enableSplitFuse", kBool, kOnly, "false", "chunked prefill"},
    {"enableFA3", kBool, kOnly, "false", "quantised attention"},
    {"loraEnableGMM", kBool, kOnly, "false", "LoRA adapters"},
    {"packedWeightFolder", kString, kOptional},
};

const std::vector<KeyRule> kRules2024 = {
    {"rmsNormEps", kNumber, kRequired},
    {"numHiddenLayers", kInteger, kRequired},
    {"lmHeadTransposeType", kInteger, kOptional},
    {"linearTransposeType", kArray, kOptional},
    {"backend", kString, kMeaningless},
    {"layerNum", kInteger, kAlias, "numHiddenLayers"},
    {"rankSize", kInteger, kAlias, "worldSize"},
    {"withEmbedding", kBool, kOptional},
    {"supportSwiGLU", kBool, kMeaningless},
    {"supportLcoc", kBool, kMeaningless},
    {"rank", kInteger, kOnly, "0", "tensor parallelism"},
    {"worldSize", kInteger, kOnly, "1", "tensor parallelism"},
    {"supportSpeculate", kBool, kOnly, "false", "speculative decoding"},
    {"supportPrefixCache", kBool, kOnly, "false", "a prefix cache"},
    {"supportLora", kBool, kOnly, "false", "LoRA adapters"},
    {"kvQuant", kBool, kOnly, "false", "an int8 cache"},
};

const std::vector<KeyRule> kRulesCurrent = {
    {"isUnpadInputs", kBool, kRequiredOnly, "true", "padded inputs"},
    {"normEps", kNumber, kRequired},
    {"normType", kInteger, kRequiredOnly, "0", "LayerNorm"},
    {"numHiddenLayers", kInteger, kRequired},
    {"rank", kInteger, kRequiredOnly, "0", "tensor parallelism"},
    {"worldSize", kInteger, kRequiredOnly, "1", "tensor parallelism"},
    {"lmHeadTransposeType", kInteger, kRequired},
    {"linearTransposeType", kArray, kRequired},
    {"backend", kString, kRequired},
    {"skipWordEmbedding", kBool, kOptional},
    {"hiddenSize", kInteger, kOptional},
    {"linearHasBias", kArray, kOptional},
    {"linearDescs", kArray, kOptional},
    {"mapping", kObject, kOptional},
    {"isAntiOutlier", kArray, kOptional},
    {"positionEmbeddingType", kInteger, kOnly, "0", "ALiBi or absolute positions"},
    {"enableKvQuant", kBool, kOnly, "false", "an int8 cache"},
    {"enableReduceQuant", kBool, kOnly, "false", "a quantised all-reduce"},
    {"enableSpeculate", kBool, kOnly, "false", "speculative decoding"},
    {"enablePrefixCache", kBool, kOnly, "false", "a prefix cache"},
    {"enableLora", kBool, kOnly, "false", "LoRA adapters"},
    {"enableFlashComm", kBool, kOnly, "false", "tensor parallelism"},
    {"enableGreedySearchOpt", kBool, kOnly, "false", "greedy search inside the graph"},
    {"enableCompressHead", kBool, kOnly, "false", "compressed heads"},
    {"enableOmniAttention", kBool, kOnly, "false", "omni attention"},
    {"enableDap", kBool, kOnly, "false", "two interleaved half batches"},
    {"memPoolType", kInteger, kOnly, "0", "a memory pool for the cache"},
    {"useQKNorm", kBool, kOnly, "false", "query and key norms (Qwen3)"},
    {"enableRopeQuantKvcache", kBool, kOnly, "false", "an int8 cache"},
    {"enableModelConfuscation", kBool, kOnly, "false", "obfuscated weights"},
    {"isEdgeHardware", kBool, kOnly, "false", "the edge model"},
    {"layerwiseDisaggregated", kBool, kOnly, "false", "layerwise disaggregation"},
    {"reuseEmbedTable", kBool, kOnly, "false", "layerwise disaggregation"},
    {"outputEmbedTable", kBool, kOnly, "false", "layerwise disaggregation"},
    {"hasPp", kBool, kOnly, "false", "pipeline parallelism"},
    {"hasAttnDp", kBool, kOnly, "false", "data-parallel attention"},
    {"weightQuantType", kString, kOptional},
    {"withEmbedding", kBool, kMeaningless},
    {"enableSwiGLU", kBool, kMeaningless},
    {"enableSwigluQuant", kBool, kMeaningless},
    {"attnBackend", kInteger, kMeaningless},
    {"matmulBackend", kInteger, kMeaningless},
    {"ropeBackend", kInteger, kMeaningless},
    {"enableLcoc", kBool, kMeaningless},
    {"enableMC2", kBool, kMeaningless},
    {"enableAddNorm", kBool, kMeaningless},
    {"enableIntraLayerAddNorm", kBool, kMeaningless},
    {"enableInterLayerAddNorm", kBool, kMeaningless},
    {"enablePreFetchWeight", kBool, kMeaningless},
    {"preFetchWeightSize", kInteger, kMeaningless},
    {"enableCVOverlap", kBool, kMeaningless},
    {"kvQuantHasOffset", kBool, kMeaningless},
    {"modelConfuscationFd", kInteger, kMeaningless},
    {"pipeKey", kString, kMeaningless},
    {"pipekey", kString, kMeaningless},
    {"pattern_mask", kArray, kMeaningless},
    {"layerwiseMode", kInteger, kMeaningless},
    {"startLayerId", kInteger, kMeaningless},
    {"endLayerId", kInteger, kMeaningless},
    {"hasAttnTp", kBool, kMeaningless},
    {"attnTpRank", kInteger, kMeaningless},
    {"attnTpSize", kInteger, kOnly, "1", "tensor parallelism"},
    {"attnTpDomain", kString, kMeaningless},
    {"attnDpRank", kInteger, kMeaningless},
    {"attnDpSize", kInteger, kOnly, "1", "data-parallel attention"},
    {"attnDpDomain", kString, kMeaningless},
    {"hasMlpTp", kBool, kMeaningless},
    {"mlpTpRank", kInteger, kMeaningless},
    {"mlpTpSize", kInteger, kOnly, "1", "tensor parallelism"},
    {"mlpTpDomain", kString, kMeaningless},
    {"tpRank", kInteger, kMeaningless},
    {"tpWorldSize", kInteger, kOnly, "1", "tensor parallelism"},
    {"tpDomain", kString, kMeaningless},
    {"tpRankTableFile", kString, kMeaningless},
    {"ppGroupSize", kInteger, kMeaningless},
    {"firstPpRank", kBool, kMeaningless},
    {"lastPpRank", kBool, kMeaningless},
    {"prevPpRank", kInteger, kMeaningless},
    {"nextPpRank", kInteger, kMeaningless},
};

std::vector<KeyRule> with_shared(const std::vector<KeyRule>& rules) {
  std::vector<KeyRule> all = kSharedRules;
  all.insert(all.end(), rules.begin(), rules.end());
  return all;
}

int64_t limited(const Parameters& parameters, const char* key, int64_t most) {
  const int64_t value = parameters.positive(key);
  check(value <= most, "parameter ", key, " must be at most ", most, ", got ", value);
  return value;
}

float read_epsilon(const Parameters& parameters, const char* key) {
  const double epsilon = parameters.number(key, 0.0);
  check(epsilon > 0.0 && epsilon < 1.0, "parameter ", key, " must be above 0 and below 1, got ", epsilon);
  return static_cast<float>(epsilon);
}

DecoderShape read_shape(const Parameters& parameters) {
  constexpr int64_t kMaxLayers = 1000;
  constexpr int64_t kMaxHeads = 4096;
  constexpr int64_t kMaxHeadSize = 575;
  DecoderShape shape;
  shape.layers = limited(parameters, "numHiddenLayers", kMaxLayers);
  shape.heads = limited(parameters, "numAttentionHeadsPerRank", kMaxHeads);
  shape.kv_heads = limited(parameters, "numKeyValueHeadsPerRank", kMaxHeads);
  shape.head_size = limited(parameters, "hiddenSizePerAttentionHead", kMaxHeadSize);
  check(shape.heads % shape.kv_heads == 0, "numAttentionHeadsPerRank (", shape.heads,
        ") must be a multiple of numKeyValueHeadsPerRank (", shape.kv_heads, ")");
  check(shape.head_size % 2 == 0, "hiddenSizePerAttentionHead must be even for the rotary embedding, got ",
        shape.head_size);
  const int64_t type = parameters.integer("lmHeadTransposeType", -1);
  check(type >= -1 && type <= 1, "parameter lmHeadTransposeType must be -1, 0 or 1, got ", type);
  shape.head_transposed = type != 0;
  shape.is_bfloat16 = parameters.flag("isBF16", false);
  return shape;
}

std::string read_folder(const Parameters& parameters) {
  const std::string folder = parameters.text("packedWeightFolder", "");
  check(folder.find('\0') == folder.npos,
        "parameter packedWeightFolder must be a path, got one with a zero in it");
  return folder;
}

constexpr int64_t kLinears = 7;  // q k v o gate up down

// Entries that a table may hold for a linear that is not quantised; -1 stands for an unused one.
void check_entries(const char* key, const std::vector<std::vector<int64_t>>& table, int64_t most,
                   const char* asks) {
  for (const std::vector<int64_t>& row : table) {
    for (const int64_t entry : row) {
      check(entry >= -1, "parameter ", key, " must hold numbers from -1, got ", entry);
      if (entry > most) {
        fail(ErrorKind::kNotImplemented, "parameter ", key, " holds ", entry, ", which asks for ", asks,
             ", which is not built");
      }
    }
  }
}

// ALL_* types pack, MIX_* do not, 0 is undefined (docs/contract.md, "Weights").
enum class Packing { kUndefined, kPacked, kSeparate };

Packing packing_of_type(int64_t type) {
  constexpr int64_t kSeparateTypes[] = {4, 5, 8, 10, 14, 15, 16, 17, 20, 21, 23, 25};
  check(type >= 0 && type <= 26, "parameter packQuantType must hold numbers from 0 to 26, got ", type);
  if (type == 0) return Packing::kUndefined;
  const bool separate =
      std::find(std::begin(kSeparateTypes), std::end(kSeparateTypes), type) != std::end(kSeparateTypes);
  return separate ? Packing::kSeparate : Packing::kPacked;
}

// Packed iff the valid descs of the group are equal, -1 not being valid.
bool descs_agree(const std::vector<int64_t>& descs, int first, int last) {
  int64_t seen = -1;
  for (int index = first; index <= last; ++index) {
    if (descs[index] == -1) continue;
    if (seen != -1 && seen != descs[index]) return false;
    seen = descs[index];
  }
  return true;
}

// `descs` is the table linearDescs of the current keys, or empty.
void read_packing(const Parameters& parameters, const std::vector<std::vector<int64_t>>& descs,
                  DecoderParameters& result) {
  const int64_t layers = result.shape.layers;
  const auto pack = parameters.table("packQuantType", layers, 2);
  const auto types = parameters.table("linearQuantType", layers, kLinears);
  const auto transposes = parameters.table("linearTransposeType", layers, kLinears);
  check_entries("linearQuantType", types, 0, "a quantised linear");
  check_entries("linearTransposeType", transposes, 1, "an unknown layout");
  for (const std::vector<int64_t>& row : pack) {
    for (const int64_t type : row) packing_of_type(type);
  }
  if (types.empty() && descs.empty()) {
    check_entries("packQuantType (without linearQuantType or linearDescs)", pack, 1, "quantised layers");
  }
  result.packing_follows_weights = pack.empty() && descs.empty();
  for (int64_t layer = 0; layer < layers; ++layer) {
    LayerPacking& packing = result.packing[layer];
    bool* const packed[] = {&packing.qkv_packed, &packing.gate_up_packed};
    for (int group = 0; group < 2; ++group) {
      const Packing type = pack.empty() ? Packing::kUndefined : packing_of_type(pack[layer][group]);
      const bool agree = descs.empty() || descs_agree(descs[layer], group == 0 ? 0 : 4, group == 0 ? 2 : 5);
      *packed[group] = type == Packing::kUndefined ? agree : type == Packing::kPacked;
    }
    for (int64_t index = 0; index < kLinears && !transposes.empty(); ++index) {
      packing.transposed[index] = transposes[layer][index] != 0;
    }
  }
}

void read_biases(const Parameters& parameters, DecoderParameters& result) {
  const auto biases = parameters.table("linearHasBias", result.shape.layers, 4);
  for (size_t layer = 0; layer < biases.size(); ++layer) {
    result.packing[layer].qkv_bias = biases[layer][0] != 0;
    result.packing[layer].o_bias = biases[layer][1] != 0;
    result.packing[layer].gate_up_bias = biases[layer][2] != 0;
    result.packing[layer].down_bias = biases[layer][3] != 0;
  }
}

// At world size 1 every communication group has one member.
void check_mapping(const Parameters& parameters) {
  if (!parameters.has("mapping")) return;
  const nlohmann::json& mapping = parameters.at("mapping");
  const auto world = mapping.find("worldSize");
  if (world != mapping.end() && *world != 1) {
    fail(ErrorKind::kNotImplemented, "parameter mapping.worldSize = ", world->dump(),
         " asks for parallelism over several devices, which is not built; only 1 is");
  }
  for (const auto& item : mapping.items()) {
    if (!item.value().is_object()) continue;
    const auto ranks = item.value().find("rankIds");
    if (ranks == item.value().end() || !ranks->is_array() || ranks->size() <= 1) continue;
    fail(ErrorKind::kNotImplemented, "parameter mapping.", item.key(), ".rankIds has ", ranks->size(),
         " ranks, which asks for parallelism over several devices, which is not built");
  }
}

void check_float_model(const Parameters& parameters) {
  if (parameters.has("weightQuantType")) {
    const std::string type = parameters.at("weightQuantType").get<std::string>();
    if (type != "" && type != "float") {
      fail(ErrorKind::kNotImplemented, "parameter weightQuantType = ", type,
           " asks for quantised weights, which are not built; only \"\" and \"float\" are");
    }
  }
  for (const std::vector<int64_t>& row :
       parameters.table("isAntiOutlier", parameters.positive("numHiddenLayers"), 2)) {
    if (row[0] != 0 || row[1] != 0) {
      fail(ErrorKind::kNotImplemented,
           "parameter isAntiOutlier = true asks for the norms of quantised weights, "
           "which are not built");
    }
  }
}

}  // namespace

DecoderParameters parse_parameters_2024(const std::string& json, const LayerPacking& default_packing) {
  const std::vector<KeyRule> rules = with_shared(kRules2024);
  const Parameters parameters(json, rules);
  DecoderParameters result;
  result.is_prefill = parameters.flag("isPrefill", false);
  result.packed_weight_folder = read_folder(parameters);
  result.epsilon = read_epsilon(parameters, "rmsNormEps");
  result.shape = read_shape(parameters);
  result.shape.has_embedding = parameters.flag("withEmbedding", true);
  result.packing.assign(result.shape.layers, default_packing);
  read_packing(parameters, {}, result);
  return result;
}

DecoderParameters parse_parameters_current(const std::string& json) {
  const std::vector<KeyRule> rules = with_shared(kRulesCurrent);
  const Parameters parameters(json, rules);
  DecoderParameters result;
  result.is_prefill = parameters.flag("isPrefill", false);
  result.packed_weight_folder = read_folder(parameters);
  result.epsilon = read_epsilon(parameters, "normEps");
  result.shape = read_shape(parameters);
  result.shape.has_embedding = !parameters.flag("skipWordEmbedding", false);
  result.expected_hidden = parameters.integer("hiddenSize", 0);
  result.packing.assign(result.shape.layers, LayerPacking{.qkv_bias = false});
  check_float_model(parameters);
  check_mapping(parameters);
  const auto descs = parameters.table("linearDescs", result.shape.layers, kLinears);
  check_entries("linearDescs", descs, 1, "a quantised linear");
  read_packing(parameters, descs, result);
  read_biases(parameters, result);
  return result;
}

}  // namespace modeltorch
