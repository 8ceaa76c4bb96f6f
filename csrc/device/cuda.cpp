#include "device/cuda.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "core/check.h"
#include "core/environment.h"
#include "graph/trace.h"
#include "ops/read_memory.h"
#include "ops/stage_rows.h"

namespace modeltorch {
namespace {

CudaHost installed_host;

const bool registered = register_session(
    DeviceType::kCuda,
    [](Device device) -> std::unique_ptr<DeviceSession> { return std::make_unique<CudaSession>(device); });

size_t aligned(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// Frees what a captured graph holds while its launches may still run: the driver waits where it must.
struct GraphDeleter {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
using CudaGraph = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphDeleter>;

}  // namespace

void set_cuda_host(const CudaHost& host) {
  installed_host = host;
}

const CudaHost& cuda_host() {
  return installed_host;
}

CudaSession& cuda_session(const KernelSetup& setup) {
  return dynamic_cast<CudaSession&>(*setup.session);
}

// ---- faults
// ------------------------------------------------------------------------------------------------

CudaFaults::CudaFaults() {
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, kCudaFaultCount * sizeof(int32_t), cudaHostAllocMapped), "cudaHostAlloc");
  on_host_ = static_cast<int32_t*>(memory);
  for (int kind = 0; kind < kCudaFaultCount; ++kind) on_host_[kind] = 0;
  void* device_pointer = nullptr;
  check_cuda(cudaHostGetDevicePointer(&device_pointer, memory, 0), "cudaHostGetDevicePointer");
  on_device_ = static_cast<int32_t*>(device_pointer);
}

CudaFaults::~CudaFaults() {
  cudaFreeHost(const_cast<int32_t*>(on_host_));
}

void CudaFaults::raise() {
  constexpr const char* kNames[kCudaFaultCount] = {
      "an id, a position or another row index is outside its table",
      "a slot is outside the cache",
      "a block of a block table is outside the cache, or a sequence length does not fit its tensor",
  };
  std::string found;
  for (int kind = 0; kind < kCudaFaultCount; ++kind) {
    if (on_host_[kind] == 0) continue;
    on_host_[kind] = 0;
    found += (found.empty() ? "" : "; ") + std::string(kNames[kind]);
  }
  if (found.empty()) return;
  fail(ErrorKind::kValue, "a step of this object brought tensors that cannot be: ", found,
       ". Nothing outside the tensors was touched; what that step returned is not valid "
       "(MODELTORCH_BLOCKING=1 names the node)");
}

// ---- sessions
// ----------------------------------------------------------------------------------------------

// A plan's static inputs and its captured graph.
class CudaSession::StagedPlan final : public Plan::SessionState {
 public:
  explicit StagedPlan(CudaSession& session) : session_(session) {}
  ~StagedPlan() override { drop(); }

  void drop() {
    if (graph) --session_.held_graphs_;
    graph.reset();
    session_.graph_bytes_ -= bytes;
    bytes = 0;
  }

  // What a captured graph holds by address.
  struct Captured {
    int64_t version = -1;
    const void* arena = nullptr;
    const void* inputs = nullptr;
    std::vector<std::pair<const void*, int64_t>> tables;  ///< inputs that no count follows, with their rows
    std::vector<int64_t> widths;

    friend bool operator==(const Captured&, const Captured&) = default;
  };

  CudaMemoryPtr inputs;
  size_t input_bytes = 0;
  std::vector<int64_t> widths;  ///< columns that each staged input has room for
  cudaStream_t stream = nullptr;
  Captured captured;
  CudaGraph graph;
  int64_t bytes = 0;

