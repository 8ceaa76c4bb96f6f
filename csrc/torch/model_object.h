#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "graph/runner.h"
#include "models/model.h"
#include "torch/tensor_arena.h"

namespace modeltorch {

/// torch.classes.ModelTorch.ModelTorch: one phase of one model (docs/contract.md).
///
/// Calls on one object are serialised by its mutex. Every method throws a ValueError, a NotImplementedError
/// or a RuntimeError, and then leaves the object as it was. Methods that return a number return 0.
class ModelObject final : public torch::CustomClassHolder {
 public:
  /// Any name constructs; an unknown one is refused by set_param.
  explicit ModelObject(std::string model_name) : model_name_(std::move(model_name)) {}

  /// Makes the model of this name from its JSON parameters. Weights and caches must be set again after it.
  int64_t set_param(const std::string& parameters);

  /// Takes the weight list in slot order and keeps the tensors.
  int64_t set_weight(const std::vector<at::Tensor>& weights);

  /// Takes one key and one value cache a layer and keeps the tensors; execute writes to them in place.
  int64_t set_kv_cache(const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values);

  /// Runs one step; returns fresh tensors.
  std::vector<at::Tensor> execute(const std::vector<at::Tensor>& inputs, const std::string& parameters);

  /// Runs one step into the caller's contiguous tensors.
  int64_t execute_out(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& outputs,
                      const std::string& parameters);

  /// Waits until the host has launched what the last step left to another thread, and throws, once, what went
  /// wrong there. It does not wait for the device; where steps launch in line it returns at once.
  int64_t settle();

  /// The nodes, tensors, shapes and memory plan of the last step, as text.
  std::string graph();

  /// Says that the weight in this slot, a matrix on Ascend, lies in FRACTAL_NZ tiles. Converts nothing.
  int64_t set_format_to_nz(int64_t slot);

  /// What the object has done: executions, plans, plans_built, plans_evicted, shape_inferences,
  /// kernel_setups, arena_allocations, arena_bytes, packed_files_read, packed_files_written.
  c10::Dict<std::string, int64_t> counters();

  /// The weight list as a JSON array of {name, slot, shape, dtype, shard, checkpoint}.
  std::string weight_spec();

  /// How much of a set_weight under way is done, 0 to 1. The only method that does not wait for the others.
  double progress() const { return progress_.load(std::memory_order_relaxed); }

 private:
  /// Everything that one set_param creates and the next one replaces.
  struct State {
    std::unique_ptr<Model> model;
    std::vector<at::Tensor> weights;
    int64_t packed_files_read = 0;  ///< by the last set_weight
    int64_t packed_files_written = 0;
    std::vector<at::Tensor> keys;
    std::vector<at::Tensor> values;
    std::unique_ptr<TensorArena> arena;
    std::vector<at::Tensor> in_flight;    ///< what launches that are still under way read and write
    std::unique_ptr<GraphRunner> runner;  ///< last: it settles before what it uses goes away
  };

  template <class Body>
  auto guarded(const char* method, Body&& body);

  Model& model();
  void settle_last_step();
  State with_weights(const std::vector<at::Tensor>& weights);
  static void bind_caches(State& state);
  Step prepare(const std::vector<at::Tensor>& inputs, const std::string& parameters);
  void run(const Step& step, const std::vector<at::Tensor>& outputs);
  void keep_in_flight(const std::vector<at::Tensor>& tensors);

  const std::string model_name_;
  std::mutex mutex_;
  std::atomic<double> progress_{0.0};
  State state_;
};

}  // namespace modeltorch
