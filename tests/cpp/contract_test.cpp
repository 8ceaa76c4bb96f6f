// The door of a step: what execute takes, in either generation's order, and what it says of everything else.

#include <functional>

#include "models/decoder_contract.h"
#include "test.h"
#include "tiny_qwen.h"

using namespace modeltorch;
using nlohmann::json;
using test::concat;
using test::expect;
using test::expect_throws;
using test::StepInputs;
using test::Tensor;
using enum DecoderInput;

namespace {

constexpr const char* kNames[] = {"input_ids", "position_ids",   "cos_table",
                                  "sin_table", "attention_mask", "block_tables",
                                  "slots",     "seq_len",        "logits_indices"};

// Section 4.1 and 4.2 of the contract: the position of every input, 2024 and current.
constexpr int kPositionsOf[2][9] = {{0, 1, 2, 3, 4, 5, 6, 9, 10}, {0, 1, 2, 3, 4, 5, 6, 10, 11}};

const InputOrder* const kOrders[] = {&kOrder2024, &kOrderCurrent};

// One phase in one order: a valid list to spoil.
struct Door {
  int generation;
  bool is_prefill;
  DecoderLimits limits;
  StepInputs inputs;

  Door(int generation, bool is_prefill, const test::Prompts& prompts = {{1, 2, 3, 4, 5}, {6, 7, 8}, {9}})
      : generation(generation), is_prefill(is_prefill) {
    const test::StepSizes sizes{.head_size = 6, .max_positions = 10, .block_size = 4, .width = 3};
    limits = {.is_prefill = is_prefill,
              .embeds_ids = true,
              .dtype = DType::kFloat32,
              .device = {},
              .hidden = 24,
              .head_size = 6,
              .embedding_rows = 11,
              .blocks = 9,
              .block_size = 4};
    inputs = is_prefill ? prefill_inputs(sizes, prompts) : decode_inputs(sizes, prompts);
  }

  const InputOrder& order() const { return *kOrders[generation]; }
  int position(DecoderInput input) const { return kPositionsOf[generation][static_cast<int>(input)]; }
  std::string label(DecoderInput input) const {
    return concat("input ", position(input), " (", kNames[static_cast<int>(input)], ")");
  }
  std::vector<GivenTensor> list() const { return inputs.list(order()); }

  Step open() const { return open(list()); }
  Step open(const std::vector<GivenTensor>& given) const { return open(given, inputs.parameters()); }
  Step open(const std::vector<GivenTensor>& given, const json& parameters) const {
    return prepare_decoder_step(order(), limits, given, parameters);
  }

  /// The inputs that the phase reads and checks one by one; the mask has rules of its own.
  std::vector<DecoderInput> read() const {
    std::vector<DecoderInput> all = {kIds, kPositions, kCosTable, kSinTable, kSlots, kSeqLen};
    all.push_back(is_prefill ? kLogitsIndices : kBlockTables);
    return all;
  }

  /// Expects an error that names the input after `change` was applied to it.
  template <class... Parts>
  void refuse(DecoderInput input, const std::function<void(GivenTensor&)>& change,
              const Parts&... parts) const {
    std::vector<GivenTensor> given = list();
    change(given[position(input)]);
    expect_throws([&] { open(given); }, ErrorKind::kValue, parts...);
  }

  /// Expects an error that names the input and `value` after one element of it became `value`.
  void refuse_value(DecoderInput input, int64_t index, int64_t value) {
    const double former = inputs[input].get(index);
    inputs[input].set(index, static_cast<double>(value));
    expect_throws([&] { open(); }, ErrorKind::kValue, label(input), std::to_string(value),
                  std::to_string(index));
    inputs[input].set(index, former);
    open();
  }
};

void each_door(const std::function<void(Door&)>& body) {
  for (const int generation : {0, 1}) {
    for (const bool is_prefill : {true, false}) {
      Door door(generation, is_prefill);
      body(door);
    }
  }
}

}  // namespace

