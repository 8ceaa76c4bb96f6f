// The JSON of set_param. Keys and policies are written down here a second time, from docs/contract.md.

#include <functional>
#include <iterator>
#include <sstream>

#include "models/decoder_parameters.h"
#include "models/parameters.h"
#include "test.h"
#include "warnings.h"

using namespace modeltorch;
using nlohmann::json;
using test::CapturedWarnings;
using test::expect;
using test::expect_throws;

namespace {

// One generation of keys: its parser, a valid object, and the keys by type.
struct Generation {
  const char* name;
  std::function<DecoderParameters(const std::string&)> parse;
  json valid = {};
  std::vector<std::string> required = {};
  std::vector<std::string> booleans = {}, integers = {}, numbers = {}, strings = {}, arrays = {},
                           objects = {};

  /// Parses the valid object with `key` set to a JSON text, or removed if that is empty.
  DecoderParameters with(const std::string& key, const std::string& value) const {
    json changed = valid;
    if (value.empty()) {
      changed.erase(key);
    } else {
      changed[key] = json::parse(value);
    }
    return parse(changed.dump());
  }
};

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

json shared_keys() {
  return {{"isPrefill", true},
          {"isBF16", true},
          {"isFA", false},
          {"numHiddenLayers", 2},
          {"numAttentionHeadsPerRank", 4},
          {"numKeyValueHeadsPerRank", 2},
          {"hiddenSizePerAttentionHead", 32}};
}

Generation generation_2024() {
  Generation keys{.name = "2024",
                  .parse = [](const std::string& text) { return parse_parameters_2024(text, {}); }};
  keys.valid = shared_keys();
  keys.valid["rmsNormEps"] = 1e-6;
  keys.required = words(
      "isPrefill isBF16 isFA numHiddenLayers numAttentionHeadsPerRank numKeyValueHeadsPerRank "
      "hiddenSizePerAttentionHead rmsNormEps");
  keys.booleans = words(
      "isPrefill isBF16 isFA isEmbeddingParallel isLmHeadParallel enableQScale enableLogN "
      "isLongSeq isYarn enableSplitFuse enableFA3 loraEnableGMM withEmbedding supportSwiGLU "
      "supportLcoc supportSpeculate supportPrefixCache supportLora kvQuant");
  keys.integers = words(
      "numHiddenLayers numAttentionHeadsPerRank numKeyValueHeadsPerRank "
      "hiddenSizePerAttentionHead quantGroupSize lmHeadTransposeType rank worldSize");
  keys.numbers = words("rmsNormEps mscale");
  keys.strings = words("rankTableFile backend");
  keys.arrays = words("packQuantType linearQuantType linearTransposeType seqLen tokenOffset");
  return keys;
}

Generation generation_current() {
  Generation keys{.name = "current", .parse = parse_parameters_current};
  keys.valid = shared_keys();
  const json types = {1, -1, -1, 1, 1, -1, 1};
  keys.valid.update({{"isUnpadInputs", true},
                     {"normEps", 1e-6},
                     {"normType", 0},
                     {"rank", 0},
                     {"worldSize", 1},
                     {"lmHeadTransposeType", 1},
                     {"linearTransposeType", {types, types}},
                     {"backend", "lccl"}});
  keys.required = words(
      "isPrefill isBF16 isFA numHiddenLayers numAttentionHeadsPerRank numKeyValueHeadsPerRank "
      "hiddenSizePerAttentionHead isUnpadInputs normEps normType rank worldSize "
      "lmHeadTransposeType linearTransposeType backend");
  keys.booleans = words(
      "isPrefill isBF16 isFA isEmbeddingParallel isLmHeadParallel enableQScale enableLogN "
      "isLongSeq isYarn enableSplitFuse enableFA3 loraEnableGMM isUnpadInputs withEmbedding "
      "skipWordEmbedding enableSwiGLU enableSwigluQuant enableKvQuant enableReduceQuant "
      "enableSpeculate enablePrefixCache enableLora enableLcoc enableMC2 enableFlashComm "
      "enableGreedySearchOpt enableCompressHead enableOmniAttention enableAddNorm "
      "enableIntraLayerAddNorm enableInterLayerAddNorm enablePreFetchWeight enableDap "
      "enableCVOverlap useQKNorm enableRopeQuantKvcache enableModelConfuscation isEdgeHardware "
      "kvQuantHasOffset layerwiseDisaggregated reuseEmbedTable outputEmbedTable hasPp hasAttnTp "
      "hasAttnDp hasMlpTp");
  keys.integers = words(
      "numHiddenLayers numAttentionHeadsPerRank numKeyValueHeadsPerRank "
      "hiddenSizePerAttentionHead quantGroupSize lmHeadTransposeType rank worldSize normType "
      "hiddenSize positionEmbeddingType memPoolType attnBackend matmulBackend ropeBackend "
      "preFetchWeightSize modelConfuscationFd layerwiseMode startLayerId endLayerId attnTpRank "
      "attnTpSize attnDpRank attnDpSize mlpTpRank mlpTpSize tpRank tpWorldSize ppGroupSize "
      "prevPpRank nextPpRank");
  keys.numbers = words("normEps mscale");
  keys.strings = words(
      "rankTableFile backend weightQuantType pipeKey attnTpDomain attnDpDomain mlpTpDomain "
      "tpDomain tpRankTableFile");
  keys.arrays = words(
      "packQuantType linearQuantType linearTransposeType linearDescs linearHasBias isAntiOutlier "
      "pattern_mask seqLen tokenOffset");
  keys.objects = words("mapping");
  return keys;
}

const Generation kGenerations[] = {generation_2024(), generation_current()};

// {key, the only accepted value, a refused one}.
using OnlyKeys = std::vector<std::array<const char*, 3>>;

const OnlyKeys kOnlyShared = {{"isFA", "false", "true"},
                              {"enableLogN", "false", "true"},
                              {"isLongSeq", "false", "true"},
                              {"isYarn", "false", "true"},
                              {"enableSplitFuse", "false", "true"},
                              {"enableFA3", "false", "true"},
                              {"loraEnableGMM", "false", "true"},
                              {"rank", "0", "1"},
                              {"worldSize", "1", "2"}};

const OnlyKeys kOnly[] = {{{"supportSpeculate", "false", "true"},
                           {"supportPrefixCache", "false", "true"},
                           {"supportLora", "false", "true"},
                           {"kvQuant", "false", "true"}},
                          {{"isUnpadInputs", "true", "false"},
                           {"normType", "0", "1"},
                           {"positionEmbeddingType", "0", "1"},
                           {"enableKvQuant", "false", "true"},
                           {"enableReduceQuant", "false", "true"},
                           {"enableSpeculate", "false", "true"},
                           {"enablePrefixCache", "false", "true"},
                           {"enableLora", "false", "true"},
                           {"enableFlashComm", "false", "true"},
                           {"enableGreedySearchOpt", "false", "true"},
                           {"enableCompressHead", "false", "true"},
                           {"enableOmniAttention", "false", "true"},
                           {"enableDap", "false", "true"},
                           {"memPoolType", "0", "2"},
                           {"useQKNorm", "false", "true"},
                           {"enableRopeQuantKvcache", "false", "true"},
                           {"enableModelConfuscation", "false", "true"},
                           {"isEdgeHardware", "false", "true"},
                           {"layerwiseDisaggregated", "false", "true"},
                           {"reuseEmbedTable", "false", "true"},
                           {"outputEmbedTable", "false", "true"},
                           {"hasPp", "false", "true"},
                           {"hasAttnDp", "false", "true"},
                           {"attnTpSize", "1", "2"},
                           {"attnDpSize", "1", "4"},
                           {"mlpTpSize", "1", "8"},
                           {"tpWorldSize", "1", "2"}}};

}  // namespace

