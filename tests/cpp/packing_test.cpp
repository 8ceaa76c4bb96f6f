// What set_param says about the weight list: packing, layouts, biases.

#include <algorithm>
#include <nlohmann/json.hpp>

#include "models/decoder_parameters.h"
#include "test.h"

using namespace modeltorch;
using nlohmann::json;
using test::expect;
using test::expect_throws;

namespace {

json base() {
  return {{"isPrefill", false},
          {"isBF16", false},
          {"isFA", false},
          {"numHiddenLayers", 2},
          {"numAttentionHeadsPerRank", 6},
          {"numKeyValueHeadsPerRank", 3},
          {"hiddenSizePerAttentionHead", 16}};
}

DecoderParameters parse_2024(const json& more = json::object()) {
  json all = base();
  all["rmsNormEps"] = 0.25;
  all.update(more);
  return parse_parameters_2024(all.dump(), {.qkv_bias = true});
}

DecoderParameters parse_current(const json& more = json::object()) {
  json all = base();
  all.update({{"isUnpadInputs", true},
              {"normEps", 0.25},
              {"normType", 0},
              {"rank", 0},
              {"worldSize", 1},
              {"lmHeadTransposeType", -1},
              {"linearTransposeType", json::array()},
              {"backend", "hccl"}});
  all.update(more);
  return parse_parameters_current(all.dump());
}

}  // namespace

TEST(shapes_are_read) {
  for (const DecoderParameters& parameters : {parse_2024(), parse_current()}) {
    const DecoderShape& shape = parameters.shape;
    expect(shape.layers == 2 && shape.heads == 6 && shape.kv_heads == 3 && shape.head_size == 16, "sizes");
    expect(!parameters.is_prefill && !shape.is_bfloat16 && parameters.epsilon == 0.25f, "flags and epsilon");
    expect(shape.has_embedding && shape.head_transposed && parameters.packing.size() == 2, "defaults");
    expect(parameters.expected_hidden == 0, "hiddenSize was not given");
  }
  expect(parse_2024({{"isPrefill", true}}).is_prefill && parse_current({{"isPrefill", true}}).is_prefill,
         "isPrefill");
  expect(
      parse_2024({{"isBF16", true}}).shape.is_bfloat16 && parse_current({{"isBF16", true}}).shape.is_bfloat16,
      "isBF16");
  expect(!parse_2024({{"withEmbedding", false}}).shape.has_embedding, "withEmbedding");
  expect(!parse_current({{"skipWordEmbedding", true}}).shape.has_embedding, "skipWordEmbedding");
  expect(parse_current({{"withEmbedding", false}}).shape.has_embedding,
         "the current withEmbedding means nothing");
  expect(parse_current({{"hiddenSize", 96}}).expected_hidden == 96, "hiddenSize");
  for (const auto& [type, transposed] : {std::pair{-1, true}, {0, false}, {1, true}}) {
    expect(parse_2024({{"lmHeadTransposeType", type}}).shape.head_transposed == transposed, "2024 head type ",
           type);
    expect(parse_current({{"lmHeadTransposeType", type}}).shape.head_transposed == transposed, "head type ",
           type);
  }
}

// 6.3 of the contract: ALL_* packs, MIX_* does not.
TEST(pack_types_decide) {
  const std::vector<std::vector<int64_t>> float_linears(2, std::vector<int64_t>(7, 0));
  const std::vector<int64_t> separate = {4, 5, 8, 10, 14, 15, 16, 17, 20, 21, 23, 25};
  for (int64_t type = 1; type <= 26; ++type) {
    const bool packed = std::find(separate.begin(), separate.end(), type) == separate.end();
    const int64_t other = packed ? 4 : 1;
    for (const auto parse : {parse_2024, parse_current}) {
      const DecoderParameters parameters =
          parse({{"packQuantType", {{type, other}, {other, type}}}, {"linearQuantType", float_linears}});
      expect(parameters.packing[0].qkv_packed == packed && parameters.packing[0].gate_up_packed == !packed,
             "type ", type);
      expect(parameters.packing[1].qkv_packed == !packed && parameters.packing[1].gate_up_packed == packed,
             "type ", type);
      expect(!parameters.packing_follows_weights, "the types decide");
    }
  }
  for (const int64_t type : {-1, 27, 1000}) {
    expect_throws([&] { parse_2024({{"packQuantType", {{1, 1}, {type, 1}}}}); }, ErrorKind::kValue,
                  "packQuantType", std::to_string(type));
  }
}