TEST(valid_steps_are_counted_and_named) {
  each_door([](Door& door) {
    const Step step = door.open();
    expect(step.info.tokens == (door.is_prefill ? 9 : 3) && step.info.sequences == 3, "tokens and sequences");
    expect(step.info.logit_rows == 3 && step.info.sequence_lengths == std::vector<int32_t>{5, 3, 1},
           "rows and lengths");
    expect(step.inputs.size() == kDecoderInputCount, "inputs");
    for (const DecoderInput input : door.read()) {
      expect(step.inputs[static_cast<int>(input)].data == door.inputs[input].view().data,
             "misplaced: ", door.label(input));
    }
  });
  Door rows(0, true);
  rows.inputs[kLogitsIndices] = Tensor::of(DType::kInt64, {5}, {8, 0, 0, 3, 8});
  expect(rows.open().info.logit_rows == 5, "any order, with repetitions");
  const std::vector<Rows> expected = {Rows::kTokens, Rows::kTokens,    Rows::kFixed,
                                      Rows::kFixed,  Rows::kFixed,     Rows::kSequences,
                                      Rows::kTokens, Rows::kSequences, Rows::kLogits};
  expect(decoder_input_rows() == expected, "which count each input follows");
}

TEST(empty_batches_are_steps) {
  for (const int generation : {0, 1}) {
    for (const bool is_prefill : {true, false}) {
      const Step step = Door(generation, is_prefill, {}).open();
      expect(step.info.tokens == 0 && step.info.sequences == 0 && step.info.logit_rows == 0, "B = 0");
    }
  }
}

TEST(counts_are_checked) {
  each_door([](Door& door) {
    for (const size_t count : {0, 1, 11, 13}) {
      std::vector<GivenTensor> given = door.list();
      given.resize(count, given[0]);
      expect_throws([&] { door.open(given); }, ErrorKind::kValue, "takes 12 inputs", door.order().generation,
                    concat("got ", count));
    }
  });
}

TEST(the_other_generation_is_recognised) {
  for (const int generation : {0, 1}) {
    for (const bool is_prefill : {true, false}) {
      const Door door(generation, is_prefill);
      const std::vector<GivenTensor> other = door.inputs.list(*kOrders[1 - generation]);
      const char* name = generation == 0 ? "qwen_QwenDecoderModel" : "qwen_DecoderModel";
      expect_throws([&] { door.open(other); }, ErrorKind::kValue, "the other order", name,
                    concat("input ", door.position(kSeqLen)));
    }
  }
}

TEST(dtypes_are_checked) {
  each_door([](Door& door) {
    for (const DecoderInput input : door.read()) {
      for (const DType dtype :
           {DType::kFloat16, DType::kBFloat16, DType::kInt8, DType::kBool, DType::kOther}) {
        door.refuse(
            input, [&](GivenTensor& tensor) { tensor.view.dtype = dtype; },
            concat("input ", door.position(input)), dtype_name(dtype));
      }
      const DType swapped = door.inputs[input].view().dtype == DType::kInt64 ? DType::kInt32 : DType::kInt64;
      door.refuse(
          input, [&](GivenTensor& tensor) { tensor.view.dtype = swapped; },
          concat("input ", door.position(input)), dtype_name(swapped));
    }
  });
}

TEST(shapes_are_checked) {
  each_door([](Door& door) {
    for (const DecoderInput input : door.read()) {
      const Dims good = door.inputs[input].dims();
      const auto refuse = [&](const Dims& dims) {
        door.refuse(input, [&](GivenTensor& tensor) { tensor.view.dims = dims; }, "input ", concat(dims));
      };
      Dims deeper = good;
      deeper.push_back(1);
      refuse(deeper);
      refuse({});
      // The sizes that the step does not decide: rows of both tables, the width of the block table, logits
      // rows.
      const bool free_rows = input == kLogitsIndices;
      if (!free_rows) {
        Dims longer = good;
        longer[0] += 1;
        refuse(longer);
      }
      if (input == kCosTable || input == kSinTable) refuse({good[0], good[1] + 1});
    }
  });
}

TEST(devices_and_strides_are_checked) {
  each_door([](Door& door) {
    for (const DecoderInput input : door.read()) {
      door.refuse(
          input, [](GivenTensor& tensor) { tensor.device = {DeviceType::kCuda, 3}; }, door.label(input),
          "must be on cpu", "cuda:3");
      door.refuse(
          input, [](GivenTensor& tensor) { tensor.layout = Layout::kStrided; }, door.label(input),
          "contiguous");
    }
  });
}