TEST(required_keys_are_named) {
  for (const Generation& keys : kGenerations) {
    keys.with("mscale", "1.0");
    for (const std::string& key : keys.required) {
      expect_throws([&] { keys.with(key, ""); }, ErrorKind::kValue, "parameter " + key + " is required",
                    "missing");
    }
  }
}

TEST(wrong_types_are_named) {
  for (const Generation& keys : kGenerations) {
    const auto expect_type = [&](const std::vector<std::string>& names, const char* type,
                                 const std::vector<const char*>& wrong) {
      for (const std::string& key : names) {
        for (const char* value : wrong) {
          expect_throws([&] { keys.with(key, value); }, ErrorKind::kValue,
                        "parameter " + key + " must be " + type, json::parse(value).dump());
        }
      }
    };
    expect_type(keys.booleans, "a boolean", {"1", "0", "\"true\"", "null", "[true]"});
    expect_type(keys.integers, "a whole number", {"true", "\"1\"", "1.5", "null", "[1]"});
    expect_type(keys.numbers, "a number", {"\"1e-6\"", "true", "null", "[1e-6]"});
    expect_type(keys.strings, "a string", {"0", "false", "null", "[]"});
    expect_type(keys.arrays, "an array", {"0", "\"[]\"", "{}", "null"});
    expect_type(keys.objects, "an object", {"0", "[]", "\"{}\"", "null"});
  }
}

