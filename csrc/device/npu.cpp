#include "device/npu.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/environment.h"
#include "graph/trace.h"

namespace modeltorch {
namespace {

NpuHost installed_host;

constexpr int64_t kMaskSize = 128;
constexpr int64_t kTileColumns = 16;
constexpr size_t kMaxPipelinedPlans = 256;

NpuLaunchMode chosen_mode() {
  const Environment& env = environment();
  if (env.launch_blocking || !env.task_queue) return NpuLaunchMode::kInline;
  if (env.execute_async.empty() || env.execute_async == "0") return NpuLaunchMode::kInline;
  if (env.execute_async == "1") return NpuLaunchMode::kQueued;
  if (env.execute_async == "2") return NpuLaunchMode::kPipelined;
  fail(ErrorKind::kValue, "ATB_OPERATION_EXECUTE_ASYNC must be 0, 1 or 2, got ", env.execute_async);
}

// The 910 without a suffix number and every 310P.
bool is_first_generation_chip() {
  const char* name = aclrtGetSocName();
  const std::string chip = name == nullptr ? "" : name;
  for (const char* first :
       {"Ascend910PremiumA", "Ascend910ProA", "Ascend910A", "Ascend910ProB", "Ascend910B"}) {
    if (chip == first) return true;
  }
  return chip.starts_with("Ascend310P");
}

// Room to grow, so that the small differences between the steps of a bucket do not allocate.
size_t with_margin(size_t bytes) {
  return (bytes + bytes / 4 + 4095) / 4096 * 4096;
}

void check_npu_dtype(DType dtype) {
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    fail(ErrorKind::kNotImplemented, "Ascend computes in float16 or bfloat16, got ", dtype);
  }
  if (dtype == DType::kBFloat16 && is_first_generation_chip()) {
    fail(ErrorKind::kNotImplemented, "this Ascend chip has no bfloat16: load the model as float16");
  }
}

const bool registered = register_session(
    DeviceType::kNpu,
    [](Device device) -> std::unique_ptr<DeviceSession> { return std::make_unique<NpuSession>(device); },
    {.check_dtype = check_npu_dtype, .has_tiled_caches = is_first_generation_chip});

}  // namespace

void set_npu_host(const NpuHost& host) {
  installed_host = host;
}

const NpuHost& npu_host() {
  return installed_host;
}

void check_acl(int64_t code, const char* call) {
  if (code == ACL_SUCCESS) return;
  const char* message = aclGetRecentErrMsg();
  fail(ErrorKind::kRuntime, call, " returned ", code, message == nullptr || *message == 0 ? "" : ": ",
       message == nullptr ? "" : message);
}

NpuSession::NpuSession(Device device)
    : DeviceSession(device),
      mode_(chosen_mode()),
      blocking_(environment().launch_blocking),
      first_generation_(is_first_generation_chip()) {
  check_acl(atb::CreateContext(&context_), "atb::CreateContext");
}

NpuSession::~NpuSession() {
  worker_.reset();
  if (switched_ != nullptr) {
    // The new stream may not have come to its wait yet.
    aclrtSynchronizeStream(stream_);
    aclrtDestroyEvent(switched_);
  }
  if (context_ != nullptr) atb::DestroyContext(context_);
}

void NpuSession::run(Plan& plan, const StepInfo& step) {
  step_ = step;
  if (mode_ == NpuLaunchMode::kInline) npu_host().drain(device().index);
  follow_current_stream();
  node_launch_ = {.step = &step_, .stream = stream_, .traced = tracing()};
  switch (mode_) {
    case NpuLaunchMode::kInline:
      return run_inline(plan);
    case NpuLaunchMode::kQueued:
      return run_queued(plan);
    case NpuLaunchMode::kPipelined:
      return run_pipelined(plan);
  }
}

void NpuSession::settle() {
  if (!launch_) return;
  const std::optional<Error> error = finish_launch();
  if (error)
    fail(error->kind(), "an earlier step of this object failed after its call had returned: ", error->what());
}

std::optional<Error> NpuSession::finish_launch() {
  std::optional<Error> error = std::exchange(launch_, nullptr)->wait();
  in_pipeline_ = false;
  outgrown_.clear();
  if (spilled_.empty()) return error;
  // Memory from the driver itself must not go back before the device is done with it.
  const int64_t code = aclrtSynchronizeStream(stream_);
  for (void* memory : spilled_) aclrtFree(memory);
  spilled_.clear();
  if (!error && code != ACL_SUCCESS)
    error = Error(ErrorKind::kRuntime, concat("aclrtSynchronizeStream returned ", code));
  return error;
}

void NpuSession::follow_current_stream() {
  const aclrtStream current = npu_host().current_stream(device().index);
  if (stream_ != nullptr && current != stream_) {
    // settle() has seen the launches of the last step, so that the event lies behind them.
    if (switched_ == nullptr)
      check_acl(aclrtCreateEventExWithFlag(&switched_, ACL_EVENT_SYNC), "aclrtCreateEventExWithFlag");
    check_acl(aclrtRecordEvent(switched_, stream_), "aclrtRecordEvent");
    check_acl(aclrtStreamWaitEvent(current, switched_), "aclrtStreamWaitEvent");
    workspace_.reset();  // it was allocated for work on the old stream
    workspace_bytes_ = 0;
  }
  stream_ = current;
  context_->SetExecuteStream(current);
}

