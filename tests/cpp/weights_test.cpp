// The weight list, the caches and the model registry.

#include <map>

#include "models/registry.h"
#include "test.h"
#include "tiny_qwen.h"
#include "warnings.h"

using namespace modeltorch;
using nlohmann::json;
using test::CapturedWarnings;
using test::concat;
using test::expect;
using test::expect_throws;

namespace {

constexpr int64_t kLayers = 2, kHeads = 4, kKvHeads = 2, kHeadSize = 8, kHidden = 24, kIntermediate = 20,
                  kVocab = 11;

json parameters_2024() {
  return {{"isPrefill", true},
          {"isBF16", false},
          {"isFA", false},
          {"rmsNormEps", 1e-6},
          {"numHiddenLayers", kLayers},
          {"numAttentionHeadsPerRank", kHeads},
          {"numKeyValueHeadsPerRank", kKvHeads},
          {"hiddenSizePerAttentionHead", kHeadSize},
          {"linearQuantType", std::vector<std::vector<int>>(2, std::vector<int>(7, 0))},
          {"packQuantType", {{1, 1}, {4, 4}}}};
}

std::unique_ptr<Model> model_with(const json& more = json::object(), const char* name = "qwen_PAModel") {
  json all = parameters_2024();
  all.update(more);
  return make_model(name, all.dump());
}

// A list of shapes without memory: accept_weights never looks at values. Slots that the model does not use
// hold what no model could use.
std::vector<GivenTensor> weights_for(const Model& model, int64_t vocab = kVocab,
                                     DType dtype = DType::kFloat32) {
  const std::map<std::string, int64_t> sizes = {{"hidden", kHidden},
                                                {"vocab", vocab},
                                                {"vocab or vocab + 1", vocab},
                                                {"intermediate", kIntermediate},
                                                {"2*intermediate", 2 * kIntermediate}};
  const GivenTensor unused{{nullptr, DType::kOther, {1}}, {DeviceType::kOther, 0}, Layout::kStrided};
  std::vector<GivenTensor> weights(model.weight_count(), unused);
  for (const WeightSpec& spec : model.weight_specs()) {
    Dims dims;
    for (const WeightDim& dim : spec.shape)
      dims.push_back(dim.symbol.empty() ? dim.size : sizes.at(dim.symbol));
    weights[spec.slot] = {{nullptr, dtype, dims}, Device{}};
  }
  return weights;
}

std::vector<GivenTensor> caches(const Dims& dims, DType dtype = DType::kFloat32) {
  return std::vector<GivenTensor>(kLayers, {{nullptr, dtype, dims}, Device{}});
}

Dims good_cache() {
  return {7, 16, kKvHeads, kHeadSize};
}

// Everything that accept_weights decides, as text.
std::string decided(const Model& model) {
  StepInfo step;
  step.logit_rows = 3;
  std::string text = concat(model.output_descs(step)[0], " on ", model.device(), ":");
  for (const WeightSpec& spec : model.weight_specs()) text += concat(" ", spec.name);
  return text;
}

}  // namespace