// Inputs that the phase does not read may be anything.
TEST(unused_inputs_are_not_looked_at) {
  each_door([](Door& door) {
    std::vector<GivenTensor> given = door.list();
    const GivenTensor junk{{nullptr, DType::kOther, {3, 1, 4}}, {DeviceType::kOther, 7}, Layout::kStrided};
    std::vector<int> unused = {7, 8, door.generation == 0 ? 11 : 9};
    if (door.is_prefill) unused.push_back(5);
    if (!door.is_prefill) unused.insert(unused.end(), {4, door.position(kLogitsIndices)});
    for (const int position : unused) given[position] = junk;
    door.open(given);
  });
}

TEST(masks_are_square_or_placeholders) {
  for (const int generation : {0, 1}) {
    const Door door(generation, true);
    for (const Dims& dims : {Dims{1}, Dims{}, Dims{1, 1}, Dims{1, 1, 1}, Dims{5, 5}, Dims{2048, 2048}}) {
      std::vector<GivenTensor> given = door.list();
      given[4] = {{nullptr, DType::kOther, dims}, {DeviceType::kNpu, 0}, Layout::kStrided};
      door.open(given);
    }
    for (const Dims& dims : {Dims{0}, Dims{2}, Dims{5, 6}, Dims{2, 5, 5}}) {
      door.refuse(
          kMask, [&](GivenTensor& tensor) { tensor.view.dims = dims; }, "input 4 (attention_mask)",
          concat(dims));
    }
  }
}

TEST(embeddings_stand_for_ids) {
  each_door([](Door& door) {
    const int64_t tokens = door.inputs[kIds].dims()[0];
    door.limits.embeds_ids = false;
    expect_throws([&] { door.open(); }, ErrorKind::kValue, "input 0 (input_ids)", "float32[-1, 24]", "int64");
    door.inputs[kIds] = Tensor(DType::kFloat32, {tokens, 24});
    expect(door.open().info.tokens == tokens, "rows of embeddings are tokens");
    door.refuse(kIds, [](GivenTensor& tensor) { tensor.view.dims[1] = 25; }, "input 0 (input_ids)", "25");
  });
}

TEST(sequence_lengths_of_the_parameters_are_checked) {
  each_door([](Door& door) {
    const auto refuse = [&](const json& parameters, ErrorKind kind, const auto&... parts) {
      expect_throws([&] { door.open(door.list(), parameters); }, kind, parts...);
    };
    refuse(json::object(), ErrorKind::kValue, "seqLen");
    for (const json& value : {json(5), json("5"), json(nullptr), json::object()}) {
      refuse({{"seqLen", value}}, ErrorKind::kValue, "seqLen", "list of whole numbers", value.type_name());
    }
    for (const char* value : {"0", "-1", "1.5", "\"3\"", "true", "null", "[3]", "2147483648", "4294967297",
                              "1e30", "9223372036854775808", "18446744073709551615"}) {
      const json length = json::parse(value);
      refuse({{"seqLen", {5, 3, length}}}, ErrorKind::kValue, "seqLen", "at least 1, got " + length.dump());
    }
    refuse({{"seqLen", {5, 3}}}, ErrorKind::kValue, "seqLen has 2 entries", door.label(kSeqLen), "int32[3]");
    refuse({{"seqLen", {5, 3, 1, 1}}}, ErrorKind::kValue, "seqLen has 4 entries", door.label(kSeqLen));
    refuse({{"seqLen", json::array()}}, ErrorKind::kValue, "seqLen has 0 entries", door.label(kSeqLen));
    refuse({{"seqLen", {5, 2, 2}}}, ErrorKind::kValue, door.label(kSeqLen), "holds 3 at 1", "says 2");
    refuse({{"seqLen", {5, 3, 1}}, {"qLen", {5, 3, 1}}}, ErrorKind::kNotImplemented, "qLen");
    refuse({{"seqLen", {5, 3, 1}}, {"qLen", 3}}, ErrorKind::kNotImplemented, "qLen");
    door.open(door.list(), {{"seqLen", {5, 3, 1}}, {"qLen", json::array()}, {"tokenOffset", {5, 3, 1}}});
  });
}

