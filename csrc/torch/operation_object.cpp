#include "torch/operation_object.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <map>
#include <utility>

#include "core/check.h"
#include "torch/errors.h"
#include "torch/tensors.h"

namespace modeltorch {

OperationObject::OperationObject(const std::string& name, const c10::Dict<std::string, double>& parameters) {
  std::map<std::string, double> values;
  for (const auto& item : parameters) values.emplace(item.key(), item.value());
  translate_errors("Operation " + name,
                   [&] { operation_ = make_operation(name, OperationParameters(std::move(values))); });
}

namespace {

// An operation alone has no parameters of a step, yet kernels of some devices read the sequence lengths on
// the host: they are the last input of every operation that has them, int32 [B].
StepInfo step_of(const std::vector<at::Tensor>& inputs) {
  StepInfo step;
  const at::Tensor& last = inputs.back();
  if (last.is_cpu() || last.dim() != 1 || last.scalar_type() != at::kInt) return step;
  const at::Tensor lengths = last.cpu();
  const auto* values = static_cast<const int32_t*>(lengths.const_data_ptr());
  step.sequence_lengths.assign(values, values + lengths.numel());
  return step;
}

}  // namespace

void OperationObject::prepare(const std::vector<GivenTensor>& inputs) {
  check(!inputs.empty(), "expected at least one input, got none");
  std::vector<TensorDesc> descs;
  for (const GivenTensor& input : inputs) {
    check_place(input, "every input", inputs[0].device, " as the first one is");
    descs.push_back({input.view.dtype, input.view.dims, Rows::kFixed});
  }
  if (runner_ && descs == input_descs_ && device_ == inputs[0].device) return;
  std::vector<TensorDesc> outputs = operation_->infer_shape(descs);
  GraphBuilder graph;
  std::vector<Value> values;
  for (size_t index = 0; index < inputs.size(); ++index) {
    values.push_back(graph.input("input " + std::to_string(index), static_cast<int32_t>(index)));
  }
  const std::vector<Value> results = graph.add(operation_->name(), operation_, values);
  for (size_t index = 0; index < results.size(); ++index) {
    graph.mark_output(results[index], "output " + std::to_string(index), static_cast<int32_t>(index));
  }
  const std::vector<Rows> rows(inputs.size(), Rows::kFixed);
  runner_ = std::make_unique<GraphRunner>(graph.finish(), rows, inputs[0].device);
  arena_ = std::make_unique<TensorArena>(inputs[0].device);
  device_ = inputs[0].device;
  input_descs_ = std::move(descs);
  output_descs_ = std::move(outputs);
}

std::vector<at::Tensor> OperationObject::run(const std::vector<at::Tensor>& inputs) {
  const std::lock_guard lock(mutex_);
  const at::AutoDispatchBelowAutograd no_autograd;
  return translate_errors("Operation " + std::string(operation_->name()), [&] {
    const std::vector<GivenTensor> given = describe(inputs);
    prepare(given);
    std::vector<at::Tensor> outputs;
    for (const TensorDesc& desc : output_descs_) outputs.push_back(make_tensor(desc, device_));
    runner_->run(views_of(given), views_of(describe(outputs)), step_of(inputs), *arena_);
    runner_->settle();
    return outputs;
  });
}

}  // namespace modeltorch