TEST(slots_and_shapes_are_those_of_the_contract) {
  const std::unique_ptr<Model> model = model_with();  // layer 0 packed, layer 1 separate
  expect(model->weight_count() == 103, "1 + 50 * 2 + 2, got ", model->weight_count());
  std::map<int64_t, std::string> slots;
  for (const WeightSpec& spec : model->weight_specs()) {
    std::string shape;
    for (const WeightDim& dim : spec.shape)
      shape += " " + (dim.symbol.empty() ? std::to_string(dim.size) : dim.symbol);
    expect(slots.emplace(spec.slot, spec.name + shape).second, "slot ", spec.slot, " is listed twice");
    expect(spec.dtype == "float" && !spec.checkpoint.empty() && !spec.shard.empty(), spec.name);
  }
  const std::map<int64_t, std::string> expected = {
      {0, "embedding.weight vocab or vocab + 1 hidden"},
      {1, "layers.0.attn.norm.weight hidden"},
      {5, "layers.0.attn.qkv.weight 64 hidden"},
      {6, "layers.0.attn.qkv.bias 64"},
      {23, "layers.0.attn.o.weight hidden 32"},
      {29, "layers.0.mlp.norm.weight hidden"},
      {33, "layers.0.mlp.gate_up.weight 2*intermediate hidden"},
      {45, "layers.0.mlp.down.weight hidden intermediate"},
      {51, "layers.1.attn.norm.weight hidden"},
      {55, "layers.1.attn.q.weight 32 hidden"},
      {56, "layers.1.attn.q.bias 32"},
      {61, "layers.1.attn.k.weight 16 hidden"},
      {62, "layers.1.attn.k.bias 16"},
      {67, "layers.1.attn.v.weight 16 hidden"},
      {68, "layers.1.attn.v.bias 16"},
      {73, "layers.1.attn.o.weight hidden 32"},
      {79, "layers.1.mlp.norm.weight hidden"},
      {83, "layers.1.mlp.gate.weight intermediate hidden"},
      {89, "layers.1.mlp.up.weight intermediate hidden"},
      {95, "layers.1.mlp.down.weight hidden intermediate"},
      {101, "final_norm.weight hidden"},
      {102, "lm_head.weight vocab hidden"},
  };
  for (const auto& [slot, name] : expected)
    expect(slots[slot] == name, "slot ", slot, ": ", slots[slot], ", not ", name);
  expect(slots.size() == expected.size(), slots.size(), " slots in use");
}

TEST(layouts_and_phases_change_the_list) {
  const std::vector<int64_t> not_transposed(7, 0);
  const auto model = model_with({{"linearTransposeType", {not_transposed, not_transposed}},
                                 {"lmHeadTransposeType", 0},
                                 {"withEmbedding", false},
                                 {"isBF16", true}});
  expect(model->weight_count() == 102, "no embedding, one slot less");
  const std::vector<WeightSpec> specs = model->weight_specs();
  expect(specs[0].name == "layers.0.attn.norm.weight" && specs[0].slot == 0, "slots move by one");
  expect(specs[1].slot == 4 && specs[1].shape[0].symbol == "hidden" && specs[1].shape[1].size == 64,
         "qkv is [k, n]");
  expect(specs.back().shape[0].symbol == "hidden" && specs.back().shape[1].symbol == "vocab",
         "lm_head is [k, n]");
  for (const WeightSpec& spec : specs) expect(spec.dtype == "bfloat16", spec.name);
  expect(model_with({{"isPrefill", false}})->name() == "DecoderModel_Decoder", "decode");
  expect(model_with()->name() == "DecoderModel_Prefill" && model_with()->cache_count() == kLayers, "prefill");
}

TEST(every_slot_is_checked) {
  const std::unique_ptr<Model> model = model_with();
  model->accept_weights(weights_for(*model));
  const std::string before = decided(*model);
  for (const WeightSpec& spec : model->weight_specs()) {
    const std::string label = concat("weight ", spec.slot, " (", spec.name, ")");
    const auto refuse = [&](const auto& change, const auto&... parts) {
      std::vector<GivenTensor> weights = weights_for(*model, kVocab + 2);
      change(weights[spec.slot]);
      expect_throws([&] { model->accept_weights(weights); }, ErrorKind::kValue, parts...);
      expect(decided(*model) == before, "a fault in ", label, " left something behind: ", decided(*model));
    };
    refuse([](GivenTensor& weight) { weight.layout = Layout::kStrided; }, label, "contiguous");
    refuse([](GivenTensor& weight) { weight.view.dims.push_back(1); }, label, "must be [",
           concat("got ", DType::kFloat32));
    refuse([](GivenTensor& weight) { weight.view.dims = {1}; }, label, "must be [");
    refuse([](GivenTensor& weight) { weight.layout = Layout::kSparse; }, label, "contiguous", "sparse");
    refuse([](GivenTensor& weight) { weight.view.dtype = DType::kInt8; }, label, "bfloat16 or float16",
           "int8");
    // One odd weight is blamed, not all the others, whatever its place in the list.
    refuse([](GivenTensor& weight) { weight.view.dtype = DType::kBFloat16; }, label, "must be float32",
           "bfloat16");
    refuse([](GivenTensor& weight) { weight.device = {DeviceType::kCuda, 1}; }, label, "must be on cpu",
           "cuda:1");
  }
}