TEST(lengths_and_tokens_must_agree) {
  for (const int generation : {0, 1}) {
    const Door prefill(generation, true), decode(generation, false);
    expect_throws([&] { prefill.open(prefill.list(), {{"seqLen", {5, 3, 2}}}); }, ErrorKind::kValue,
                  "add up to the 9 tokens", "got 10");
    std::vector<GivenTensor> given = decode.list();
    for (const DecoderInput input : {kIds, kPositions, kSlots})
      given[decode.position(input)].view.dims[0] = 2;
    expect_throws([&] { decode.open(given); }, ErrorKind::kValue, "one token a sequence", "3", "2");
    Door longer(generation, false);
    longer.inputs.lengths = {5, 13, 1};
    longer.inputs[kSeqLen].set(1, 13);
    expect_throws([&] { longer.open(); }, ErrorKind::kValue, "context of 13 tokens", "3 blocks of 4",
                  "block_tables");
  }
}

TEST(values_are_checked_on_the_cpu) {
  each_door([](Door& door) {
    const int64_t last = door.inputs[kIds].count() - 1;
    for (const int64_t index : {int64_t{0}, last}) {
      for (const int64_t id : {int64_t{-1}, int64_t{11}, int64_t{1} << 40})
        door.refuse_value(kIds, index, id);
      for (const int64_t position : {-1, 10, 1000}) door.refuse_value(kPositions, index, position);
      for (const int64_t slot : {-2, 36, 2147483647}) door.refuse_value(kSlots, index, slot);
    }
    door.inputs[kSlots].set(last, -1);
    door.inputs[kSlots].set(0, 35);
    door.inputs[kIds].set(0, 10);
    door.inputs[kPositions].set(0, 9);
    door.open();
    for (const int64_t length : {0, 4, -1}) door.refuse_value(kSeqLen, 0, length);
    for (const int64_t index : {-1, 9}) {
      if (door.is_prefill) door.refuse_value(kLogitsIndices, 2, index);
    }
  });
}

TEST(blocks_in_use_are_checked) {
  for (const int generation : {0, 1}) {
    Door door(generation, false);
    const auto refuse = [&](int64_t sequence, int64_t index, int64_t block) {
      Tensor& tables = door.inputs[kBlockTables];
      const double former = tables.get(sequence * 3 + index);
      tables.set(sequence * 3 + index, static_cast<double>(block));
      expect_throws([&] { door.open(); }, ErrorKind::kValue, door.label(kBlockTables),
                    concat("block ", block), concat("[", sequence, ", ", index, "]"));
      tables.set(sequence * 3 + index, former);
    };
    for (const int64_t block : {-1, 9, 2147483647}) {
      refuse(0, 0, block);
      refuse(0, 1, block);
      refuse(1, 0, block);
      refuse(2, 0, block);
    }
    // Contexts of 5, 3 and 1 use 2, 1 and 1 blocks of 4: the rest of a row may be anything.
    for (const int64_t unused : {2, 4, 5, 7, 8}) door.inputs[kBlockTables].set(unused, -7);
    door.open();
    door.inputs.lengths = {8, 4, 1};
    door.inputs[kSeqLen] = Tensor::of(DType::kInt32, {3}, {8, 4, 1});
    door.open();
    door.inputs.lengths = {9, 4, 1};
    door.inputs[kSeqLen].set(0, 9);
    expect_throws([&] { door.open(); }, ErrorKind::kValue, "block -7", "[0, 2]");
  }
}

// The values of another device cannot be read here: the addresses must not even be touched.
TEST(values_on_other_devices_are_not_read) {
  each_door([](Door& door) {
    door.limits.device = {DeviceType::kCuda, 0};
    std::vector<GivenTensor> given = door.list();
    for (GivenTensor& tensor : given) {
      tensor.device = {DeviceType::kCuda, 0};
      tensor.view.data = nullptr;
    }
    expect(door.open(given).info.sequences == 3, "checked without values");
    given[door.position(kSlots)].device = {DeviceType::kCuda, 1};
    expect_throws([&] { door.open(given); }, ErrorKind::kValue, door.label(kSlots), "cuda:0", "cuda:1");
  });
}