TEST(features_that_are_not_built_are_named) {
  for (int which : {0, 1}) {
    const Generation& keys = kGenerations[which];
    OnlyKeys only = kOnlyShared;
    only.insert(only.end(), kOnly[which].begin(), kOnly[which].end());
    for (const auto& [key, good, bad] : only) {
      keys.with(key, good);
      expect_throws([&] { keys.with(key, bad); }, ErrorKind::kNotImplemented,
                    concat("parameter ", key, " = ", bad), "not built", concat("only ", good, " is"));
    }
  }
  const Generation& current = kGenerations[1];
  for (const char* type : {"w8a8", "w8a16", "w4a16", "w8a8_dynamic"}) {
    expect_throws([&] { current.with("weightQuantType", json(type).dump()); }, ErrorKind::kNotImplemented,
                  concat("weightQuantType = ", type), "not built");
  }
  current.with("weightQuantType", "\"float\"");
  current.with("weightQuantType", "\"\"");
  current.with("isAntiOutlier", "[[false,false],[false,false]]");
  expect_throws([&] { current.with("isAntiOutlier", "[[false,false],[false,true]]"); },
                ErrorKind::kNotImplemented, "isAntiOutlier");
  current.with("mapping", R"({"attnTp":{"rank":0,"rankIds":[0]},"worldSize":1,"moeTp":{}})");
  expect_throws(
      [&] { current.with("mapping", R"({"attnTp":{"rank":0,"rankIds":[0]},"mlpTp":{"rankIds":[0,1]}})"); },
      ErrorKind::kNotImplemented, "mapping.mlpTp.rankIds", "2 ranks");
  expect_throws([&] { current.with("mapping", R"({"worldSize":2})"); }, ErrorKind::kNotImplemented,
                "mapping.worldSize = 2");
}

// A value that every key of this type accepts, unless it accepts one value only.
TEST(known_keys_are_accepted_in_silence) {
  const CapturedWarnings warnings;
  for (int which : {0, 1}) {
    const Generation& keys = kGenerations[which];
    const auto accept = [&](const std::vector<std::string>& names, const std::string& value) {
      for (const std::string& key : names) {
        std::string accepted = value;
        for (const OnlyKeys* only : {&kOnlyShared, &kOnly[which]}) {
          for (const auto& [name, good, bad] : *only) accepted = key == name ? good : accepted;
        }
        if (!keys.valid.contains(key)) keys.with(key, accepted);
      }
    };
    accept(keys.booleans, "true");
    accept(keys.integers, "1");
    accept(keys.numbers, "1.5");
    accept(keys.strings, "\"\"");
    accept(keys.arrays, "[]");
    accept(keys.objects, "{}");
  }
  expect(CapturedWarnings::messages.empty(), "a known key is warned of");
}

TEST(unknown_keys_are_told_in_one_warning) {
  for (const Generation& keys : kGenerations) {
    const CapturedWarnings warnings;
    json odd = keys.valid;
    odd["isPrefil"] = 3;
    odd["zzz"] = {{"a", 1}};
    keys.parse(odd.dump());
    expect(CapturedWarnings::messages.size() == 1, "warnings: ", CapturedWarnings::messages.size());
    const std::string& message = CapturedWarnings::messages[0];
    expect(message.find("isPrefil, zzz") != std::string::npos, message);
  }
}

