#include "tiny_qwen.h"

#include "graph/pack_store.h"

#include <cmath>
#include <utility>

#include "models/registry.h"

namespace test {

using namespace modeltorch;

namespace {

constexpr int64_t kLayers = 2, kHeads = 4, kKvHeads = 2, kHidden = 24, kIntermediate = 20, kVocab = 11;
constexpr int64_t kMaxSequences = 8;

Tensor integers(DType dtype, const std::vector<int64_t>& values) {
  return Tensor::of(dtype, {static_cast<int64_t>(values.size())}, {values.begin(), values.end()});
}

// cos or sin of position * 10000^(-2i / head_size), the two halves of a row alike.
Tensor rotary_table(const StepSizes& sizes, double (*function)(double)) {
  Tensor table(sizes.dtype, {sizes.max_positions, sizes.head_size});
  for (int64_t i = 0; i < table.count(); ++i) {
    const int64_t position = i / sizes.head_size;
    const int64_t column = i % sizes.head_size % (sizes.head_size / 2);
    const double frequency = std::pow(10000.0, -2.0 * static_cast<double>(column) / sizes.head_size);
    table.set(i, function(static_cast<double>(position) * frequency));
  }
  return table;
}

// The inputs of a step that computes the tokens from `first(prompt)` to the end of every prompt.
StepInputs inputs_of(const StepSizes& sizes, const Prompts& prompts, bool is_prefill) {
  std::vector<int64_t> ids, positions, slots, indices, lengths;
  const auto batch = static_cast<int64_t>(prompts.size());
  Tensor tables(DType::kInt32, {batch, sizes.width});
  for (int64_t b = 0; b < batch; ++b) {
    const auto length = static_cast<int64_t>(prompts[b].size());
    for (int64_t position = is_prefill ? 0 : length - 1; position < length; ++position) {
      ids.push_back(prompts[b][position]);
      positions.push_back(position);
      slots.push_back(b * sizes.width * sizes.block_size + position);
    }
    for (int64_t i = 0; i < sizes.width; ++i)
      tables.set(b * sizes.width + i, static_cast<double>(b * sizes.width + i));
    indices.push_back(static_cast<int64_t>(ids.size()) - 1);
    lengths.push_back(length);
  }
  StepInputs inputs;
  inputs.lengths = lengths;
  inputs.tensors.push_back(integers(DType::kInt64, ids));
  inputs.tensors.push_back(integers(DType::kInt64, positions));
  inputs.tensors.push_back(rotary_table(sizes, std::cos));
  inputs.tensors.push_back(rotary_table(sizes, std::sin));
  inputs.tensors.push_back(Tensor(sizes.dtype, is_prefill ? Dims{8, 8} : Dims{1}));
  inputs.tensors.push_back(std::move(tables));
  inputs.tensors.push_back(integers(DType::kInt32, slots));
  inputs.tensors.push_back(integers(DType::kInt32, lengths));
  inputs.tensors.push_back(is_prefill ? integers(DType::kInt64, indices) : Tensor(DType::kFloat32, {1}));
  inputs.tensors.push_back(Tensor(sizes.dtype, {1}));
  return inputs;
}

// A matrix [n, k] in the layout of a checkpoint, before it is put into the list.
struct Matrix {
  int64_t n;
  int64_t k;
  std::vector<double> values;
};

Matrix random_matrix(Random& random, int64_t n, int64_t k) {
  std::uniform_real_distribution<double> distribution(-0.4, 0.4);
  Matrix matrix{n, k, std::vector<double>(n * k)};
  for (double& value : matrix.values) value = distribution(random);
  return matrix;
}

Matrix stacked(const std::vector<Matrix>& parts) {
  Matrix all{0, parts[0].k, {}};
  for (const Matrix& part : parts) {
    all.n += part.n;
    all.values.insert(all.values.end(), part.values.begin(), part.values.end());
  }
  return all;
}

Tensor laid_out(DType dtype, const Matrix& matrix, bool transposed) {
  if (transposed) return Tensor::of(dtype, {matrix.n, matrix.k}, matrix.values);
  Tensor tensor(dtype, {matrix.k, matrix.n});
  for (int64_t i = 0; i < tensor.count(); ++i) {
    tensor.set(i, matrix.values[i % matrix.n * matrix.k + i / matrix.n]);
  }
  return tensor;
}

}  // namespace

Prompts prompts_of(int64_t count, int64_t tokens) {
  Prompts prompts(count);
  for (int64_t i = 0; i < tokens; ++i) prompts[i % count].push_back((i * 7 + 3) % kVocab);
  return prompts;
}

std::vector<GivenTensor> StepInputs::list(const InputOrder& order) const {
  std::vector<GivenTensor> given;
  for (const DecoderInput input : order.positions) given.push_back({(*this)[input].view(), Device{}});
  return given;
}

StepInputs prefill_inputs(const StepSizes& sizes, const Prompts& prompts) {
  return inputs_of(sizes, prompts, true);
}

StepInputs decode_inputs(const StepSizes& sizes, const Prompts& prompts) {
  return inputs_of(sizes, prompts, false);
}

TinyQwen::TinyQwen(DType dtype, const TinyLayout& layout)
    : sizes_{.dtype = dtype, .head_size = 16}, layout_(layout) {
  for (int64_t cache = 0; cache < 2 * kLayers; ++cache) {
    caches_.emplace_back(dtype,
                         Dims{kMaxSequences * sizes_.width, sizes_.block_size, kKvHeads, sizes_.head_size});
  }
  set_up(prefill_phase, true);
  set_up(decode_phase, false);
}

void TinyQwen::set_up(Phase& phase, bool is_prefill) {
  phase.model =
      make_model(layout_.current ? "qwen_QwenDecoderModel" : "qwen_PAModel", parameters(is_prefill));
  if (weights_.empty()) fill_weights(*phase.model);
  std::vector<GivenTensor> weights, keys, values;
  std::vector<TensorView> weight_views, cache_views;
  for (const Tensor& weight : weights_) {
    weights.push_back({weight.view(), Device{}});
    weight_views.push_back(weight.view());
  }
  for (size_t cache = 0; cache < caches_.size(); ++cache) {
    (cache % 2 == 0 ? keys : values).push_back({caches_[cache].view(), Device{}});
    cache_views.push_back(caches_[cache].view());
  }
  phase.model->accept_weights(weights);
  phase.model->accept_caches(keys, values);
  phase.runner =
      std::make_unique<GraphRunner>(phase.model->build_graph(), phase.model->input_rows(), Device{});
  phase.runner->bind_weights(weight_views);
  for (const GraphRunner::PackRequest& request : phase.runner->pack_requests()) {
    if (request.packer->pack == nullptr) continue;
    std::vector<TensorView> replaced;
    for (const int32_t slot : request.slots) replaced.push_back(weight_views[slot]);
    phase.runner->bind_packed(
        request, PackStore("").get(*request.packer, phase.runner->operation(request.node), replaced));
  }
  phase.runner->bind_caches(cache_views);
}

std::string TinyQwen::parameters(bool is_prefill) const {
  const int64_t type = layout_.transposed ? 1 : 0;
  const int64_t pack = layout_.packed ? 1 : 4;
  const std::vector<int64_t> types(7, type);
  nlohmann::json json = {{"isFA", false},
                         {"isPrefill", is_prefill},
                         {"isBF16", sizes_.dtype == DType::kBFloat16},
                         {"numHiddenLayers", kLayers},
                         {"numAttentionHeadsPerRank", kHeads},
                         {"numKeyValueHeadsPerRank", kKvHeads},
                         {"hiddenSizePerAttentionHead", sizes_.head_size},
                         {"lmHeadTransposeType", type},
                         {"linearTransposeType", {types, types}},
                         {"packQuantType", {{pack, pack}, {pack, pack}}},
                         {"linearQuantType", std::vector<std::vector<int>>(2, std::vector<int>(7, 0))}};
  if (layout_.current) {
    const nlohmann::json biases = {true, false, false, false};
    json.update({{"isUnpadInputs", true},
                 {"normEps", 1e-6},
                 {"normType", 0},
                 {"rank", 0},
                 {"worldSize", 1},
                 {"backend", "lccl"},
                 {"linearHasBias", {biases, biases}}});
  } else {
    json["rmsNormEps"] = 1e-6;
  }
  return json.dump();
}

void TinyQwen::fill_weights(const Model& model) {
  for (int64_t slot = 0; slot < model.weight_count(); ++slot) weights_.emplace_back(DType::kFloat16, Dims{1});
  Random random(61);
  weights_.front() = Tensor::random(random, sizes_.dtype, {kVocab, kHidden});
  for (int64_t layer = 0; layer < kLayers; ++layer) fill_layer(random, 1 + 50 * layer);
  weights_[weights_.size() - 2] = Tensor::random(random, sizes_.dtype, {kHidden}, 0.5, 1.5);
  weights_.back() = laid_out(sizes_.dtype, random_matrix(random, kVocab, kHidden), layout_.transposed);
}

// The slots of docs/contract.md, "Weights", by number: the library's own table is what this is meant to test.
void TinyQwen::fill_layer(Random& random, int64_t first_slot) {
  const int64_t d = sizes_.head_size;
  const Matrix q = random_matrix(random, kHeads * d, kHidden),
               k = random_matrix(random, kKvHeads * d, kHidden),
               v = random_matrix(random, kKvHeads * d, kHidden),
               q_bias = random_matrix(random, kHeads * d, 1), k_bias = random_matrix(random, kKvHeads * d, 1),
               v_bias = random_matrix(random, kKvHeads * d, 1),
               o = random_matrix(random, kHidden, kHeads * d),
               gate = random_matrix(random, kIntermediate, kHidden),
               up = random_matrix(random, kIntermediate, kHidden),
               down = random_matrix(random, kHidden, kIntermediate);
  const auto put = [&](int64_t slot, const Matrix& matrix) {
    weights_[first_slot + slot] = laid_out(sizes_.dtype, matrix, layout_.transposed);
  };
  const auto put_bias = [&](int64_t slot, const Matrix& bias) {
    weights_[first_slot + slot] = Tensor::of(sizes_.dtype, {bias.n}, bias.values);
  };
  for (const int64_t norm : {0, 28}) {
    weights_[first_slot + norm] = Tensor::random(random, sizes_.dtype, {kHidden}, 0.5, 1.5);
  }
  put(22, o);
  put(44, down);
  if (layout_.packed) {
    put(4, stacked({q, k, v}));
    put_bias(5, stacked({q_bias, k_bias, v_bias}));
    put(32, stacked({gate, up}));
    return;
  }
  put(4, q);
  put_bias(5, q_bias);
  put(10, k);
  put_bias(11, k_bias);
  put(16, v);
  put_bias(17, v_bias);
  put(32, gate);
  put(38, up);
}

TinyStep TinyQwen::open(Phase& phase, StepInputs inputs) {
  const InputOrder& order = layout_.current ? kOrderCurrent : kOrder2024;
  Step step = phase.model->prepare(inputs.list(order), inputs.parameters());
  const TensorDesc logits = phase.model->output_descs(step.info).at(0);
  return {std::move(inputs), std::move(step), Tensor(logits.dtype, logits.dims)};
}

void TinyQwen::Phase::run(const TinyStep& step) {
  runner->run(step.step.inputs, {&step.logits.view(), 1}, step.step.info, arena);
}

}  // namespace test
