// Qwen2 and Qwen2.5, dense: the graph of one step, and the names it is registered under.

#include <cmath>
#include <optional>

#include "core/check.h"
#include "graph/session.h"
#include "models/decoder_contract.h"
#include "models/decoder_parameters.h"
#include "models/decoder_weights.h"
#include "models/model.h"
#include "models/registry.h"
#include "ops/add.h"
#include "ops/gather_rows.h"
#include "ops/linear.h"
#include "ops/paged_attention.h"
#include "ops/reshape_and_cache.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/self_attention.h"
#include "ops/split_qkv.h"
#include "ops/swiglu.h"

namespace modeltorch {
namespace qwen {

/// Builds the graph of one step: the inputs, the layers, the head.
class QwenGraph {
 public:
  QwenGraph(const DecoderParameters& parameters, const std::vector<WeightSpec>& specs)
      : parameters_(parameters), shape_(parameters.shape) {
    for (const WeightSpec& spec : specs) {
      weights_[spec.name] = graph_.weight(spec.name, static_cast<int32_t>(spec.slot));
    }
  }

  Graph build();

 private:
  Value input(DecoderInput which, const char* name) {
    return graph_.input(name, static_cast<int32_t>(which));
  }

  LinearWeight part(const std::string& name, bool transposed) const {
    const auto bias = weights_.find(name + ".bias");
    return {weights_.at(name + ".weight"), bias == weights_.end() ? Value{} : bias->second, transposed};
  }

  Value attention(Value hidden, int64_t layer);
  Value mlp(Value hidden, int64_t layer);

  const DecoderParameters& parameters_;
  const DecoderShape& shape_;
  GraphBuilder graph_;
  std::map<std::string, Value> weights_;
  Value cos_, sin_, slots_, seq_len_, block_tables_, logits_indices_;
};

/// hidden + o(attention(rope(qkv(norm(hidden)))))
///
/// | tensor | shape          | note                                                                      |
/// |--------|----------------|---------------------------------------------------------------------------|
/// | hidden | [n, hidden]    |                                                                           |
/// | caches |                | the keys and values of the step are written at its slots                  |
/// | result | [rows, hidden] | all n; of a prefill's last layer only those whose logits are asked for,   |
/// |        |                | since no token reads another behind the last attention                    |
Value QwenGraph::attention(Value hidden, int64_t layer) {
  const GraphBuilder::Scope scope(graph_, "attn");
  const LayerPacking& packing = parameters_.packing[layer];
  const bool (&transposed)[7] = packing.transposed;
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  const std::string name = prefix + "attn.";
  const Value normed = rms_norm(graph_, hidden, weights_.at(name + "norm.weight"), parameters_.epsilon);
  const Value qkv = linear(graph_, "qkv", normed,
                           packing.qkv_packed
                               ? std::vector{part(name + "qkv", transposed[0])}
                               : std::vector{part(name + "q", transposed[0]), part(name + "k", transposed[1]),
                                             part(name + "v", transposed[2])});
  const QkvHeads heads = split_qkv(graph_, qkv, shape_.heads, shape_.kv_heads, shape_.head_size);
  const RotatedHeads rotated = rope(graph_, heads.q, heads.k, cos_, sin_);
  const Value k_cache = graph_.cache(prefix + "k_cache", static_cast<int32_t>(2 * layer));
  const Value v_cache = graph_.cache(prefix + "v_cache", static_cast<int32_t>(2 * layer + 1));
  reshape_and_cache(graph_, rotated.k, heads.v, k_cache, v_cache, slots_);
  const AttentionShape shape{.heads = shape_.heads,
                             .kv_heads = shape_.kv_heads,
                             .head_size = shape_.head_size,
                             .scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_size))};
  Value attended = parameters_.is_prefill
                       ? self_attention(graph_, rotated.q, rotated.k, heads.v, seq_len_, shape)
                       : paged_attention(graph_, rotated.q, k_cache, v_cache, block_tables_, seq_len_, shape);
  if (parameters_.is_prefill && layer == shape_.layers - 1) {
    attended = gather_rows(graph_, "attended_rows", attended, logits_indices_);
    hidden = gather_rows(graph_, "hidden_rows", hidden, logits_indices_);
  }
  return add(graph_, hidden, linear(graph_, "o", attended, {part(name + "o", transposed[3])}));
}