TEST(aliases_stand_for_their_keys) {
  const Generation& keys = kGenerations[0];
  json renamed = keys.valid;
  renamed.erase("numHiddenLayers");
  renamed["layerNum"] = 5;
  renamed["rankSize"] = 1;
  const CapturedWarnings warnings;
  expect(keys.parse(renamed.dump()).shape.layers == 5, "layerNum is numHiddenLayers");
  expect(CapturedWarnings::messages.empty(), "aliases are known");
  renamed["rankSize"] = 2;
  expect_throws([&] { keys.parse(renamed.dump()); }, ErrorKind::kNotImplemented, "worldSize = 2");
  expect_throws([&] { keys.with("layerNum", "3"); }, ErrorKind::kValue, "layerNum", "numHiddenLayers", "3",
                "2");
  keys.with("layerNum", "2");
  expect_throws([&] { kGenerations[1].with("numHiddenLayers", ""); }, ErrorKind::kValue, "numHiddenLayers");
}

TEST(texts_that_are_no_object_are_refused) {
  for (const Generation& keys : kGenerations) {
    const auto refuse = [&](const std::string& text, const auto&... parts) {
      expect_throws([&] { keys.parse(text); }, ErrorKind::kValue, parts...);
    };
    refuse("", "empty");
    for (const char* text :
         {"{", "nonsense", "{\"a\":}", "{}x", "{'a': 1}", "{\"a\": NaN}", "{\"a\": 1e400}", "\xff{}"}) {
      refuse(text, "must be a JSON object", "invalid");
    }
    for (const char* text : {"[]", "3", "\"{}\"", "null", "true"})
      refuse(text, "must be a JSON object, got", text);
    const std::string valid = keys.valid.dump();
    keys.parse(valid + std::string(kMaxJsonLength - valid.size(), ' '));
    refuse(valid + std::string(kMaxJsonLength + 1 - valid.size(), ' '), "200000", "200001");
    const auto nested = [&](int64_t levels) {  // `levels` in all, the object being the first
      return valid.substr(0, valid.size() - 1) + ",\"pattern_mask\":" + std::string(levels - 1, '[') +
             std::string(levels - 1, ']') + "}";
    };
    const CapturedWarnings warnings;
    keys.parse(nested(32));
    for (const int64_t levels : {34, 1000, 90000}) refuse(nested(levels), "nest");
    refuse(std::string(100000, '['), "nest");
  }
}

TEST(numbers_out_of_range_are_named) {
  const std::vector<std::pair<const char*, std::vector<const char*>>> cases = {
      {"numHiddenLayers", {"0", "-1", "1001", "1000000000", "9223372036854775807"}},
      {"numAttentionHeadsPerRank", {"0", "-4", "4098", "4611686018427387904"}},
      {"numKeyValueHeadsPerRank", {"0", "-1", "3", "8", "4097"}},
      {"hiddenSizePerAttentionHead", {"0", "-2", "7", "576", "2147483648"}},
      {"lmHeadTransposeType", {"-2", "2", "4294967296"}},
  };
  for (const Generation& keys : kGenerations) {
    for (const auto& [key, values] : cases) {
      for (const char* value : values) {
        expect_throws([&] { keys.with(key, value); }, ErrorKind::kValue, key, value);
      }
      // Beyond int64_t: refused, not wrapped around to a number that is fine.
      for (const char* value :
           {"9223372036854775808", "18446744073709551615", "18446744073709551617", "1e30"}) {
        expect_throws([&] { keys.with(key, value); }, ErrorKind::kValue, key);
      }
    }
    const std::string epsilon = keys.numbers[0];
    for (const char* value : {"0", "-1e-6", "1", "1.5", "1e300"}) {
      expect_throws([&] { keys.with(epsilon, value); }, ErrorKind::kValue, epsilon, "above 0 and below 1");
    }
    expect(keys.with(epsilon, "1e-5").epsilon == 1e-5f, "epsilon is read");
    const std::string row = "[1,1,1,1,1,1,18446744073709551615]";
    expect_throws([&] { keys.with("linearTransposeType", concat("[", row, ",", row, "]")); },
                  ErrorKind::kValue, "linearTransposeType", "18446744073709551615");
  }
}
