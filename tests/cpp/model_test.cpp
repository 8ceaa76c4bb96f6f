// The graph of a whole model: what a tiny Qwen2 computes must not depend on how it is asked.

#include "tiny_qwen.h"

using namespace modeltorch;
using namespace test;

namespace {

Prompts without_last(Prompts prompts) {
  for (std::vector<int64_t>& prompt : prompts) prompt.pop_back();
  return prompts;
}

std::vector<double> prefill_logits(TinyQwen& qwen, const Prompts& prompts) {
  const TinyStep step = qwen.prefill(prompts);
  qwen.prefill_phase.run(step);
  return step.logits.values();
}

void expect_same(const Tensor& logits, const std::vector<double>& expected, const char* what) {
  const double error = worst_row_error(logits, expected, logits.dims()[1]);
  expect(error < 5 * tolerance(logits.view().dtype), what, ", ", logits.view(), ": error ", error);
}

}  // namespace

// The last token through the paged cache gives the logits of the whole prompt at once.
TEST(decode_continues_prefill) {
  const Prompts prompts = {{1, 2, 3, 4, 5}, {6, 7}, {8, 9, 10, 0, 1, 2, 3, 4, 5}, {5, 5, 5, 5}};
  for (const DType dtype : kFloats) {
    TinyQwen whole(dtype);
    const std::vector<double> expected = prefill_logits(whole, prompts);
    TinyQwen stepwise(dtype);
    prefill_logits(stepwise, without_last(prompts));
    const TinyStep step = stepwise.decode(prompts);
    stepwise.decode_phase.run(step);
    expect(step.logits.dims() == Dims{4, 11}, "logits ", step.logits.view());
    expect_same(step.logits, expected, "decode after prefill");
  }
}

// Packed or separate, [n, k] or [k, n], 2024 or current: the same numbers in other slots.
TEST(layouts_of_weights_give_the_same_logits) {
  const Prompts prompts = prompts_of(3, 20);
  for (const DType dtype : kFloats) {
    TinyQwen first(dtype);
    const std::vector<double> expected = prefill_logits(first, prompts);
    for (const bool packed : {true, false}) {
      for (const bool transposed : {true, false}) {
        for (const bool current : {true, false}) {
          TinyQwen other(dtype, {packed, transposed, current});
          const TinyStep step = other.prefill(prompts);
          other.prefill_phase.run(step);
          expect_same(step.logits, expected, packed ? "packed" : "separate");
        }
      }
    }
  }
}

// What a sequence gets does not depend on its neighbours in the batch.
TEST(sequences_do_not_meet) {
  const Prompts prompts = {{1, 2, 3}, {4, 5, 6, 7, 8, 9}, {10}};
  for (const DType dtype : kFloats) {
    TinyQwen qwen(dtype);
    const TinyStep batch = qwen.prefill(prompts);
    qwen.prefill_phase.run(batch);
    std::vector<double> alone;
    for (const std::vector<int64_t>& prompt : prompts) {
      const std::vector<double> row = prefill_logits(qwen, {prompt});
      alone.insert(alone.end(), row.begin(), row.end());
    }
    expect_same(batch.logits, alone, "batch");
  }
}

TEST(logits_follow_their_indices) {
  TinyQwen qwen(DType::kFloat32);
  const Prompts prompts = {{1, 2, 3, 4}};
  TinyStep all = qwen.prefill(prompts);
  all.inputs[DecoderInput::kLogitsIndices] = Tensor::of(DType::kInt64, {6}, {3, 0, 0, 2, 1, 3});
  all.step = qwen.prefill_phase.model->prepare(all.inputs.list(kOrder2024), all.inputs.parameters());
  all.logits = Tensor(DType::kFloat32, {6, 11});
  qwen.prefill_phase.run(all);
  std::vector<double> expected;
  for (const int64_t last : {3, 0, 0, 2, 1, 3}) {
    const std::vector<int64_t> prefix(prompts[0].begin(), prompts[0].begin() + last + 1);
    const std::vector<double> row = prefill_logits(qwen, {prefix});
    expected.insert(expected.end(), row.begin(), row.end());
  }
  expect_same(all.logits, expected, "any order, with repetitions");
}

// An empty batch is no error: it gives no rows.
TEST(an_empty_batch_gives_no_logits) {
  for (const DType dtype : kFloats) {
    TinyQwen qwen(dtype);
    const TinyStep prefill = qwen.prefill({});
    qwen.prefill_phase.run(prefill);
    const TinyStep decode = qwen.decode({});
    qwen.decode_phase.run(decode);
    expect(prefill.logits.dims() == Dims{0, 11} && decode.logits.dims() == Dims{0, 11}, "logits");
  }
}
