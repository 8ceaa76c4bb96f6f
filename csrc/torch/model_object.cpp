#include "torch/model_object.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>

#include <nlohmann/json.hpp>

#include "core/check.h"
#include "core/parallel.h"
#include "models/parameters.h"
#include "models/registry.h"
#include "torch/errors.h"
#include "torch/pack_table.h"
#include "torch/tensors.h"

namespace modeltorch {
namespace {

nlohmann::json to_json(const WeightSpec& spec) {
  nlohmann::json shape = nlohmann::json::array();
  for (const WeightDim& dim : spec.shape) {
    if (dim.symbol.empty()) {
      shape.push_back(dim.size);
    } else {
      shape.push_back(dim.symbol);
    }
  }
  return {{"name", spec.name},   {"slot", spec.slot},   {"shape", shape},
          {"dtype", spec.dtype}, {"shard", spec.shard}, {"checkpoint", spec.checkpoint}};
}

}  // namespace

template <class Body>
auto ModelObject::guarded(const char* method, Body&& body) {
  const std::lock_guard lock(mutex_);
  const at::AutoDispatchBelowAutograd no_autograd;
  try {
    return body();
  } catch (const Error& error) {
    const std::string model = state_.model ? " [" + state_.model->name() + "]" : "";
    throw_torch_error(error, model_name_ + "." + method + model);
  }
}

Model& ModelObject::model() {
  if (!state_.model) fail(ErrorKind::kRuntime, "set_param must come first");
  return *state_.model;
}

// Where launches of the last step are still under way, waits until the host has made them; their error comes
// here.
void ModelObject::settle_last_step() {
  if (!state_.runner || !state_.runner->pending()) return;
  const std::vector<at::Tensor> until_settled = std::move(state_.in_flight);
  state_.in_flight.clear();
  state_.runner->settle();
}

void ModelObject::keep_in_flight(const std::vector<at::Tensor>& tensors) {
  if (!state_.runner->pending()) return;
  state_.in_flight.insert(state_.in_flight.end(), tensors.begin(), tensors.end());
}

int64_t ModelObject::set_param(const std::string& parameters) {
  return guarded("set_param", [&]() -> int64_t {
    settle_last_step();
    State fresh;
    fresh.model = make_model(model_name_, parameters);
    state_ = std::move(fresh);
    progress_ = 0.0;
    return 0;
  });
}

int64_t ModelObject::set_weight(const std::vector<at::Tensor>& weights) {
  return guarded("set_weight", [&]() -> int64_t {
    settle_last_step();
    check(static_cast<int64_t>(weights.size()) == model().weight_count(), "the weight list must have ",
          model().weight_count(), " tensors, got ", weights.size());
    const double progress_before = progress_;
    try {
      state_ = with_weights(weights);
    } catch (...) {
      progress_ = progress_before;
      throw;
    }
    progress_ = 1.0;
    return 0;
  });
}

// Everything is made beside the present state, which stays whole if something throws.
ModelObject::State ModelObject::with_weights(const std::vector<at::Tensor>& weights) {
  std::vector<at::Tensor> held;
  held.reserve(weights.size());
  for (const at::Tensor& weight : weights) {
    check(weight.defined(), "weight ", held.size(), " is an undefined tensor");
    held.push_back(weight.layout() == at::kStrided ? weight.resolve_neg().contiguous() : weight);
  }
  State fresh;
  fresh.model = state_.model->clone();
  fresh.keys = state_.keys;
  fresh.values = state_.values;
  const std::vector<GivenTensor> given = describe(held);
  fresh.model->accept_weights(given);
  const Device device = fresh.model->device();
  const c10::OptionalDeviceGuard on_device(current_device_for(device));
  progress_ = 0.0;
  fresh.runner = std::make_unique<GraphRunner>(fresh.model->build_graph(), fresh.model->input_rows(), device);
  fresh.runner->bind_weights(views_of(given));
  PackStore store(fresh.model->packed_weight_folder());
  pack_weights(*fresh.runner, held, store, [this](double part) { progress_ = part; });
  fresh.packed_files_read = store.files_read();
  fresh.packed_files_written = store.files_written();
  fresh.arena = std::make_unique<TensorArena>(device);
  fresh.weights = std::move(held);
  bind_caches(fresh);
  return fresh;
}

int64_t ModelObject::set_kv_cache(const std::vector<at::Tensor>& keys,
                                  const std::vector<at::Tensor>& values) {
  return guarded("set_kv_cache", [&]() -> int64_t {
    settle_last_step();
    Model& target = model();
    const auto expected = static_cast<size_t>(target.cache_count());
    check(keys.size() == expected && values.size() == expected, "set_kv_cache takes ", expected, " key and ",
          expected, " value caches, got ", keys.size(), " and ", values.size());
    const std::vector<GivenTensor> given_keys = describe(keys);
    const std::vector<GivenTensor> given_values = describe(values);
    if (expected > 0) target.accept_caches(given_keys, given_values);
    state_.keys = keys;
    state_.values = values;
    bind_caches(state_);
    return 0;
  });
}

void ModelObject::bind_caches(State& state) {
  if (!state.runner) return;
  std::vector<TensorView> caches;
  for (size_t layer = 0; layer < state.keys.size(); ++layer) {
    caches.push_back(state.model->cache_view(describe(state.keys[layer])));
    caches.push_back(state.model->cache_view(describe(state.values[layer])));
  }
  state.runner->bind_caches(std::move(caches));
}

Step ModelObject::prepare(const std::vector<at::Tensor>& inputs, const std::string& parameters) {
  Model& target = model();
  if (!state_.runner) fail(ErrorKind::kRuntime, "set_weight must come before execute");
  const bool has_caches = static_cast<int64_t>(state_.keys.size()) == target.cache_count();
  if (!has_caches) fail(ErrorKind::kRuntime, "set_kv_cache must come before execute");
  return target.prepare(describe(inputs), parse_object(parameters, "the parameter of execute"));
}

void ModelObject::run(const Step& step, const std::vector<at::Tensor>& outputs) {
  const std::vector<TensorView> views = views_of(describe(outputs));
  const c10::OptionalDeviceGuard on_device(current_device_for(model().device()));
  const ThreadShare share;
  state_.runner->run(step.inputs, views, step.info, *state_.arena);
}

std::vector<at::Tensor> ModelObject::execute(const std::vector<at::Tensor>& inputs,
                                             const std::string& parameters) {
  return guarded("execute", [&] {
    settle_last_step();
    const Step step = prepare(inputs, parameters);
    std::vector<at::Tensor> outputs;
    for (const TensorDesc& desc : model().output_descs(step.info))
      outputs.push_back(make_tensor(desc, model().device()));
    run(step, outputs);
    keep_in_flight(inputs);  // not the outputs: fresh memory is reused in the order of its stream alone
    return outputs;
  });
}

int64_t ModelObject::execute_out(const std::vector<at::Tensor>& inputs,
                                 const std::vector<at::Tensor>& outputs, const std::string& parameters) {
  return guarded("execute_out", [&]() -> int64_t {
    settle_last_step();
    const Step step = prepare(inputs, parameters);
    const std::vector<TensorDesc> expected = model().output_descs(step.info);
    check(outputs.size() == expected.size(), "execute_out takes ", expected.size(), " output tensors, got ",
          outputs.size());
    for (size_t index = 0; index < outputs.size(); ++index) {
      const GivenTensor given = describe(outputs[index]);
      check(given.view.dims == expected[index].dims && given.view.dtype == expected[index].dtype, "output ",
            index, " must be ", expected[index], ", got ", given.view);
      check_place(given, model().device(), "", "output ", index);
    }
    run(step, outputs);
    keep_in_flight(inputs);
    keep_in_flight(outputs);
    return 0;
  });
}

int64_t ModelObject::settle() {
  return guarded("settle", [&]() -> int64_t {
    settle_last_step();
    return 0;
  });
}

int64_t ModelObject::set_format_to_nz(int64_t slot) {
  return guarded("set_format_to_nz", [&]() -> int64_t {
    settle_last_step();
    const Model& target = model();
    if (!state_.runner) fail(ErrorKind::kRuntime, "set_weight must come before set_format_to_nz");
    check(slot >= 0 && slot < target.weight_count(), "the slot must be in [0, ", target.weight_count(),
          "), got ", slot);
    if (target.device().type != DeviceType::kNpu) {
      fail(ErrorKind::kNotImplemented, "only weights on Ascend have formats, these are on ", target.device());
    }
    const at::Tensor& weight = state_.weights[static_cast<size_t>(slot)];
    check(weight.dim() == 2, "weight ", slot, " must be a matrix to lie in tiles, got ",
          describe(weight).view);
    const int64_t tiles = (weight.size(0) + 15) / 16 * ((weight.size(1) + 15) / 16);
    const auto bytes = static_cast<int64_t>(weight.storage().nbytes()) -
                       weight.storage_offset() * static_cast<int64_t>(weight.element_size());
    check(bytes >= tiles * 256 * static_cast<int64_t>(weight.element_size()), "weight ", slot, ", ",
          describe(weight).view, ", has memory for ", bytes, " bytes: too few for tiles of 16 x 16");
    state_.runner->set_weight_format(static_cast<size_t>(slot), Format::kFractalNz);
    return 0;
  });
}

std::string ModelObject::graph() {
  return guarded("graph", [&] {
    model();
    if (!state_.runner)
      fail(ErrorKind::kRuntime, "set_weight must come before graph: the weights decide the nodes");
    return state_.runner->describe();
  });
}

c10::Dict<std::string, int64_t> ModelObject::counters() {
  return guarded("counters", [&] {
    const Counters counts = state_.runner ? state_.runner->counters() : Counters{};
    c10::Dict<std::string, int64_t> result;
    result.insert("executions", counts.executions);
    result.insert("shape_inferences", counts.shape_inferences);
    result.insert("kernel_setups", counts.kernel_setups);
    result.insert("plans_built", counts.plans_built);
    result.insert("plans_evicted", counts.plans_evicted);
    result.insert("plans", state_.runner ? static_cast<int64_t>(state_.runner->plan_count()) : 0);
    result.insert("arena_allocations", state_.arena ? state_.arena->allocations() : 0);
    result.insert("packed_files_read", state_.packed_files_read);
    result.insert("packed_files_written", state_.packed_files_written);
    result.insert("arena_bytes", state_.arena ? static_cast<int64_t>(state_.arena->bytes()) : 0);
    if (state_.runner) {
      for (const auto& [name, count] : state_.runner->session_counters()) result.insert(name, count);
    }
    return result;
  });
}

std::string ModelObject::weight_spec() {
  return guarded("weight_spec", [&] {
    nlohmann::json specs = nlohmann::json::array();
    for (const WeightSpec& spec : model().weight_specs()) specs.push_back(to_json(spec));
    return specs.dump();
  });
}

}  // namespace modeltorch
