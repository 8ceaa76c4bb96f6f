#include "torch/operation_object.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <map>
#include <utility>

#include "core/check.h"
#include "torch/errors.h"
#include "torch/pack_table.h"
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

bool OperationObject::is_prepared_for(const std::vector<at::Tensor>& tensors,
                                      const std::vector<TensorDesc>& descs) const {
  if (!runner_ || descs != input_descs_) return false;
  for (size_t index = 0; index < weight_positions_.size(); ++index) {
    const at::Tensor& tensor = tensors[weight_positions_[index]];
    const bool is_counted = !tensor.is_inference();  // else nobody knows whether it was written to
    if (!is_counted || !tensor.is_same(weights_[index]) || tensor._version() != versions_[index])
      return false;
  }
  return true;
}

void OperationObject::prepare(const std::vector<at::Tensor>& tensors,
                              const std::vector<GivenTensor>& inputs) {
  check(!inputs.empty(), "expected at least one input, got none");
  std::vector<TensorDesc> descs;
  for (const GivenTensor& input : inputs) {
    check_place(input, inputs[0].device, " as the first one is", "every input");
    descs.push_back({input.view.dtype, input.view.dims, Rows::kFixed});
  }
  if (device_ == inputs[0].device && is_prepared_for(tensors, descs)) return;
  output_descs_ = operation_->infer_shape(descs);
  device_ = inputs[0].device;
  const WeightPacker* packer = find_packer(operation_->name(), device_.type);
  weight_positions_ = packer == nullptr ? std::vector<size_t>{} : packer->replaces(*operation_, descs);
  GraphBuilder graph;
  std::vector<Value> values;
  for (size_t index = 0; index < inputs.size(); ++index) {
    const bool is_weight =
        std::find(weight_positions_.begin(), weight_positions_.end(), index) != weight_positions_.end();
    const std::string name = "input " + std::to_string(index);
    const auto slot = static_cast<int32_t>(index);
    values.push_back(is_weight ? graph.weight(name, slot) : graph.input(name, slot));
  }
  const std::vector<Value> results = graph.add(operation_->name(), operation_, values);
  for (size_t index = 0; index < results.size(); ++index) {
    graph.mark_output(results[index], "output " + std::to_string(index), static_cast<int32_t>(index));
  }
  const std::vector<Rows> rows(inputs.size(), Rows::kFixed);
  runner_ = std::make_unique<GraphRunner>(graph.finish(), rows, device_);
  runner_->bind_weights(views_of(inputs));
  std::vector<at::Tensor> packed = tensors;
  PackStore store("");
  pack_weights(*runner_, packed, store, [](double) {});
  weights_.clear();
  versions_.clear();
  for (const size_t position : weight_positions_) {
    weights_.push_back(tensors[position]);
    versions_.push_back(tensors[position].is_inference() ? 0 : tensors[position]._version());
  }
  arena_ = std::make_unique<TensorArena>(device_);
  input_descs_ = std::move(descs);
}

std::vector<at::Tensor> OperationObject::run(const std::vector<at::Tensor>& inputs) {
  const std::lock_guard lock(mutex_);
  const at::AutoDispatchBelowAutograd no_autograd;
  return translate_errors("Operation " + std::string(operation_->name()), [&] {
    const std::vector<GivenTensor> given = describe(inputs);
    const c10::OptionalDeviceGuard on_device(given.empty() ? std::nullopt
                                                           : current_device_for(given[0].device));
    prepare(inputs, given);
    if (device_.type == DeviceType::kCpu) operation_->check_indices(views_of(given));
    std::vector<at::Tensor> outputs;
    for (const TensorDesc& desc : output_descs_) outputs.push_back(make_tensor(desc, device_));
    runner_->run(views_of(given), views_of(describe(outputs)), step_of(inputs), *arena_);
    runner_->settle();
    return outputs;
  });
}

}  // namespace modeltorch