 private:
  CudaSession& session_;
};

CudaSession::CudaSession(Device device) : DeviceSession(device) {}

CudaSession::~CudaSession() {
  // Kernels under way may still write to the fault flags.
  if (has_stream_) cudaStreamSynchronize(stream_);
  if (switched_ != nullptr) cudaEventDestroy(switched_);
  if (capture_stream_ != nullptr) cudaStreamDestroy(capture_stream_);
}

void CudaSession::settle() {
  faults_.raise();
}

std::map<std::string, int64_t> CudaSession::counters() const {
  return {{"captures", captures_},
          {"replays", replays_},
          {"captured_graphs", held_graphs_},
          {"captured_bytes", graph_bytes_ + static_cast<int64_t>(output_bytes_)}};
}

bool CudaSession::is_capturing(cudaStream_t stream) const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void CudaSession::follow_current_stream() {
  const cudaStream_t current = cuda_host().current_stream(device().index);
  // What a caller captures must not wait for what was launched outside of the capture.
  if (has_stream_ && current != stream_ && !is_capturing(current) && !is_capturing(stream_)) {
    if (switched_ == nullptr)
      check_cuda(cudaEventCreateWithFlags(&switched_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    check_cuda(cudaEventRecord(switched_, stream_), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(current, switched_, 0), "cudaStreamWaitEvent");
    if (output_) output_->use_on_current_stream();
  }
  stream_ = current;
  has_stream_ = true;
}

void CudaSession::run_nodes(Plan& plan, const StepInfo& step, size_t begin, size_t end, cudaStream_t stream) {
  const bool blocking = environment().blocking && !is_capturing(stream);
  const NodeLaunch launch{.step = &step, .stream = stream, .traced = tracing()};
  for (size_t index = begin; index < end; ++index) {
    plan.run_node(index, launch);
    if (!blocking) continue;
    plan.name_errors(index, [&] {
      check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      faults_.raise();
    });
  }
}

void CudaSession::run(Plan& plan, const StepInfo& step) {
  follow_current_stream();
  if (plan.graph().can_pad) return run_staged(plan, step);
  run_nodes(plan, step, 0, plan.node_count(), stream_);
}

namespace {

bool is_staged(const Plan& plan, int32_t value) {
  return plan.graph().values[value].kind == ValueKind::kInput && plan.desc(value).rows != Rows::kFixed;
}

// The first node that writes an output: it and those after it are launched outside of captured graphs.
size_t first_output_node(const Graph& graph) {
  for (size_t index = 0; index < graph.nodes.size(); ++index) {
    for (const Value value : graph.nodes[index].outputs) {
      if (graph.values[value.id].kind == ValueKind::kOutput) return index;
    }
  }
  return graph.nodes.size();
}

}  // namespace

void CudaSession::run_staged(Plan& plan, const StepInfo& step) {
  if (!plan.session_state()) plan.session_state() = std::make_unique<StagedPlan>(*this);
  auto& staged = dynamic_cast<StagedPlan&>(*plan.session_state());
  const Bucket& bucket = plan.bucket();
  StepInfo padded{bucket.tokens, bucket.sequences, bucket.logit_rows, {}};

  // Inputs: room for them, then one launch that copies and pads them.
  StageRows stage;
  size_t bytes = 0;
  size_t index = 0;
  StagedPlan::Captured now{plan.bound_version(), plan.arena(), nullptr, {}, {}};
  for (const int32_t value : plan.step_values()) {
    TensorView& view = plan.view(value);
    if (plan.graph().values[value].kind != ValueKind::kInput) continue;
    if (!is_staged(plan, value)) {
      now.tables.emplace_back(view.data, view.dims[0]);
      continue;
    }
    const int64_t rows = view.dims[0];
    int64_t columns = 1;
    for (int axis = 1; axis < view.dims.rank(); ++axis) columns *= view.dims[axis];
    if (staged.widths.size() <= index) staged.widths.push_back(0);
    int64_t& width = staged.widths[index++];
    if (columns > width) width = view.dims.rank() == 1 ? 1 : std::max(columns, 2 * width);
    const int64_t padded_rows = padded.rows(plan.desc(value).rows);
    const auto unit = static_cast<int64_t>(dtype_size(view.dtype));
    check(stage.count < StageRows::kMaxParts, "a step has at most ", StageRows::kMaxParts,
          " inputs with rows");
    stage.parts[stage.count++] = {.from = view.data,
                                  .to = nullptr,
                                  .offset = bytes,
                                  .rows = rows,
                                  .columns = columns * unit / 2,
                                  .padded_rows = padded_rows,
                                  .padded_columns = width * unit / 2,
                                  .padding = plan.graph().values[value].padding};
    bytes += aligned(static_cast<size_t>(padded_rows * width * unit));
    if (view.dims.rank() == 2) view.dims[1] = width;
    view.dims[0] = padded_rows;
  }
  if (bytes > staged.input_bytes || !staged.inputs) {
    staged.inputs = cuda_host().allocate(bytes, device().index);
    staged.input_bytes = bytes;
  } else if (staged.stream != stream_) {
    staged.inputs->use_on_current_stream();
  }
  staged.stream = stream_;
  index = 0;
  for (const int32_t value : plan.step_values()) {
    if (!is_staged(plan, value)) continue;
    StageRows::Part& part = stage.parts[index++];
    part.to = staged.inputs->data() + part.offset;
    plan.view(value).data = part.to;
  }
  now.inputs = staged.inputs->data();
  now.widths = staged.widths;
  stage_rows(stage, stream_);

  const size_t end = first_output_node(plan.graph());
  const bool one_by_one = tracing() || environment().blocking || is_capturing(stream_);
  plan.set_counts(padded);
  if (one_by_one) {
    run_nodes(plan, padded, 0, end, stream_);
  } else if (staged.graph && now == staged.captured) {
    check_cuda(cudaGraphLaunch(staged.graph.get(), stream_), "cudaGraphLaunch");
    ++replays_;
  } else {
    run_nodes(plan, padded, 0, end, stream_);  // loads every kernel, which a capture must not do
    staged.drop();
    staged.captured = std::move(now);
    capture(plan, staged, padded, end);
  }
  for (const int32_t value : plan.step_values()) {
    if (plan.graph().values[value].kind != ValueKind::kOutput) continue;
    const TensorView given =
        bind_output(plan, value, step.rows(plan.desc(value).rows) == padded.rows(plan.desc(value).rows));
    run_nodes(plan, padded, end, plan.node_count(), stream_);
    copy_output(plan.view(value), given);
  }
}

// Lets the nodes write to memory with all rows of the bucket: the caller's, if it has them, else our own.
TensorView CudaSession::bind_output(Plan& plan, int32_t value, bool is_full) {
  const TensorView given = plan.view(value);
  if (is_full) return given;
  const size_t bytes = plan.desc(value).bytes();
  if (bytes > output_bytes_) {
    output_.reset();
    output_bytes_ = 0;
    output_ = cuda_host().allocate(bytes, device().index);
    output_bytes_ = bytes;
  }
  plan.view(value) = {output_->data(), given.dtype, plan.desc(value).dims};
  return given;
}

void CudaSession::copy_output(const TensorView& from, const TensorView& to) {
  if (from.data == to.data) return;
  check_cuda(cudaMemcpyAsync(to.data, from.data, to.bytes(), cudaMemcpyDeviceToDevice, stream_),
             "cudaMemcpyAsync");
}

void CudaSession::capture(Plan& plan, StagedPlan& staged, const StepInfo& step, size_t end) {
  if (capture_stream_ == nullptr)
    check_cuda(cudaStreamCreateWithFlags(&capture_stream_, cudaStreamNonBlocking),
               "cudaStreamCreateWithFlags");
  size_t free_before = 0;
  size_t free_after = 0;
  size_t total = 0;
  cudaMemGetInfo(&free_before, &total);
  // Relaxed: other threads may allocate meanwhile.
  check_cuda(cudaStreamBeginCapture(capture_stream_, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  cudaGraph_t recorded = nullptr;
  try {
    run_nodes(plan, step, 0, end, capture_stream_);
  } catch (...) {
    cudaStreamEndCapture(capture_stream_, &recorded);
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    cudaGetLastError();
    throw;
  }
  check_cuda(cudaStreamEndCapture(capture_stream_, &recorded), "cudaStreamEndCapture");
  cudaGraphExec_t made = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&made, recorded, 0);
  cudaGraphDestroy(recorded);
  check_cuda(code, "cudaGraphInstantiate");
  staged.graph.reset(made);
  check_cuda(cudaGraphUpload(made, stream_), "cudaGraphUpload");
  cudaMemGetInfo(&free_after, &total);
  staged.bytes = free_before > free_after ? static_cast<int64_t>(free_before - free_after) : 0;
  staged.bytes += static_cast<int64_t>(staged.input_bytes);
  graph_bytes_ += staged.bytes;
  ++captures_;
  ++held_graphs_;
}

// ---- the fastest of several ways --------------------------------------------------------------------------

namespace {

// Events that go away with the measurement.
struct Timer {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;

  Timer() {
    check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end), "cudaEventCreate");
  }
  ~Timer() {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
};

}  // namespace

size_t CudaSession::measure(std::span<const Way> ways, cudaStream_t stream) {
  constexpr size_t kMoreThanCaches = size_t{128} << 20;
  constexpr int kRuns = 5;
  const CudaMemoryPtr scratch = cuda_host().allocate(kMoreThanCaches, device().index);
  check_cuda(cudaMemsetAsync(scratch->data(), 0, kMoreThanCaches, stream), "cudaMemsetAsync");
  const Timer timer;
  size_t best = ways.size() - 1;
  float least = std::numeric_limits<float>::infinity();
  for (size_t way = 0; way < ways.size(); ++way) {
    if (!ways[way](stream)) continue;
    std::array<float, kRuns> times{};
    for (float& time : times) {
      // Read, not written: what must go back to memory would be counted against the way that is measured.
      read_memory(scratch->data(), kMoreThanCaches, stream);
      check_cuda(cudaEventRecord(timer.begin, stream), "cudaEventRecord");
      ways[way](stream);
      check_cuda(cudaEventRecord(timer.end, stream), "cudaEventRecord");
      check_cuda(cudaEventSynchronize(timer.end), "cudaEventSynchronize");
      check_cuda(cudaEventElapsedTime(&time, timer.begin, timer.end), "cudaEventElapsedTime");
    }
    std::sort(times.begin(), times.end());
    // Alone, a launch cannot show what it gains by beginning before the one in front has ended: the earlier
    // way stays unless a later one is clearly faster.
    if (times[kRuns / 2] >= 0.93f * least) continue;
    least = times[kRuns / 2];
    best = way;
  }
  return best;
}

void CudaSession::run_fastest(const std::vector<int64_t>& key, std::span<const Way> ways, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto found = fastest_.find(key);
  size_t first = 0;
  if (found != fastest_.end()) {
    first = found->second;
  } else if (!is_capturing(cuda_stream)) {
    first = fastest_[key] = measure(ways, cuda_stream);
  }
  for (size_t way = first; way < ways.size(); ++way) {
    if (ways[way](stream)) return;
  }
}

}  // namespace modeltorch