/// hidden + down(swiglu(gate_up(norm(hidden)))), hidden [n, hidden].
Value QwenGraph::mlp(Value hidden, int64_t layer) {
  const GraphBuilder::Scope scope(graph_, "mlp");
  const LayerPacking& packing = parameters_.packing[layer];
  const bool (&transposed)[7] = packing.transposed;
  const std::string name = "layers." + std::to_string(layer) + ".mlp.";
  const Value normed = rms_norm(graph_, hidden, weights_.at(name + "norm.weight"), parameters_.epsilon);
  const Value gate_up = linear(graph_, "gate_up", normed,
                               packing.gate_up_packed ? std::vector{part(name + "gate_up", transposed[4])}
                                                      : std::vector{part(name + "gate", transposed[4]),
                                                                    part(name + "up", transposed[5])});
  const Value activated = swiglu(graph_, gate_up);
  return add(graph_, hidden, linear(graph_, "down", activated, {part(name + "down", transposed[6])}));
}

Graph QwenGraph::build() {
  const Value ids = input(DecoderInput::kIds, "input_ids");
  const Value positions = input(DecoderInput::kPositions, "position_ids");
  slots_ = graph_.input("slots", static_cast<int32_t>(DecoderInput::kSlots), -1);
  if (!parameters_.is_prefill) graph_.allow_padding();
  seq_len_ = input(DecoderInput::kSeqLen, "seq_len");
  Value hidden =
      shape_.has_embedding ? gather_rows(graph_, "embedding", weights_.at("embedding.weight"), ids) : ids;
  cos_ = gather_rows(graph_, "cos", input(DecoderInput::kCosTable, "cos_table"), positions);
  sin_ = gather_rows(graph_, "sin", input(DecoderInput::kSinTable, "sin_table"), positions);
  if (parameters_.is_prefill) {
    logits_indices_ = input(DecoderInput::kLogitsIndices, "logits_indices");
  } else {
    block_tables_ = input(DecoderInput::kBlockTables, "block_tables");
  }
  for (int64_t layer = 0; layer < shape_.layers; ++layer) {
    const GraphBuilder::Scope scope(graph_, "layers." + std::to_string(layer));
    hidden = mlp(attention(hidden, layer), layer);
  }
  const Value normed = rms_norm(graph_, hidden, weights_.at("final_norm.weight"), parameters_.epsilon);
  graph_.mark_output(linear(graph_, "lm_head", normed, {part("lm_head", shape_.head_transposed)}), "logits",
                     0);
  return graph_.finish();
}

constexpr int64_t kCacheTile = 16;  // columns of a tile

/// Qwen2 and Qwen2.5, dense, paged attention over unpadded tokens (Hugging Face modeling_qwen2.py).
///
/// hidden = embedding[ids]
/// per layer: hidden += o(attention(rope(qkv(norm(hidden))))); hidden += down(swiglu(gate_up(norm(hidden))))
/// logits = lm_head(norm(hidden[rows]))
///
/// | tensor | shape            | dtype         |
/// |--------|------------------|---------------|
/// | inputs | DecoderInput     |               |
/// | logits | [rows, vocab]    | model dtype   |
class QwenModel : public Model {
 public:
  QwenModel(DecoderParameters parameters, const InputOrder& order)
      : parameters_(std::move(parameters)), order_(order), weights_(parameters_.shape) {}

  std::unique_ptr<Model> clone() const override { return std::make_unique<QwenModel>(*this); }
  std::string name() const override {
    return parameters_.is_prefill ? "DecoderModel_Prefill" : "DecoderModel_Decoder";
  }
  int64_t weight_count() const override { return weights_.count(); }
  std::vector<WeightSpec> weight_specs() const override { return weights_.specs(parameters_.packing); }
  void accept_weights(std::span<const GivenTensor> weights) override;
  int64_t cache_count() const override { return parameters_.shape.layers; }
  void accept_caches(std::span<const GivenTensor> keys, std::span<const GivenTensor> values) override;
  TensorView cache_view(const GivenTensor& given) const override;
  std::string packed_weight_folder() const override { return parameters_.packed_weight_folder; }
  Device device() const override { return resolved_->device; }
  Graph build_graph() const override;
  std::vector<Rows> input_rows() const override { return decoder_input_rows(); }
  Step prepare(std::span<const GivenTensor> inputs, const nlohmann::json& parameters) const override;
  std::vector<TensorDesc> output_descs(const StepInfo& step) const override;

