// A library that takes a name which is taken: qwen_DecoderModel. Whoever makes this model fails.

#include "core/check.h"
#include "models/registry.h"

namespace qwen {

class DecoderModel : public modeltorch::Model {
 public:
  explicit DecoderModel(const std::string&) {
    modeltorch::fail(modeltorch::ErrorKind::kRuntime, "the second one");
  }

  std::unique_ptr<modeltorch::Model> clone() const override { return nullptr; }
  std::string name() const override { return "second"; }
  int64_t weight_count() const override { return 0; }
  std::vector<modeltorch::WeightSpec> weight_specs() const override { return {}; }
  void accept_weights(std::span<const modeltorch::GivenTensor>) override {}
  int64_t cache_count() const override { return 0; }
  void accept_caches(std::span<const modeltorch::GivenTensor>,
                     std::span<const modeltorch::GivenTensor>) override {}
  modeltorch::Device device() const override { return {}; }
  modeltorch::Graph build_graph() const override { return {}; }
  std::vector<modeltorch::Rows> input_rows() const override { return {}; }
  modeltorch::Step prepare(std::span<const modeltorch::GivenTensor>, const nlohmann::json&) const override {
    return {};
  }
  std::vector<modeltorch::TensorDesc> output_descs(const modeltorch::StepInfo&) const override { return {}; }
};

}  // namespace qwen

REGISTER_MODEL(qwen, DecoderModel);
