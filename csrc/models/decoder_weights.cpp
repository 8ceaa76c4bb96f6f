#include "models/decoder_weights.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace modeltorch {
namespace {

const WeightDim kHidden{"hidden", -1};
const WeightDim kVocab{"vocab", -1};
const WeightDim kIntermediate{"intermediate", -1};
const WeightDim kTwiceIntermediate{"2*intermediate", -1};

WeightDim exactly(int64_t size) {
  return {"", size};
}

// Writes the specs of one layer. Linears name their [n, k] shape; the transpose type may swap it.
class LayerWriter {
 public:
  LayerWriter(int64_t layer, int64_t first_slot, std::vector<WeightSpec>& specs)
      : name_("layers." + std::to_string(layer) + "."),
        file_("model." + name_),
        first_(first_slot),
        specs_(specs) {}

  void norm(int64_t slot, const std::string& name, const std::string& file) {
    specs_.push_back(
        {name_ + name + ".weight", first_ + slot, {kHidden}, "", file_ + file + ".weight", "none"});
  }

  void linear(int64_t slot, const std::string& name, const std::vector<std::string>& files,
              const WeightDim& n, const WeightDim& k, bool transposed, bool has_bias,
              const std::string& shard) {
    const std::vector<WeightDim> shape = transposed ? std::vector{n, k} : std::vector{k, n};
    specs_.push_back({name_ + name + ".weight", first_ + slot, shape, "", joined(files, ".weight"), shard});
    const bool split_on_input = shard == "columns";
    if (has_bias) {
      specs_.push_back({name_ + name + ".bias",
                        first_ + slot + 1,
                        {n},
                        "",
                        joined(files, ".bias"),
                        split_on_input ? "first_rank" : shard});
    }
  }

 private:
  std::string joined(const std::vector<std::string>& files, const std::string& suffix) const {
    std::string text;
    for (const std::string& file : files) text += (text.empty() ? "" : "+") + file_ + file + suffix;
    return text;
  }

  std::string name_;
  std::string file_;
  int64_t first_;
  std::vector<WeightSpec>& specs_;
};

std::string expected_shape(const WeightSpec& spec, const std::map<std::string, int64_t>& sizes) {
  std::string text;
  for (const WeightDim& dim : spec.shape) {
    if (!text.empty()) text += ", ";
    if (dim.symbol.empty()) {
      text += std::to_string(dim.size);
      continue;
    }
    const auto bound = sizes.find(dim.symbol);
    text += dim.symbol + (bound == sizes.end() ? "" : "=" + std::to_string(bound->second));
  }
  return "[" + text + "]";
}

// Compares one size with its spec; an unbound symbol takes the size. "2*intermediate" follows "intermediate".
bool bind_size(const WeightDim& dim, int64_t size, std::map<std::string, int64_t>& sizes) {
  if (dim.symbol.empty()) return dim.size == size;
  if (dim.symbol == kTwiceIntermediate.symbol) {
    if (size % 2 != 0 || !bind_size(kIntermediate, size / 2, sizes)) return false;
  }
  return sizes.emplace(dim.symbol, size).first->second == size && size > 0;
}

void check_shape(const WeightSpec& spec, const TensorView& view, std::map<std::string, int64_t>& sizes) {
  bool fits = view.dims.rank() == static_cast<int>(spec.shape.size());
  for (int axis = 0; fits && axis < view.dims.rank(); ++axis) {
    fits = bind_size(spec.shape[axis], view.dims[axis], sizes);
  }
  check(fits, "weight ", spec.slot, " (", spec.name, ") must be ", expected_shape(spec, sizes), ", got ",
        view);
}

}  // namespace