TEST(pack_types_of_quantised_layers_need_linear_types) {
  for (const int64_t type : {2, 4, 26}) {
    for (const auto parse : {parse_2024, parse_current}) {
      expect_throws([&] { parse({{"packQuantType", {{1, 1}, {1, type}}}}); }, ErrorKind::kNotImplemented,
                    "packQuantType", std::to_string(type));
    }
  }
}

TEST(linear_descs_decide) {
  const auto packing_of = [](const std::vector<int64_t>& descs) {
    return parse_current({{"linearDescs", {descs, descs}}}).packing[1];
  };
  expect(
      packing_of({1, -1, -1, 1, 1, -1, 1}).qkv_packed && packing_of({1, -1, -1, 1, 1, -1, 1}).gate_up_packed,
      "packed");
  expect(packing_of({0, 0, 0, 1, 1, 1, 1}).qkv_packed && packing_of({0, 0, 0, 1, 1, 1, 1}).gate_up_packed,
         "equal descs");
  expect(!packing_of({0, 1, 0, 0, 0, 0, 0}).qkv_packed && packing_of({0, 1, 0, 0, 0, 0, 0}).gate_up_packed,
         "q and k");
  expect(!packing_of({0, -1, 1, 0, 0, 0, 0}).qkv_packed, "-1 is not compared");
  expect(packing_of({1, 1, 1, 0, 0, 1, 1}).qkv_packed && !packing_of({1, 1, 1, 0, 0, 1, 1}).gate_up_packed,
         "gate and up");
  expect(packing_of({0, 0, 0, 1, 1, 1, 0}).gate_up_packed, "o and down belong to no group");
  expect(!parse_current({{"linearDescs", {{1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 1}}}})
              .packing_follows_weights,
         "");
  expect(parse_current().packing_follows_weights && parse_2024().packing_follows_weights, "nothing said");
  for (const int64_t desc : {2, 4, 7}) {
    const std::vector<int64_t> row = {1, 1, 1, 1, 1, 1, desc};
    expect_throws([&] { parse_current({{"linearDescs", {row, row}}}); }, ErrorKind::kNotImplemented,
                  "linearDescs", std::to_string(desc), "quantised");
  }
}

TEST(transpose_types_are_read) {
  for (const auto parse : {parse_2024, parse_current}) {
    const DecoderParameters parameters =
        parse({{"linearTransposeType", {{0, -1, -1, 1, 0, -1, 1}, {1, 0, 1, 0, 1, 0, 0}}}});
    const bool expected[2][7] = {{false, true, true, true, false, true, true},
                                 {true, false, true, false, true, false, false}};
    for (int layer : {0, 1}) {
      for (int linear = 0; linear < 7; ++linear) {
        expect(parameters.packing[layer].transposed[linear] == expected[layer][linear], "layer ", layer,
               " linear ", linear);
      }
    }
    const DecoderParameters silent = parse({{"linearTransposeType", json::array()}});
    for (const bool transposed : silent.packing[0].transposed) expect(transposed, "[n, k] unless said");
  }
}

TEST(biases_are_read) {
  for (const LayerPacking& packing : parse_2024().packing) {
    expect(packing.qkv_bias && !packing.o_bias && !packing.gate_up_bias && !packing.down_bias,
           "the bias of Qwen2");
  }
  expect(!parse_current().packing[0].qkv_bias, "no biases unless said");
  const std::vector<LayerPacking> packing =
      parse_current({{"linearHasBias", {{true, false, false, true}, {false, 1, true, 0}}}}).packing;
  expect(packing[0].qkv_bias && !packing[0].o_bias && !packing[0].gate_up_bias && packing[0].down_bias,
         "layer 0");
  expect(!packing[1].qkv_bias && packing[1].o_bias && packing[1].gate_up_bias && !packing[1].down_bias,
         "layer 1");
}

