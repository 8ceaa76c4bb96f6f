#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "graph/runner.h"
#include "models/model.h"
#include "torch/tensor_arena.h"

namespace modeltorch {

/// torch.classes.ModelTorch.Operation: one operation without a model, for tests, benchmarks and debugging.
///
/// `Operation("RmsNorm", {"epsilon": 1e-6}).run([x, gamma])` returns the outputs. Runs again with inputs of
/// the same shapes reuse the plan.
class OperationObject final : public torch::CustomClassHolder {
 public:
  OperationObject(const std::string& name, const c10::Dict<std::string, double>& parameters);

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs);

 private:
  void prepare(const std::vector<at::Tensor>& tensors, const std::vector<GivenTensor>& inputs);
  bool is_prepared_for(const std::vector<at::Tensor>& tensors, const std::vector<TensorDesc>& descs) const;

  std::mutex mutex_;
  OperationPtr operation_;
  std::vector<TensorDesc> input_descs_;
  std::vector<size_t> weight_positions_;  ///< inputs that the device packs
  std::vector<at::Tensor> weights_;       ///< those inputs
  std::vector<uint32_t> versions_;        ///< and their versions
  std::vector<TensorDesc> output_descs_;
  Device device_;
  std::unique_ptr<GraphRunner> runner_;
  std::unique_ptr<TensorArena> arena_;
};

}  // namespace modeltorch