TEST(every_size_is_checked) {
  const std::unique_ptr<Model> model = model_with();
  for (const WeightSpec& spec : model->weight_specs()) {
    for (int axis = 0; axis < static_cast<int>(spec.shape.size()); ++axis) {
      for (const int64_t change : {-1, 1, 7}) {
        // The embedding may have one row more than lm_head.
        if (axis == 0 && spec.name == (change == 1    ? "embedding.weight"
                                       : change == -1 ? "lm_head.weight"
                                                      : ""))
          continue;
        std::vector<GivenTensor> weights = weights_for(*model);
        weights[spec.slot].view.dims[axis] += change;
        // A size that only the weights decide may be seen as wrong in any of the places that share it.
        const bool is_shared = !spec.shape[axis].symbol.empty();
        expect_throws([&] { model->accept_weights(weights); }, ErrorKind::kValue,
                      is_shared ? "weight " : concat("weight ", spec.slot, " (", spec.name, ")"), "must");
      }
      std::vector<GivenTensor> weights = weights_for(*model);
      weights[spec.slot].view.dims[axis] = 0;
      expect_throws([&] { model->accept_weights(weights); }, ErrorKind::kValue, "weight ");
    }
  }
}

TEST(a_list_decides_sizes_dtype_and_device) {
  const std::unique_ptr<Model> model = model_with();
  std::vector<GivenTensor> weights = weights_for(*model, 13, DType::kFloat16);
  for (GivenTensor& weight : weights) weight.device = {DeviceType::kCuda, 2};
  weights[0].view.dims[0] = 14;  // the embedding may have one row more than lm_head
  model->accept_weights(weights);
  expect(decided(*model).starts_with("float16[3, 13] on cuda:2"), decided(*model));
  weights[0].view.dims[0] = 15;
  expect_throws([&] { model->accept_weights(weights); }, ErrorKind::kValue, "weight 0 (embedding.weight)",
                "13", "15");

  for (const DType dtype : {DType::kInt64, DType::kInt8, DType::kBool, DType::kOther}) {
    expect_throws([&] { model->accept_weights(weights_for(*model, kVocab, dtype)); }, ErrorKind::kValue,
                  "weight 0", modeltorch::dtype_name(dtype));
  }
  expect_throws([&] { model->accept_weights(weights_for(*model, kVocab, DType::kBFloat16)); },
                ErrorKind::kValue, "bfloat16", "isBF16 is false");
  const auto bfloat16 = model_with({{"isBF16", true}});
  bfloat16->accept_weights(weights_for(*bfloat16, kVocab, DType::kBFloat16));
  expect_throws([&] { bfloat16->accept_weights(weights_for(*bfloat16)); }, ErrorKind::kValue, "float32",
                "isBF16 is true");
}

// Without packing keys a layer is packed if its k slot, or its up slot, holds one element.
TEST(packing_follows_the_list_if_nothing_is_said) {
  const std::unique_ptr<Model> described = model_with({{"packQuantType", {{4, 1}, {1, 4}}}});
  const std::unique_ptr<Model> silent = model_with({{"packQuantType", json::array()}});
  silent->accept_weights(weights_for(*described));
  expect(
      decided(*silent).substr(decided(*silent).find(':')).find("layers.0.attn.q.weight") != std::string::npos,
      "q of layer 0");
  described->accept_weights(weights_for(*described));
  expect(decided(*silent) == decided(*described), decided(*silent), "\nnot ", decided(*described));

  const std::string before = decided(*silent);
  const std::unique_ptr<Model> other = model_with({{"packQuantType", {{1, 1}, {1, 1}}}});
  std::vector<GivenTensor> faulty = weights_for(*other);
  faulty[102].view.dims[1] += 1;
  expect_throws([&] { silent->accept_weights(faulty); }, ErrorKind::kValue, "weight 102");
  expect(decided(*silent) == before, "a refused list changed the packing");
}