TEST(tables_of_a_wrong_shape_are_named) {
  const std::pair<const char*, size_t> tables[] = {{"packQuantType", 2}, {"linearQuantType", 7},
                                                   {"linearDescs", 7},   {"linearTransposeType", 7},
                                                   {"linearHasBias", 4}, {"isAntiOutlier", 2}};
  for (const auto& [key, columns] : tables) {
    const json row = std::vector<int>(columns, 0);
    parse_current({{key, {row, row}}});
    parse_current({{key, json::array()}});
    const json long_row = std::vector<int>(columns + 1, 0), short_row = std::vector<int>(columns - 1, 0);
    expect_throws([&] { parse_current({{key, {row}}}); }, ErrorKind::kValue, key, "2 rows", "got 1");
    expect_throws([&] { parse_current({{key, {row, row, row}}}); }, ErrorKind::kValue, key, "2 rows",
                  "got 3");
    for (const json& wrong : {long_row, short_row, json(0), json("0")}) {
      expect_throws([&] { parse_current({{key, {row, wrong}}}); }, ErrorKind::kValue, key, "rows of",
                    wrong.dump());
    }
    json odd = row;
    odd[columns - 1] = 0.5;
    expect_throws([&] { parse_current({{key, {row, odd}}}); }, ErrorKind::kValue, key, "0.5");
  }
  const std::vector<int64_t> quantised = {0, 0, 0, 0, 0, 0, 1}, unknown = {1, 1, 1, 1, 1, 1, 2},
                             low = {0, 0, 0, 0, 0, 0, -2};
  for (const auto parse : {parse_2024, parse_current}) {
    expect_throws([&] { parse({{"linearQuantType", {quantised, quantised}}}); }, ErrorKind::kNotImplemented,
                  "linearQuantType", "quantised");
    expect_throws([&] { parse({{"linearTransposeType", {unknown, unknown}}}); }, ErrorKind::kNotImplemented,
                  "linearTransposeType", "2");
    expect_throws([&] { parse({{"linearTransposeType", {low, low}}}); }, ErrorKind::kValue,
                  "linearTransposeType", "-2");
  }
}

// The example of section 14 of the contract, as MindIE-LLM sends it.
TEST(a_recorded_set_param_is_understood) {
  const std::string text =
      R"({"isFA":false,"isBF16":true,"skipWordEmbedding":false,"isEmbeddingParallel":true,
    "isLmHeadParallel":true,"linearTransposeType":[[0,-1,-1,1,0,-1,1],[0,-1,-1,1,0,-1,1]],"lmHeadTransposeType":0,
    "enableSwiGLU":true,"enableSwigluQuant":true,"normEps":1e-06,"normType":0,"numAttentionHeadsPerRank":4,
    "hiddenSizePerAttentionHead":32,"numHiddenLayers":2,"numKeyValueHeadsPerRank":2,"rank":0,"worldSize":1,
    "backend":"lccl","isUnpadInputs":true,"hiddenSize":128,"enableFA3":false,"attnBackend":0,"matmulBackend":0,
    "quantGroupSize":0,"enableKvQuant":false,"isLongSeq":false,"isYarn":false,"mscale":1.0,"rankTableFile":"",
    "useQKNorm":false,"linearHasBias":[[true,false,false,false],[true,false,false,false]],
    "enableGreedySearchOpt":false,"enableOmniAttention":false,"enableQScale":false,
    "mapping":{"worldSize":1,"rank":0,"attnTp":{"rank":0,"rankIds":[0],"bufferSize":128}},"isPrefill":true,
    "enableLcoc":true,"enableMC2":false,"linearDescs":[[1,-1,-1,1,1,-1,1],[1,-1,-1,1,1,-1,1]],
    "enablePreFetchWeight":false,"enableAddNorm":false,"enableIntraLayerAddNorm":false,"enableInterLayerAddNorm":false,
    "enableModelConfuscation":false,"modelConfuscationFd":0,"enableRopeQuantKvcache":false})";
  const DecoderParameters parameters = parse_parameters_current(text);
  expect(parameters.is_prefill && !parameters.shape.head_transposed && parameters.expected_hidden == 128,
         "flags");
  for (const LayerPacking& packing : parameters.packing) {
    expect(packing.qkv_packed && packing.gate_up_packed && packing.qkv_bias && !packing.o_bias,
           "packing and biases");
    expect(!packing.transposed[0] && packing.transposed[3] && !packing.transposed[4] && packing.transposed[6],
           "layouts");
  }
}
