#include "models/decoder_contract.h"

#include <numeric>

#include "core/arithmetic.h"
#include "core/check.h"

namespace modeltorch {

using enum DecoderInput;

const InputOrder kOrder2024{"2024",
                            "qwen_QwenDecoderModel",
                            {kIds, kPositions, kCosTable, kSinTable, kMask, kBlockTables, kSlots, kUnused,
                             kUnused, kSeqLen, kLogitsIndices, kUnused}};

const InputOrder kOrderCurrent{"current",
                               "qwen_DecoderModel",
                               {kIds, kPositions, kCosTable, kSinTable, kMask, kBlockTables, kSlots, kUnused,
                                kUnused, kUnused, kSeqLen, kLogitsIndices}};

std::vector<Rows> decoder_input_rows() {
  std::vector<Rows> rows(kDecoderInputCount, Rows::kFixed);
  for (const DecoderInput input : {kIds, kPositions, kSlots}) rows[static_cast<int>(input)] = Rows::kTokens;
  for (const DecoderInput input : {kBlockTables, kSeqLen}) rows[static_cast<int>(input)] = Rows::kSequences;
  rows[static_cast<int>(kLogitsIndices)] = Rows::kLogits;
  return rows;
}

namespace {

constexpr const char* kInputNames[] = {"input_ids", "position_ids",   "cos_table",
                                       "sin_table", "attention_mask", "block_tables",
                                       "slots",     "seq_len",        "logits_indices"};

// The name of an input in messages, put together only where one is written.
struct Label {
  int position;
  DecoderInput input;

  friend std::ostream& operator<<(std::ostream& out, const Label& label) {
    return out << "input " << label.position << " (" << kInputNames[static_cast<int>(label.input)] << ")";
  }
};

// The named tensors of one call, and the checks on them. Lives as long as the call.
class StepDoor {
 public:
  StepDoor(const InputOrder& order, const DecoderLimits& limits, std::span<const GivenTensor> given)
      : order_(order), limits_(limits), given_(given) {}

  Step open(const nlohmann::json& parameters) {
    check_count();
    check_generation();
    read_lengths(parameters);
    check_shapes();
    if (limits_.device.type == DeviceType::kCpu) check_values();
    return std::move(step_);
  }

 private:
  int position(DecoderInput input) const {
    for (int index = 0; index < static_cast<int>(order_.positions.size()); ++index) {
      if (order_.positions[index] == input) return index;
    }
    return -1;
  }

  const GivenTensor& given(DecoderInput input) const { return given_[position(input)]; }
  const TensorView& view(DecoderInput input) const { return given(input).view; }

  Label label(DecoderInput input) const { return {position(input), input}; }

  void check_count() const {
    check(given_.size() == order_.positions.size(), "execute takes ", order_.positions.size(),
          " inputs in the ", order_.generation, " order, got ", given_.size());
  }

  // The two generations differ in positions 9 to 11. A list of the other one is told by its types.
  void check_generation() const {
    const int mine = position(kSeqLen);
    const int other = mine == 9 ? 10 : 9;
    const auto is_lengths = [&](int index) {
      return given_[index].view.dtype == DType::kInt32 && given_[index].view.dims.rank() == 1;
    };
    check(is_lengths(mine) || !is_lengths(other), "input ", mine, " must be seq_len (int32) in the ",
          order_.generation, " order, got ", given_[mine].view, ", but input ", other,
          " looks like it: this list is in the other order, which the model name ",
          order_.other_generation_name, " takes");
  }

  void read_lengths(const nlohmann::json& parameters) {
    const auto found = parameters.find("seqLen");
    check(found != parameters.end(), "execute needs the parameter seqLen, a list of whole numbers");
    check(found->is_array(), "parameter seqLen must be a list of whole numbers, got ", found->type_name());
    const auto query_lengths = parameters.find("qLen");
    if (query_lengths != parameters.end() && !(query_lengths->is_array() && query_lengths->empty())) {
      fail(ErrorKind::kNotImplemented,
           "parameter qLen asks for chunked prefill, a prefix cache or speculation, which are not built");
    }
    StepInfo& info = step_.info;
    info.sequence_lengths.reserve(found->size());
    for (const nlohmann::json& length : *found) {
      // One beyond the range of int64_t comes out negative.
      const int64_t value = length.is_number_integer() ? length.get<int64_t>() : 0;
      if (value < 1 || value > INT32_MAX) {
        fail(ErrorKind::kValue, "parameter seqLen must hold whole numbers of at least 1, got ",
             length.dump());
      }
      info.sequence_lengths.push_back(static_cast<int32_t>(value));
    }
    info.sequences = static_cast<int64_t>(info.sequence_lengths.size());
  }