void DecoderWeights::add_layer(int64_t layer, const LayerPacking& packing,
                               std::vector<WeightSpec>& specs) const {
  LayerWriter write(layer, first_layer_slot() + layer * kSlotsPerLayer, specs);
  const WeightDim q_size = exactly(shape_.heads * shape_.head_size);
  const WeightDim kv_size = exactly(shape_.kv_heads * shape_.head_size);
  const WeightDim qkv_size = exactly((shape_.heads + 2 * shape_.kv_heads) * shape_.head_size);
  const std::string attn = "self_attn.";
  write.norm(0, "attn.norm", "input_layernorm");
  if (packing.qkv_packed) {
    write.linear(4, "attn.qkv", {attn + "q_proj", attn + "k_proj", attn + "v_proj"}, qkv_size, kHidden,
                 packing.transposed[0], packing.qkv_bias, "heads");
  } else {
    write.linear(4, "attn.q", {attn + "q_proj"}, q_size, kHidden, packing.transposed[0], packing.qkv_bias,
                 "heads");
    write.linear(10, "attn.k", {attn + "k_proj"}, kv_size, kHidden, packing.transposed[1], packing.qkv_bias,
                 "kv_heads");
    write.linear(16, "attn.v", {attn + "v_proj"}, kv_size, kHidden, packing.transposed[2], packing.qkv_bias,
                 "kv_heads");
  }
  write.linear(22, "attn.o", {attn + "o_proj"}, kHidden, q_size, packing.transposed[3], packing.o_bias,
               "columns");
  write.norm(28, "mlp.norm", "post_attention_layernorm");
  if (packing.gate_up_packed) {
    write.linear(32, "mlp.gate_up", {"mlp.gate_proj", "mlp.up_proj"}, kTwiceIntermediate, kHidden,
                 packing.transposed[4], packing.gate_up_bias, "rows");
  } else {
    write.linear(32, "mlp.gate", {"mlp.gate_proj"}, kIntermediate, kHidden, packing.transposed[4],
                 packing.gate_up_bias, "rows");
    write.linear(38, "mlp.up", {"mlp.up_proj"}, kIntermediate, kHidden, packing.transposed[5],
                 packing.gate_up_bias, "rows");
  }
  write.linear(44, "mlp.down", {"mlp.down_proj"}, kHidden, kIntermediate, packing.transposed[6],
               packing.down_bias, "columns");
}

std::vector<WeightSpec> DecoderWeights::specs(const std::vector<LayerPacking>& packing) const {
  std::vector<WeightSpec> specs;
  if (shape_.has_embedding) {
    specs.push_back({"embedding.weight",
                     0,
                     {{"vocab or vocab + 1", -1}, kHidden},
                     "",
                     "model.embed_tokens.weight",
                     "columns"});
  }
  for (int64_t layer = 0; layer < shape_.layers; ++layer) add_layer(layer, packing[layer], specs);
  specs.push_back({"final_norm.weight", count() - 2, {kHidden}, "", "model.norm.weight", "none"});
  const std::vector<WeightDim> head =
      shape_.head_transposed ? std::vector{kVocab, kHidden} : std::vector{kHidden, kVocab};
  specs.push_back({"lm_head.weight", count() - 1, head, "", "lm_head.weight", "rows"});
  for (WeightSpec& spec : specs) spec.dtype = shape_.is_bfloat16 ? "bfloat16" : "float";
  return specs;
}

namespace {

// What most of the listed weights are, so that the odd one is blamed and not all the others.
template <class Property>
auto most_common(const std::vector<WeightSpec>& specs, std::span<const GivenTensor> given,
                 Property&& property) {
  std::vector<std::pair<decltype(property(given[0])), int64_t>> counts;
  for (const WeightSpec& spec : specs) {
    const auto value = property(given[spec.slot]);
    auto found =
        std::find_if(counts.begin(), counts.end(), [&](const auto& item) { return item.first == value; });
    if (found == counts.end()) found = counts.insert(counts.end(), {value, 0});
    ++found->second;
  }
  return std::max_element(counts.begin(), counts.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

std::string label(const WeightSpec& spec) {
  return concat("weight ", spec.slot, " (", spec.name, ")");
}

}  // namespace

ResolvedWeights resolve_weights(const std::vector<WeightSpec>& specs, std::span<const GivenTensor> given) {
  ResolvedWeights resolved;
  resolved.dtype = most_common(specs, given, [](const GivenTensor& tensor) { return tensor.view.dtype; });
  resolved.device = most_common(specs, given, [](const GivenTensor& tensor) { return tensor.device; });
  for (const WeightSpec& spec : specs) {
    const GivenTensor& weight = given[spec.slot];
    const DType dtype = weight.view.dtype;
    check(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16, label(spec),
          " must be float32, bfloat16 or float16, got ", weight.view);
    check_shape(spec, weight.view, resolved.sizes);
    check(dtype == resolved.dtype, label(spec), " must be ", resolved.dtype,
          " as the other weights are, got ", weight.view);
    check_place(weight, resolved.device, " as the other weights are", label(spec));
  }
  if (specs.front().name == "embedding.weight") {
    const int64_t vocab = resolved.sizes.at("vocab");
    resolved.embedding_rows = given[specs.front().slot].view.dims[0];
    check(resolved.embedding_rows == vocab || resolved.embedding_rows == vocab + 1, label(specs.front()),
          " must have ", vocab, " rows as lm_head does, or one more, got ", given[specs.front().slot].view);
  }
  return resolved;
}

}  // namespace modeltorch
