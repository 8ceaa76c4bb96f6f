// A model of somebody else's, in a library and a namespace of its own: logits =
// linear(rms_norm(embedding[ids])).

#include <array>

#include "core/check.h"
#include "models/model.h"
#include "models/parameters.h"
#include "models/registry.h"
#include "ops/gather_rows.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

namespace somebody_else {

using namespace modeltorch;

/// Weights: embedding [vocab, hidden], norm [hidden], head [vocab, hidden]. Input: ids int64 [n]. No cache.
class BigramModel final : public Model {
 public:
  explicit BigramModel(const std::string& json) : parameters_(json, kRules) {}

  std::unique_ptr<Model> clone() const override { return std::make_unique<BigramModel>(*this); }
  std::string name() const override { return "Bigram"; }
  int64_t weight_count() const override { return 3; }

  std::vector<WeightSpec> weight_specs() const override {
    const WeightDim vocab{"vocab"};
    const WeightDim hidden{"hidden"};
    return {{"embedding", 0, {vocab, hidden}, "float", "embedding", "none"},
            {"norm", 1, {hidden}, "float", "norm", "none"},
            {"head", 2, {vocab, hidden}, "float", "head", "none"}};
  }

  void accept_weights(std::span<const GivenTensor> weights) override {
    check(weights[0].view.dims.rank() == 2, "weight 0 (embedding) must be [vocab, hidden], got ",
          weights[0].view);
    check(weights[2].view.dims == weights[0].view.dims, "weight 2 (head) must be as weight 0, got ",
          weights[2].view);
    weight_ = {weights[0].view.dtype, weights[0].view.dims};
    device_ = weights[0].device;
  }

  int64_t cache_count() const override { return 0; }
  void accept_caches(std::span<const GivenTensor>, std::span<const GivenTensor>) override {}
  Device device() const override { return device_; }

  Graph build_graph() const override {
    GraphBuilder graph;
    const Value ids = graph.input("ids", 0);
    const Value embedding = graph.weight("embedding", 0);
    const Value hidden = gather_rows(graph, "embedding", embedding, ids);
    const auto epsilon = static_cast<float>(parameters_.number("epsilon", 0.0));
    const Value normed = rms_norm(graph, hidden, graph.weight("norm", 1), epsilon);
    const Value logits = linear(graph, "head", normed, {{graph.weight("head", 2), Value{}, true}});
    graph.mark_output(logits, "logits", 0);
    return graph.finish();
  }

  std::vector<Rows> input_rows() const override { return {Rows::kTokens}; }

  Step prepare(std::span<const GivenTensor> inputs, const nlohmann::json&) const override {
    check(inputs.size() == 1, "Bigram takes 1 input, got ", inputs.size());
    check(inputs[0].view.dtype == DType::kInt64 && inputs[0].view.dims.rank() == 1,
          "ids must be int64 [n], got ", inputs[0].view);
    Step step;
    step.inputs = {inputs[0].view};
    step.info.tokens = step.info.logit_rows = inputs[0].view.dims[0];
    return step;
  }

  std::vector<TensorDesc> output_descs(const StepInfo& step) const override {
    return {{weight_.dtype, {step.tokens, weight_.dims[0]}, Rows::kTokens}};
  }

 private:
  static constexpr std::array<KeyRule, 1> kRules{{{"epsilon", KeyType::kNumber, KeyPolicy::kRequired}}};

  Parameters parameters_;
  TensorDesc weight_;
  Device device_;
};

}  // namespace somebody_else

REGISTER_MODEL(somebody_else, BigramModel);
