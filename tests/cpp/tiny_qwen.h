#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "models/decoder_contract.h"
#include "models/model.h"
#include "tensors.h"

namespace test {

using Prompts = std::vector<std::vector<int64_t>>;

/// `count` prompts of made-up ids, `tokens` in all.
Prompts prompts_of(int64_t count, int64_t tokens);

/// The inputs of one step by name, in tensors of their own. A sequence b has the blocks b * width to (b + 1)
/// * width.
struct StepInputs {
  std::vector<Tensor> tensors;  ///< by DecoderInput; the last one stands at every unused position
  std::vector<int64_t> lengths;

  const Tensor& operator[](modeltorch::DecoderInput input) const { return tensors[static_cast<int>(input)]; }
  Tensor& operator[](modeltorch::DecoderInput input) { return tensors[static_cast<int>(input)]; }

  std::vector<modeltorch::GivenTensor> list(const modeltorch::InputOrder& order) const;
  nlohmann::json parameters() const { return {{"seqLen", lengths}}; }
};

/// The sizes that StepInputs are made for.
struct StepSizes {
  DType dtype = DType::kFloat32;
  int64_t head_size = 6;
  int64_t max_positions = 64;
  int64_t block_size = 4;
  int64_t width = 16;  ///< blocks of a sequence
};

/// All tokens of every prompt.
StepInputs prefill_inputs(const StepSizes& sizes, const Prompts& prompts);

/// The last token of every prompt; the others are in the cache.
StepInputs decode_inputs(const StepSizes& sizes, const Prompts& prompts);

/// A step that passed the door, with its inputs and room for the logits.
struct TinyStep {
  StepInputs inputs;
  modeltorch::Step step;
  Tensor logits;
};

/// How TinyQwen's weights lie in the list; the numbers in them are always the same.
struct TinyLayout {
  bool packed = true;
  bool transposed = true;  ///< linears are [n, k]
  bool current = false;    ///< the current keys and input order
};

/// A Qwen2 of two layers with random weights: a prefill and a decode object over the same weights and caches.
class TinyQwen {
 public:
  struct Phase {
    std::unique_ptr<modeltorch::Model> model;
    std::unique_ptr<modeltorch::GraphRunner> runner;
    HeapArena arena;

    void run(const TinyStep& step);
  };

  explicit TinyQwen(DType dtype, const TinyLayout& layout = {});

  TinyStep prefill(const Prompts& prompts) { return open(prefill_phase, prefill_inputs(sizes_, prompts)); }
  TinyStep decode(const Prompts& prompts) { return open(decode_phase, decode_inputs(sizes_, prompts)); }

  Phase prefill_phase;
  Phase decode_phase;

 private:
  TinyStep open(Phase& phase, StepInputs inputs);
  void set_up(Phase& phase, bool is_prefill);
  std::string parameters(bool is_prefill) const;
  void fill_weights(const modeltorch::Model& model);
  void fill_layer(Random& random, int64_t first_slot);

  StepSizes sizes_;
  TinyLayout layout_;
  std::vector<Tensor> weights_;
  std::vector<Tensor> caches_;
};

}  // namespace test