void NpuSession::run_inline(Plan& plan) {
  for (size_t index = 0; index < plan.node_count(); ++index) {
    plan.prepare_node(index, node_launch_);
    plan.run_node(index, node_launch_);
    if (blocking_)
      plan.name_errors(index, [&] { check_acl(aclrtSynchronizeStream(stream_), "aclrtSynchronizeStream"); });
  }
  outgrown_.clear();
}

void NpuSession::launch_nodes(Plan& plan, NpuLaunch& launch) const {
  for (size_t index = 0; index < plan.node_count() && launch.wait_prepared(index); ++index) {
    plan.run_node(index, node_launch_);
  }
}

void NpuSession::run_queued(Plan& plan) {
  for (size_t index = 0; index < plan.node_count(); ++index) plan.prepare_node(index, node_launch_);
  launch_ = std::make_shared<NpuLaunch>();
  launch_->set_prepared(plan.node_count());
  enqueue_launches(plan);
}

void NpuSession::run_pipelined(Plan& plan) {
  // The first step of a plan shows how much workspace it needs.
  if (pipelined_plans_.size() > kMaxPipelinedPlans) pipelined_plans_.clear();
  if (pipelined_plans_.insert(&plan).second) return run_queued(plan);
  workspace(largest_workspace_);
  if (!worker_) {
    const int index = device().index;
    worker_ = std::make_unique<Worker>([index] { aclrtSetDevice(index); });
  }
  launch_ = std::make_shared<NpuLaunch>();
  in_pipeline_ = true;
  worker_->post([this, &plan, stage = std::make_shared<NpuStage>(launch_)] {
    stage->run([&](NpuLaunch& launch) {
      for (size_t index = 0; index < plan.node_count(); ++index) {
        plan.prepare_node(index, node_launch_);
        launch.set_prepared(index + 1);
      }
    });
  });
  enqueue_launches(plan);
}

void NpuSession::enqueue_launches(Plan& plan) {
  try {
    npu_host().enqueue([this, &plan, stage = std::make_shared<NpuStage>(launch_)] {
      stage->run([&](NpuLaunch& launch) { launch_nodes(plan, launch); });
    });
  } catch (...) {
    finish_launch();  // this call reports what was thrown; nothing is left for the next
    throw;
  }
  // A queue that has stopped takes a task without a word and drops it at once.
  if (!launch_->dropped()) return;
  const std::optional<Error> error = finish_launch();
  if (error) throw *error;
}

uint8_t* NpuSession::workspace(size_t bytes) {
  largest_workspace_ = std::max(largest_workspace_, bytes);
  if (bytes <= workspace_bytes_) return static_cast<uint8_t*>(workspace_.get());
  if (in_pipeline_) return spill(bytes);
  if (workspace_) outgrown_.push_back(std::move(workspace_));
  workspace_bytes_ = 0;
  workspace_ = npu_host().allocate(with_margin(bytes), device().index, stream_);
  workspace_bytes_ = with_margin(bytes);
  return static_cast<uint8_t*>(workspace_.get());
}

// torch_npu's allocator, when it runs out of memory, waits for the task queue, and the task queue for this
// very node.
uint8_t* NpuSession::spill(size_t bytes) {
  void* memory = nullptr;
  check_acl(aclrtMalloc(&memory, bytes, ACL_MEM_MALLOC_HUGE_FIRST),
            "no device memory for a workspace: aclrtMalloc");
  spilled_.push_back(memory);
  return static_cast<uint8_t*>(memory);
}

TensorView NpuSession::causal_mask(DType dtype) {
  // The older chips take it in tiles of 16 columns, each with all its rows.
  const int64_t tile = first_generation_ ? kTileColumns : kMaskSize;
  NpuMemory& mask = masks_[dtype];
  if (!mask) {
    // What the vendor's attention adds to the scores: minus infinity for fp16; for bf16 a 1, which it scales
    // itself.
    const uint16_t hidden = dtype == DType::kFloat16 ? 0xfc00 : 0x3f80;
    std::array<uint16_t, kMaskSize * kMaskSize> values{};
    for (int64_t row = 0; row < kMaskSize; ++row) {
      for (int64_t column = row + 1; column < kMaskSize; ++column) {
        values[(column / tile * kMaskSize + row) * tile + column % tile] = hidden;
      }
    }
    mask = npu_host().upload(values.data(), sizeof(values), device().index);
  }
  if (!first_generation_) return {mask.get(), dtype, {kMaskSize, kMaskSize}};
  return {mask.get(), dtype, {1, kMaskSize / tile, kMaskSize, tile}, Format::kFractalNz};
}

}  // namespace modeltorch
