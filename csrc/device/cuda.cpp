#include "device/cuda.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "core/arithmetic.h"
#include "core/check.h"
#include "core/environment.h"
#include "device/cuda_layers.h"
#include "device/cuda_staging.h"
#include "graph/trace.h"
#include "ops/read_memory.h"

namespace modeltorch {
namespace {

CudaHost installed_host;

const bool registered = register_session(
    DeviceType::kCuda,
    [](Device device) -> std::unique_ptr<DeviceSession> { return std::make_unique<CudaSession>(device); });

size_t output_room(const TensorDesc& desc) {
  return static_cast<size_t>(round_up(static_cast<int64_t>(desc.bytes()), 256));
}

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

CudaSession::CudaSession(Device device) : DeviceSession(device) {}

CudaSession::~CudaSession() {
  // Kernels under way may still write to the fault flags.
  for (const cudaStream_t used : used_) cudaStreamSynchronize(used);
  if (switched_ != nullptr) cudaEventDestroy(switched_);
  if (capture_stream_ != nullptr) cudaStreamDestroy(capture_stream_);
}

void CudaSession::settle() {
  faults_.raise();
}

std::map<std::string, int64_t> CudaSession::counters() const {
  return {{"captures", captures_},
          {"replays", replays_},
          {"captured_graphs", held_.graphs},
          {"joined_layers", joined_layers_},
          {"captured_bytes", held_.bytes + static_cast<int64_t>(output_bytes_)}};
}

bool CudaSession::is_capturing(cudaStream_t stream) const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void CudaSession::follow_current_stream() {
  stream_ = cuda_host().current_stream(device().index);
  // What a caller captures must not wait for what was launched outside of the capture. What comes later must
  // wait for both.
  if (!is_capturing(stream_)) {
    std::erase_if(used_, [&](cudaStream_t used) {
      if (used == stream_) return true;
      if (is_capturing(used)) return false;
      wait_for(used);
      return true;
    });
  }
  if (std::find(used_.begin(), used_.end(), stream_) == used_.end()) used_.push_back(stream_);
}

void CudaSession::wait_for(cudaStream_t other) {
  if (switched_ == nullptr)
    check_cuda(cudaEventCreateWithFlags(&switched_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  check_cuda(cudaEventRecord(switched_, other), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(stream_, switched_, 0), "cudaStreamWaitEvent");
  if (output_) output_->use_on_current_stream();
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

// run_nodes, with the layers among the nodes in one launch if they can be.
void CudaSession::run_layers(Plan& plan, StagedPlan& staged, const StepInfo& step, size_t begin, size_t end,
                             cudaStream_t stream) {
  std::optional<JoinedLayers> layers = join_layers(plan, {.step = &step, .stream = stream}, begin, end);
  joined_layers_ = layers ? static_cast<int64_t>(layers->stack.layers.size()) : 0;
  if (!layers) return run_nodes(plan, step, begin, end, stream);
  run_nodes(plan, step, begin, layers->begin, stream);
  layers->stack.state = staged.layer_state(decode_stack_state_bytes(layers->stack), device(), stream);
  plan.name_errors(layers->begin, [&] { decode_stack(layers->stack, stream); });
  run_nodes(plan, step, layers->end, end, stream);
}

void CudaSession::run(Plan& plan, const StepInfo& step) {
  follow_current_stream();
  if (plan.graph().can_pad) return run_staged(plan, step);
  run_nodes(plan, step, 0, plan.node_count(), stream_);
}

namespace {

// The first node that writes an output: what is launched from there on depends on where the outputs are.
size_t first_output_node(const Graph& graph) {
  for (size_t index = 0; index < graph.nodes.size(); ++index) {
    for (const Value value : graph.nodes[index].outputs) {
      if (graph.values[value.id].kind == ValueKind::kOutput) return index;
    }
  }
  return graph.nodes.size();
}

// The parts of a captured step that are updated.
constexpr size_t kStaging = 0;
constexpr size_t kOutputs = 2;

}  // namespace

void CudaSession::run_staged(Plan& plan, const StepInfo& step) {
  if (!plan.session_state()) plan.session_state() = std::make_unique<StagedPlan>(held_);
  auto& staged = dynamic_cast<StagedPlan&>(*plan.session_state());
  const Bucket& bucket = plan.bucket();
  const StepInfo padded{bucket.tokens, bucket.sequences, bucket.logit_rows, {}};
  const bool one_by_one = tracing() || environment().blocking || is_capturing(stream_);
  staged.stage(plan, padded, device(), stream_);
  plan.set_counts(padded);
  const size_t begin = one_by_one ? 0 : staged.take_gathers(plan, fault(CudaFault::kRow));
  const size_t end = first_output_node(plan.graph());
  const std::vector<Output> outputs = bind_outputs(plan);
  const CudaGraph::Part parts[] = {
      {.launch = [&](cudaStream_t stream) { staged.launch(stream); }},
      // Kernels look at what was staged while those in front of them still run.
      {.launch =
           [&](cudaStream_t stream) {
             if (one_by_one) return run_nodes(plan, padded, begin, end, stream);
             run_layers(plan, staged, padded, begin, end, stream);
           },
       .waits = true},
      {.launch = [&](cudaStream_t stream) { run_nodes(plan, padded, end, plan.node_count(), stream); }},
  };
  if (one_by_one || !replay(plan, staged, parts)) {
    for (const CudaGraph::Part& part : parts) part.launch(stream_);
    if (!one_by_one) capture(plan, staged, parts);  // now that every kernel is loaded
  }
  copy_outputs(plan, outputs);
}

// Lets the nodes write to memory with all rows of the bucket: the caller's, if it has them, else our own.
std::vector<CudaSession::Output> CudaSession::bind_outputs(Plan& plan) {
  std::vector<Output> outputs;
  size_t bytes = 0;
  for (const int32_t value : plan.step_values()) {
    if (plan.graph().values[value].kind != ValueKind::kOutput) continue;
    outputs.push_back({value, plan.view(value)});
    if (plan.view(value).dims != plan.desc(value).dims) bytes += output_room(plan.desc(value));
  }
  if (bytes > output_bytes_) {
    output_.reset();
    output_bytes_ = 0;
    output_ = cuda_host().allocate(bytes, device().index);
    output_bytes_ = bytes;
  }
  size_t offset = 0;
  for (const Output& output : outputs) {
    const TensorDesc& desc = plan.desc(output.value);
    if (output.given.dims == desc.dims) continue;
    plan.view(output.value) = {output_->data() + offset, desc.dtype, desc.dims};
    offset += output_room(desc);
  }
  return outputs;
}

void CudaSession::copy_outputs(Plan& plan, std::span<const Output> outputs) {
  for (const Output& output : outputs) {
    const void* from = plan.view(output.value).data;
    if (from == output.given.data) continue;
    check_cuda(
        cudaMemcpyAsync(output.given.data, from, output.given.bytes(), cudaMemcpyDeviceToDevice, stream_),
        "cudaMemcpyAsync");
  }
}

// Returns false if there is no graph that fits.
bool CudaSession::replay(Plan& plan, StagedPlan& staged, std::span<const CudaGraph::Part> parts) {
  CudaGraph* graph = staged.graph();
  if (graph == nullptr || !graph->update(kStaging, parts[kStaging], capture_stream_)) return false;
  if (staged.exchange_outputs(plan) && !graph->update(kOutputs, parts[kOutputs], capture_stream_))
    return false;
  graph->replay(stream_);
  ++replays_;
  return true;
}

void CudaSession::capture(Plan& plan, StagedPlan& staged, std::span<const CudaGraph::Part> parts) {
  if (capture_stream_ == nullptr)
    check_cuda(cudaStreamCreateWithFlags(&capture_stream_, cudaStreamNonBlocking),
               "cudaStreamCreateWithFlags");
  staged.drop();
  size_t free_before = 0;
  size_t free_after = 0;
  size_t total = 0;
  cudaMemGetInfo(&free_before, &total);
  auto graph = std::make_unique<CudaGraph>(parts, capture_stream_);
  graph->upload(stream_);
  cudaMemGetInfo(&free_after, &total);
  staged.exchange_outputs(plan);
  staged.keep(std::move(graph),
              free_before > free_after ? static_cast<int64_t>(free_before - free_after) : 0);
  ++captures_;
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
  constexpr float kGainOfOverlap = 0.002f;  // ms
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
    // Alone, a launch cannot show what it gains by beginning before the one in front has ended, which is a
    // microsecond or two: the earlier way stays unless a later one is faster by more.
    if (times[kRuns / 2] >= std::min(0.93f * least, least - kGainOfOverlap)) continue;
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