  // Takes an input into the step after checking it against `expected` (-1: any size).
  void take(DecoderInput input, DType dtype, const Dims& expected) {
    const GivenTensor& tensor = given(input);
    bool fits = tensor.view.dtype == dtype && tensor.view.dims.rank() == expected.rank();
    for (int axis = 0; fits && axis < expected.rank(); ++axis) {
      fits = expected[axis] == -1 || expected[axis] == tensor.view.dims[axis];
    }
    check(fits, label(input), " must be ", TensorDesc{dtype, expected}, " (-1: any size), got ", tensor.view);
    check_place(tensor, limits_.device, " as the weights are", label(input));
    step_.inputs[static_cast<int>(input)] = tensor.view;
  }

  void check_shapes() {
    StepInfo& info = step_.info;
    step_.inputs.resize(kDecoderInputCount);
    if (limits_.embeds_ids) {
      take(kIds, DType::kInt64, {-1});
    } else {
      take(kIds, limits_.dtype, {-1, limits_.hidden});
    }
    const int64_t tokens = info.tokens = view(kIds).dims[0];
    const int64_t batch = info.sequences;
    take(kPositions, DType::kInt64, {tokens});
    take(kCosTable, limits_.dtype, {-1, limits_.head_size});
    take(kSinTable, limits_.dtype, {view(kCosTable).dims[0], limits_.head_size});
    take(kSlots, DType::kInt32, {tokens});
    check(view(kSeqLen).dims.rank() != 1 || view(kSeqLen).dims[0] == batch, "parameter seqLen has ", batch,
          " entries, but ", label(kSeqLen), " is ", view(kSeqLen));
    take(kSeqLen, DType::kInt32, {batch});
    if (limits_.is_prefill) {
      check_mask();
      take(kLogitsIndices, DType::kInt64, {-1});
      info.logit_rows = view(kLogitsIndices).dims[0];
      const int64_t sum =
          std::accumulate(info.sequence_lengths.begin(), info.sequence_lengths.end(), int64_t{0});
      check(sum == tokens, "the lengths in seqLen must add up to the ", tokens, " tokens of ", label(kIds),
            ", got ", sum);
    } else {
      check(tokens == batch, "a decode step has one token a sequence: seqLen has ", batch, " entries, ",
            label(kIds), " has ", tokens);
      take(kBlockTables, DType::kInt32, {batch, -1});
      info.logit_rows = batch;
      check_context();
    }
  }

  void check_mask() const {
    const Dims& dims = view(kMask).dims;
    check(dims.count() == 1 || (dims.rank() == 2 && dims[0] == dims[1]), label(kMask),
          " must be a square matrix or hold one element, got ", view(kMask));
  }

  void check_context() const {
    const int64_t capacity = view(kBlockTables).dims[1] * limits_.block_size;
    for (const int32_t length : step_.info.sequence_lengths) {
      check(length <= capacity, "a context of ", length, " tokens does not fit ", label(kBlockTables), " of ",
            view(kBlockTables).dims[1], " blocks of ", limits_.block_size);
    }
  }

  template <class T>
  void check_range(DecoderInput input, int64_t low, int64_t high) const {
    const T* values = view(input).as<T>();
    const int64_t count = view(input).dims.count();
    for (int64_t index = 0; index < count; ++index) {
      check(values[index] >= low && values[index] < high, label(input), " holds ", values[index], " at ",
            index, ", outside [", low, ", ", high, ")");
    }
  }

  void check_values() const {
    const StepInfo& info = step_.info;
    if (limits_.embeds_ids) check_range<int64_t>(kIds, 0, limits_.embedding_rows);
    check_range<int64_t>(kPositions, 0, view(kCosTable).dims[0]);
    check_range<int32_t>(kSlots, -1, limits_.blocks * limits_.block_size);
    const int32_t* lengths = view(kSeqLen).as<int32_t>();
    for (int64_t sequence = 0; sequence < info.sequences; ++sequence) {
      check(lengths[sequence] == info.sequence_lengths[sequence], label(kSeqLen), " holds ",
            lengths[sequence], " at ", sequence, ", but seqLen in the parameters says ",
            info.sequence_lengths[sequence]);
    }
    if (limits_.is_prefill) return check_range<int64_t>(kLogitsIndices, 0, info.tokens);
    check_blocks();
  }

  void check_blocks() const {
    const TensorView& tables = view(kBlockTables);
    const int64_t width = tables.dims[1];
    for (int64_t sequence = 0; sequence < step_.info.sequences; ++sequence) {
      const int64_t context = step_.info.sequence_lengths[sequence];
      const int64_t used = divide_up(context, limits_.block_size);
      for (int64_t index = 0; index < used; ++index) {
        const int32_t block = tables.as<int32_t>()[sequence * width + index];
        check(block >= 0 && block < limits_.blocks, label(kBlockTables), " holds block ", block, " at [",
              sequence, ", ", index, "], outside [0, ", limits_.blocks, ")");
      }
    }
  }

  const InputOrder& order_;
  const DecoderLimits& limits_;
  std::span<const GivenTensor> given_;
  Step step_;
};

}  // namespace

Step prepare_decoder_step(const InputOrder& order, const DecoderLimits& limits,
                          std::span<const GivenTensor> given, const nlohmann::json& parameters) {
  return StepDoor(order, limits, given).open(parameters);
}

}  // namespace modeltorch