TEST(hidden_size_must_agree) {
  json current = parameters_2024();
  current.erase("rmsNormEps");
  current.update({{"isUnpadInputs", true},
                  {"normEps", 1e-6},
                  {"normType", 0},
                  {"rank", 0},
                  {"worldSize", 1},
                  {"lmHeadTransposeType", 1},
                  {"linearTransposeType", json::array()},
                  {"backend", "lccl"},
                  {"hiddenSize", 32}});
  const std::unique_ptr<Model> model = make_model("qwen_QwenDecoderModel", current.dump());
  expect_throws([&] { model->accept_weights(weights_for(*model)); }, ErrorKind::kValue, "hiddenSize is 32",
                "24");
  current["hiddenSize"] = kHidden;
  const std::unique_ptr<Model> right = make_model("qwen_QwenDecoderModel", current.dump());
  right->accept_weights(weights_for(*right));
}

TEST(caches_are_checked) {
  const std::unique_ptr<Model> model = model_with();
  model->accept_weights(weights_for(*model));
  model->accept_caches(caches(good_cache()), caches(good_cache()));
  const auto refuse = [&](bool is_key, size_t layer, const auto& change, const auto&... parts) {
    std::vector<GivenTensor> keys = caches(good_cache()), values = caches(good_cache());
    change((is_key ? keys : values)[layer]);
    expect_throws([&] { model->accept_caches(keys, values); }, ErrorKind::kValue, parts...);
  };
  for (const bool is_key : {true, false}) {
    for (const size_t layer : {0, 1}) {
      const std::string label = concat(is_key ? "key" : "value", " cache ", layer);
      for (const Dims& dims : {Dims{7, 16, 2}, Dims{7, 16, 2, 8, 1}, Dims{0, 16, 2, 8}, Dims{7, 0, 2, 8},
                               Dims{7, 16, 3, 8}, Dims{7, 16, 2, 9}, Dims{7, 2, 16, 8}}) {
        refuse(
            is_key, layer, [&](GivenTensor& cache) { cache.view.dims = dims; }, label,
            "[blocks, block_size, 2, 8]");
      }
      refuse(is_key, layer, [](GivenTensor& cache) { cache.layout = Layout::kStrided; }, label, "contiguous");
      refuse(
          is_key, layer, [](GivenTensor& cache) { cache.view.dtype = DType::kInt8; }, label, "float32",
          "int8");
      refuse(
          is_key, layer, [](GivenTensor& cache) { cache.device = {DeviceType::kNpu, 0}; }, label, "cpu",
          "npu:0");
      if (is_key && layer == 0) continue;  // the shapes of the others are compared with its
      refuse(
          is_key, layer, [](GivenTensor& cache) { cache.view.dims[0] = 8; }, label, "key cache 0",
          "[7, 16, 2, 8]");
    }
  }
  const Dims huge{int64_t{1} << 28, 16, kKvHeads, kHeadSize};
  expect_throws([&] { model->accept_caches(caches(huge), caches(huge)); }, ErrorKind::kValue, "2147483647");
}

TEST(a_refused_cache_changes_nothing) {
  const test::StepInputs inputs =
      test::prefill_inputs({.head_size = kHeadSize, .block_size = 16, .width = 1}, {{1, 2, 3}});
  const std::unique_ptr<Model> model = model_with();
  model->accept_weights(weights_for(*model));
  model->accept_caches(caches(good_cache()), caches(good_cache()));
  const auto prepare = [&] { return model->prepare(inputs.list(kOrder2024), inputs.parameters()); };
  prepare();
  std::vector<GivenTensor> small = caches({1, 2, kKvHeads, kHeadSize}), faulty = small;
  faulty[1].layout = Layout::kStrided;
  expect_throws([&] { model->accept_caches(small, faulty); }, ErrorKind::kValue, "value cache 1");
  prepare();  // slot 2 would not fit the small cache
  model->accept_caches(small, small);
  expect_throws([&] { prepare(); }, ErrorKind::kValue, "slots", "holds 2");
}

