#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/tensor_view.h"
#include "graph/graph.h"
#include "graph/kernel.h"

namespace modeltorch {

/// How a caller's tensor lies in memory. Kernels take contiguous tensors only.
enum class Layout : uint8_t { kContiguous, kStrided, kSparse };

inline std::ostream& operator<<(std::ostream& out, Layout layout) {
  constexpr const char* kNames[] = {"contiguous", "strided", "sparse"};
  return out << kNames[static_cast<int>(layout)];
}

/// A tensor as a caller hands it over, before anything is known of its fitness.
struct GivenTensor {
  TensorView view;
  Device device;
  Layout layout = Layout::kContiguous;
};

/// Throws that a tensor must be contiguous on `device`. `label` names it; `reason` says why that device.
[[noreturn]] void fail_place(const GivenTensor& tensor, const std::string& label, Device device,
                             const char* reason);

/// Does so unless it is. The parts of the label are only put together on failure.
template <class... Parts>
void check_place(const GivenTensor& tensor, Device device, const char* reason, const Parts&... label) {
  if (tensor.layout == Layout::kContiguous && tensor.device == device) [[likely]]
    return;
  fail_place(tensor, concat(label...), device, reason);
}

/// One size of a weight: a number, or a name for a size that the weights themselves decide ("vocab").
struct WeightDim {
  std::string symbol;
  int64_t size = -1;
};

/// What the weight list must hold in one slot. A loader reads it as data: see weight_spec() of the class.
struct WeightSpec {
  std::string name;  ///< "layers.3.attn.q.weight"
  int64_t slot = 0;  ///< index in the list of set_weight
  std::vector<WeightDim> shape;
  std::string dtype;       ///< "bfloat16", or "float" for the other types that a model may have
  std::string checkpoint;  ///< tensor of a Hugging Face checkpoint, several joined by '+' along dimension 0
  std::string shard;  ///< how tensor parallelism splits it: "none", "heads", "kv_heads", "rows", "columns"
};

/// One call of execute after the door: inputs in the graph's order, counts and lengths.
struct Step {
  StepInfo info;
  std::vector<TensorView> inputs;
};

/// An architecture behind torch.classes.ModelTorch.ModelTorch. One object is one phase (prefill or decode)
/// with one set of parameters; it holds descriptions, never tensors. Derive from it and REGISTER_MODEL to add
/// one.
class Model {
 public:
  virtual ~Model() = default;

  /// A copy. set_weight tries the weights on one, so that the model stays whole if anything throws.
  virtual std::unique_ptr<Model> clone() const = 0;

  /// The name in errors and logs.
  virtual std::string name() const = 0;

  /// Length of the weight list.
  virtual int64_t weight_count() const = 0;

  /// The slots in use, in order of slots. Slots that are not listed are never read.
  virtual std::vector<WeightSpec> weight_specs() const = 0;

  /// Checks the whole list and remembers the sizes that it decides. Throws Error and changes nothing on a
  /// fault.
  virtual void accept_weights(std::span<const GivenTensor> weights) = 0;

  /// A cache that was accepted, under the sizes that the graph knows it by.
  virtual TensorView cache_view(const GivenTensor& given) const { return given.view; }

  /// Number of key caches, and of value caches.
  virtual int64_t cache_count() const = 0;

  /// Checks the caches and remembers their sizes. May come before or after accept_weights.
  virtual void accept_caches(std::span<const GivenTensor> keys, std::span<const GivenTensor> values) = 0;

  /// The folder that the caller lets packed weights be kept in (graph/pack_store.h), or "".
  virtual std::string packed_weight_folder() const { return ""; }

  /// The device that the weights lie on.
  virtual Device device() const = 0;

  /// The step's graph. Weights use the slots of the weight list, caches 2 * layer (key) and 2 * layer + 1
  /// (value).
  virtual Graph build_graph() const = 0;

  /// Which count the first dimension of each graph input follows.
  virtual std::vector<Rows> input_rows() const = 0;

  /// Checks the inputs of one call against its parameters and against each other, and puts them in graph
  /// order.
  virtual Step prepare(std::span<const GivenTensor> inputs, const nlohmann::json& parameters) const = 0;

  /// What execute returns for a step.
  virtual std::vector<TensorDesc> output_descs(const StepInfo& step) const = 0;
};

}  // namespace modeltorch