 private:
  std::vector<LayerPacking> packing_of(std::span<const GivenTensor> weights) const;
  bool is_described_by_tiles(const GivenTensor& given) const;
  void check_cache_shape(const GivenTensor& given, const std::string& label) const;

  DecoderParameters parameters_;
  const InputOrder& order_;
  DecoderWeights weights_;
  std::optional<ResolvedWeights> resolved_;
  std::optional<GivenTensor> cache_;  ///< the first key cache: all have its shape, dtype and place
};

std::vector<LayerPacking> QwenModel::packing_of(std::span<const GivenTensor> weights) const {
  std::vector<LayerPacking> packing = parameters_.packing;
  if (!parameters_.packing_follows_weights) return packing;
  for (int64_t layer = 0; layer < parameters_.shape.layers; ++layer) {
    packing[layer].qkv_packed = weights_.is_placeholder(weights, layer, DecoderWeights::kKeySlot);
    packing[layer].gate_up_packed = weights_.is_placeholder(weights, layer, DecoderWeights::kUpSlot);
  }
  return packing;
}

void QwenModel::accept_weights(std::span<const GivenTensor> weights) {
  std::vector<LayerPacking> packing = packing_of(weights);
  ResolvedWeights resolved = resolve_weights(weights_.specs(packing), weights);
  const bool is_bfloat16 = resolved.dtype == DType::kBFloat16;
  check(is_bfloat16 == parameters_.shape.is_bfloat16, "the weights are ", resolved.dtype, ", but isBF16 is ",
        parameters_.shape.is_bfloat16 ? "true" : "false");
  check_dtype(resolved.device.type, resolved.dtype);
  const int64_t hidden = resolved.sizes.at("hidden");
  check(parameters_.expected_hidden == 0 || parameters_.expected_hidden == hidden, "parameter hiddenSize is ",
        parameters_.expected_hidden, ", but the weights have a hidden size of ", hidden);
  if (cache_.has_value()) {
    check(cache_->view.dtype == resolved.dtype && cache_->device == resolved.device, "the weights must be ",
          cache_->view.dtype, " on ", cache_->device, " as the caches are, got ", resolved.dtype, " on ",
          resolved.device);
  }
  parameters_.packing = std::move(packing);
  resolved_ = std::move(resolved);
}

void QwenModel::accept_caches(std::span<const GivenTensor> keys, std::span<const GivenTensor> values) {
  const DType dtype = resolved_ ? resolved_->dtype : keys[0].view.dtype;
  const Device device = resolved_ ? resolved_->device : keys[0].device;
  check(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
        "key cache 0 must be float32, bfloat16 or float16 as the weights are, got ", keys[0].view);
  check(device.type != DeviceType::kMeta && device.type != DeviceType::kOther,
        "key cache 0 must be on a device with memory, got ", device);
  check_dtype(device.type, dtype);
  const TensorView first = cache_view(keys[0]);
  const char* reason = resolved_ ? " as the weights are" : " as key cache 0 is";
  for (const auto& [name, tensors] : {std::pair{"key cache ", keys}, std::pair{"value cache ", values}}) {
    for (size_t layer = 0; layer < tensors.size(); ++layer) {
      const TensorView& view = tensors[layer].view;
      check_cache_shape(tensors[layer], concat(name, layer));
      check(cache_view(tensors[layer]).dims == first.dims, name, layer, " must be ", keys[0].view,
            " as key cache 0 is, got ", view);
      check(view.dtype == dtype, name, layer, " must be ", dtype, reason, ", got ", view);
      check_place(tensors[layer], device, reason, name, layer);
    }
  }
  check(first.dims[0] * first.dims[1] <= INT32_MAX, "a cache must have at most ", INT32_MAX,
        " rows, since slots are int32, got ", keys[0].view);
  cache_ = keys[0];
  cache_->view = first;
}

