#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "graph/graph.h"
#include "graph/plan.h"
#include "graph/session.h"

namespace modeltorch {

/// Memory for intermediates, as large as the largest plan of an object.
class Arena {
 public:
  virtual ~Arena() = default;

  /// Returns at least `bytes` of device memory; the former memory may be dropped. Allocates only to grow.
  virtual std::byte* reserve(size_t bytes) = 0;
};

/// What a runner has done; tests read it to prove what a step does not do.
struct Counters {
  int64_t executions = 0;
  int64_t shape_inferences = 0;  ///< nodes whose infer_shape ran
  int64_t kernel_setups = 0;
  int64_t plans_built = 0;
  int64_t plans_evicted = 0;
};

/// Runs one graph on one device: keeps its plans, binds its tensors.
class GraphRunner {
 public:
  static constexpr size_t kMaxPlans = 64;

  /// Fuses `graph` for `device`. `input_rows` says which count each input's dimension 0 follows.
  GraphRunner(Graph graph, std::vector<Rows> input_rows, Device device);

  /// Settles; what an earlier step threw and nobody heard becomes a warning.
  ~GraphRunner();

  /// Replaces the weights: plans and packed forms are dropped.
  void bind_weights(std::vector<TensorView> weights);

  /// A node whose weights the device wants packed.
  struct PackRequest {
    size_t node = 0;
    const WeightPacker* packer = nullptr;
    std::vector<int32_t> slots;  ///< the weights that the packed form replaces, in order
  };

  /// What the device wants packed of the bound weights; nodes that only share come last.
  std::vector<PackRequest> pack_requests() const;

  const Operation& operation(size_t node) const { return *graph_.nodes[node].operation; }

  /// Gives a node its packed weights. Views of weights that no other node reads lose their data pointer.
  void bind_packed(const PackRequest& request, PackedWeightPtr packed);

  /// True if some node reads the weight as it is.
  bool reads_weight(int32_t slot) const { return weights_[slot].data != nullptr; }

  /// Says that a weight lies in memory in another format than its tensor told.
  void set_weight_format(size_t slot, Format format);

  /// Replaces the caches; plans stay if no shape or dtype changed.
  void bind_caches(std::vector<TensorView> caches);

  /// One step. Throws Error naming the node; the runner stays usable.
  void run(std::span<const TensorView> inputs, std::span<const TensorView> outputs, const StepInfo& step,
           Arena& arena);

  /// Waits until the last step is launched; throws, once, what went wrong in it (DeviceSession::settle).
  /// Whoever rebinds, frees what a step used or goes away settles first.
  void settle() { session_->settle(); }

  /// True if the inputs and outputs of the last step must stay until settle().
  bool pending() const { return session_->pending(); }

  /// True if some node reads the input.
  bool reads_input(int32_t slot) const;

  const Counters& counters() const { return counters_; }

  /// DeviceSession::counters.
  std::map<std::string, int64_t> session_counters() const { return session_->counters(); }

  size_t plan_count() const { return plans_.size(); }
  std::string describe() const;

 private:
  std::vector<TensorDesc> weight_descs(const Node& node) const;
  bool is_read_unpacked(Value value) const;
  Plan& plan_for(const Bucket& bucket, const Bindings& bindings);

  Graph graph_;
  std::vector<Rows> input_rows_;
  std::unique_ptr<DeviceSession> session_;
  std::vector<TensorView> weights_;
  std::vector<PackedWeightPtr> packed_;  ///< by node
  std::vector<TensorView> caches_;
  int64_t pool_width_ = 0;  ///< the plans were made for
  int64_t version_ = 0;     ///< grows with every binding of weights or caches
  std::list<Plan> plans_;   ///< most recently used first
  Counters counters_;
};

}  // namespace modeltorch
