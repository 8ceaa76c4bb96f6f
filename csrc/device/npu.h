#pragma once

#include <acl/acl.h>
#include <atb/atb_infer.h>

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "core/dtype.h"
#include "device/npu_launch.h"
#include "device/worker.h"
#include "graph/plan.h"
#include "graph/session.h"

namespace modeltorch {

/// Device memory of torch_npu's allocator; given back when the last reference goes.
using NpuMemory = std::shared_ptr<void>;

/// What torch_npu does for this floor. csrc/torch/npu_backend.cpp installs it at load.
struct NpuHost {
  aclrtStream (*current_stream)(int device);    ///< of the calling thread; does not wait for the task queue
  void (*drain)(int device);                    ///< waits until the task queue has launched all that is in it
  void (*enqueue)(std::function<void()> task);  ///< puts a task on the task queue; it must not throw
  NpuMemory (*allocate)(size_t bytes, int device, aclrtStream stream);  ///< memory for work on `stream`
  NpuMemory (*upload)(const void* data, size_t bytes, int device);  ///< a copy, ready for the current stream
};

void set_npu_host(const NpuHost& host);
const NpuHost& npu_host();

/// How launches reach the device (ATB_OPERATION_EXECUTE_ASYNC, unless the task queue is off: then always
/// kInline).
enum class NpuLaunchMode {
  kInline,     ///< 0: the caller's thread sets up and launches node by node, after draining the task queue
  kQueued,     ///< 1: the caller's thread sets every node up, then puts all launches on the task queue as one
               ///< task
  kPipelined,  ///< 2: as 1, but a thread of the object sets up, while the queue's thread launches what is
               ///< ready
};

/// One object on Ascend: a context of the vendor's library on the caller's current stream, the memory that
/// its operations ask for, and at most one step whose launches are still under way.
///
/// The stream is read at every step. After a switch the new stream waits, on the device, for what the object
/// launched on the old one. A failure in a queued launch is kept here and thrown by the next settle(), never
/// handed to torch_npu, whose task queue would then stay dead for the process.
class NpuSession final : public DeviceSession {
 public:
  explicit NpuSession(Device device);
  ~NpuSession() override;

  size_t alignment() const override { return 512; }
  void run(Plan& plan, const StepInfo& step) override;
  void settle() override;
  bool pending() const override { return launch_ != nullptr; }

  // For the kernels.
  atb::Context* context() const { return context_; }

  /// At least `bytes` of scratch for one launch. All launches share it, since they follow each other on the
  /// stream.
  uint8_t* workspace(size_t bytes);

  /// The mask of causal attention for a fp16 or bf16 model, [128, 128] or the same in tiles.
  TensorView causal_mask(DType dtype);

  /// The chips that keep weights, caches and masks in tiles and lack bfloat16 and the fused SwiGLU (910,
  /// 310P).
  bool is_first_generation() const { return first_generation_; }

 private:
  void follow_current_stream();
  void run_inline(Plan& plan);
  void run_queued(Plan& plan);
  void run_pipelined(Plan& plan);
  void enqueue_launches(Plan& plan);
  void launch_nodes(Plan& plan, NpuLaunch& launch) const;
  uint8_t* spill(size_t bytes);
  std::optional<Error> finish_launch();

  NpuLaunchMode mode_;
  bool blocking_;
  bool first_generation_;
  atb::Context* context_ = nullptr;
  aclrtStream stream_ = nullptr;
  aclrtEvent switched_ = nullptr;  ///< recorded on the old stream when the caller changes to another
  StepInfo step_;                  ///< of the last run; kernels read its lengths until it is launched
  NodeLaunch node_launch_;
  NpuMemory workspace_;
  size_t workspace_bytes_ = 0;
  std::vector<NpuMemory> outgrown_;  ///< workspaces that launches under way still use
  std::vector<void*>
      spilled_;  ///< workspaces that a pipelined step needed beyond that, from the driver itself
  size_t largest_workspace_ = 0;           ///< that any step asked for
  bool in_pipeline_ = false;               ///< the launches of this step wait for what sets them up
  std::set<const Plan*> pipelined_plans_;  ///< plans that have run before
  std::map<DType, NpuMemory> masks_;
  std::shared_ptr<NpuLaunch> launch_;  ///< the step under way
  std::unique_ptr<Worker> worker_;
};

/// Throws a runtime error that names the call, its code and the driver's message, unless `code` is 0.
void check_acl(int64_t code, const char* call);

}  // namespace modeltorch