// Weights and caches come in any order: whichever is second must fit the first.
TEST(caches_and_weights_must_fit_each_other) {
  const std::unique_ptr<Model> model = model_with();
  model->accept_weights(weights_for(*model));
  const auto bfloat16 = caches(good_cache(), DType::kBFloat16);
  expect_throws([&] { model->accept_caches(bfloat16, bfloat16); }, ErrorKind::kValue, "key cache 0",
                "bfloat16", "must be float32 as the weights are");
  const std::unique_ptr<Model> caches_first = model_with();
  caches_first->accept_caches(bfloat16, bfloat16);
  expect_throws([&] { caches_first->accept_weights(weights_for(*caches_first)); }, ErrorKind::kValue,
                "must be bfloat16", "as the caches are", "float32");
  const auto float32 = caches(good_cache());
  caches_first->accept_caches(float32, float32);
  caches_first->accept_weights(weights_for(*caches_first));

  const std::unique_ptr<Model> empty = model_with();
  for (const DType dtype : {DType::kInt8, DType::kOther}) {
    const auto odd = caches(good_cache(), dtype);
    expect_throws([&] { empty->accept_caches(odd, odd); }, ErrorKind::kValue, "key cache 0",
                  dtype_name(dtype));
  }
  for (const DeviceType device : {DeviceType::kMeta, DeviceType::kOther}) {
    auto nowhere = float32;
    for (GivenTensor& cache : nowhere) cache.device = {device, 0};
    expect_throws([&] { empty->accept_caches(nowhere, nowhere); }, ErrorKind::kValue, "key cache 0",
                  "memory");
  }
}

TEST(models_are_found_by_name) {
  const std::vector<std::string> names = registered_models();
  for (const char* name : {"qwen_PAModel", "qwen_FAModel", "qwen_DecoderModel", "qwen_QwenDecoderModel"}) {
    expect(std::count(names.begin(), names.end(), name) == 1, name, " is registered");
  }
  expect(std::is_sorted(names.begin(), names.end()), "sorted");
  for (const char* name : {"qwen_Nothing", "", "qwen_pamodel"}) {
    expect_throws([&] { make_model(name, "{}"); }, ErrorKind::kValue, concat("unknown model name ", name),
                  "qwen_DecoderModel", "qwen_FAModel", "qwen_PAModel", "qwen_QwenDecoderModel");
  }
}

TEST(aliases_ask_for_their_flag) {
  model_with({{"isFA", false}}, "qwen_PAModel");
  model_with({{"isFA", false}}, "qwen_DecoderModel");
  expect_throws([] { model_with({{"isFA", true}}, "qwen_PAModel"); }, ErrorKind::kValue, "qwen_PAModel",
                "isFA = false");
  expect_throws([] { model_with({{"isFA", false}}, "qwen_FAModel"); }, ErrorKind::kValue, "qwen_FAModel",
                "isFA = true");
  for (const char* name : {"qwen_FAModel", "qwen_DecoderModel"}) {
    expect_throws([&] { model_with({{"isFA", true}}, name); }, ErrorKind::kNotImplemented, "isFA = true",
                  "not built");
  }
  expect_throws([] { make_model("qwen_PAModel", "{}"); }, ErrorKind::kValue, "is required");
  expect_throws([] { make_model("qwen_PAModel", ""); }, ErrorKind::kValue, "empty");
  expect_throws([] { make_model("qwen_QwenDecoderModel", "{}"); }, ErrorKind::kValue, "is required");
}

TEST(the_first_of_two_registrations_stays) {
  const CapturedWarnings warnings;
  const ModelFactory first = [](const std::string&) -> std::unique_ptr<Model> {
    fail(ErrorKind::kRuntime, "the first");
  };
  const ModelFactory second = [](const std::string&) -> std::unique_ptr<Model> {
    fail(ErrorKind::kRuntime, "the second");
  };
  expect(register_model("test_TwiceRegistered", first), "a new name");
  expect(CapturedWarnings::messages.empty(), "no warning for a new name");
  expect(!register_model("test_TwiceRegistered", second), "a taken name");
  expect(CapturedWarnings::messages.size() == 1 &&
             CapturedWarnings::messages[0].find("test_TwiceRegistered") != std::string::npos,
         "one warning that names the model");
  expect_throws([] { make_model("test_TwiceRegistered", "{}"); }, ErrorKind::kRuntime, "the first");
}