bool QwenModel::is_described_by_tiles(const GivenTensor& given) const {
  const DecoderShape& shape = parameters_.shape;
  const Dims& dims = given.view.dims;
  return has_tiled_caches(given.device.type) && dims.rank() == 4 && dims[3] == kCacheTile &&
         dims[1] * kCacheTile == shape.kv_heads * shape.head_size;
}

TensorView QwenModel::cache_view(const GivenTensor& given) const {
  TensorView view = given.view;
  if (!is_described_by_tiles(given)) return view;
  view.dims = {view.dims[0], view.dims[2], parameters_.shape.kv_heads, parameters_.shape.head_size};
  view.format = Format::kPlain;  // the sizes are those of the plain cache; its kernels know how it lies there
  return view;
}

void QwenModel::check_cache_shape(const GivenTensor& given, const std::string& label) const {
  const DecoderShape& shape = parameters_.shape;
  const Dims dims = cache_view(given).dims;
  const bool fits = dims.rank() == 4 && dims[0] > 0 && dims[1] > 0 && dims[2] == shape.kv_heads &&
                    dims[3] == shape.head_size;
  const std::string tiles = has_tiled_caches(given.device.type)
                                ? " or, by its tiles, [blocks, kv_heads * head_size / 16, block_size, 16]"
                                : "";
  check(fits, label, " must be [blocks, block_size, ", shape.kv_heads, ", ", shape.head_size, "]", tiles,
        ", got ", given.view);
  // A tensor that itself knows of tiles has blocks of whole ones.
  const bool whole = is_described_by_tiles(given) && dims[1] % kCacheTile == 0;
  check(given.view.format == Format::kPlain || whole, label, " is FRACTAL_NZ, which only a cache ",
        "[blocks, kv_heads * head_size / 16, block_size, 16] with a block_size that is a multiple of 16 may "
        "be, ",
        "on chips that keep caches in tiles, got ", given.view);
}

Graph QwenModel::build_graph() const {
  return QwenGraph(parameters_, weight_specs()).build();
}

Step QwenModel::prepare(std::span<const GivenTensor> inputs, const nlohmann::json& parameters) const {
  const DecoderLimits limits{.is_prefill = parameters_.is_prefill,
                             .embeds_ids = parameters_.shape.has_embedding,
                             .dtype = resolved_->dtype,
                             .device = resolved_->device,
                             .hidden = resolved_->sizes.at("hidden"),
                             .head_size = parameters_.shape.head_size,
                             .embedding_rows = resolved_->embedding_rows,
                             .blocks = cache_->view.dims[0],
                             .block_size = cache_->view.dims[1]};
  return prepare_decoder_step(order_, limits, inputs, parameters);
}

std::vector<TensorDesc> QwenModel::output_descs(const StepInfo& step) const {
  return {{resolved_->dtype, {step.logit_rows, resolved_->sizes.at("vocab")}, Rows::kLogits}};
}

/// The 2024 keys and input order. Qwen2 has biases on q, k and v, and nowhere else.
class DecoderModel final : public QwenModel {
 public:
  explicit DecoderModel(const std::string& json)
      : QwenModel(parse_parameters_2024(json, {.qkv_bias = true}), kOrder2024) {}
};

/// The current keys and input order; the key linearHasBias says which linears have a bias.
class QwenDecoderModel final : public QwenModel {
 public:
  explicit QwenDecoderModel(const std::string& json)
      : QwenModel(parse_parameters_current(json), kOrderCurrent) {}
};

}  // namespace qwen

REGISTER_MODEL(qwen, DecoderModel);
REGISTER_MODEL(qwen, QwenDecoderModel);

namespace {

const bool paged_alias = register_alias({"qwen_PAModel", "qwen_DecoderModel", "isFA", false});
const bool padded_alias = register_alias({"qwen_FAModel", "qwen_DecoderModel", "isFA", true});

}  // namespace
}  // namespace modeltorch
