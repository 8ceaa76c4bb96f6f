#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "device/cuda_check.h"
#include "device/cuda_gemm.h"
#include "device/cuda_graph.h"
#include "graph/plan.h"
#include "graph/session.h"

namespace modeltorch {

/// Device memory of torch's allocator.
class CudaMemory {
 public:
  virtual ~CudaMemory() = default;
  virtual std::byte* data() const = 0;

  /// Tells the allocator that work on the current stream uses the memory too.
  virtual void use_on_current_stream() = 0;
};
using CudaMemoryPtr = std::unique_ptr<CudaMemory>;

/// What torch does for this floor. csrc/torch/cuda_backend.cpp installs it at load.
struct CudaHost {
  cudaStream_t (*current_stream)(int device);           ///< of the calling thread
  CudaMemoryPtr (*allocate)(size_t bytes, int device);  ///< memory for work on the current stream
};

void set_cuda_host(const CudaHost& host);
const CudaHost& cuda_host();

/// What a kernel found outside its range, and therefore did not touch. A kernel sets the flag of the kind to
/// something other than 0.
enum class CudaFault : uint8_t {
  kRow,    ///< an id, a position or another row index
  kSlot,   ///< a slot of the cache
  kBlock,  ///< a block of the cache or a sequence length
};
inline constexpr int kCudaFaultCount = 3;

/// Memory of the host that kernels write to as they run: reading it waits for nobody.
class CudaFaults {
 public:
  CudaFaults();
  ~CudaFaults();
  CudaFaults(const CudaFaults&) = delete;
  CudaFaults& operator=(const CudaFaults&) = delete;

  /// The flag for kernels.
  int32_t* flag(CudaFault kind) const { return on_device_ + static_cast<int>(kind); }

  /// Throws, once, if a kernel that has ended by now set a flag.
  void raise();

 private:
  volatile int32_t* on_host_ = nullptr;
  int32_t* on_device_ = nullptr;
};

/// The captured graphs of a session.
struct HeldGraphs {
  int64_t graphs = 0;
  int64_t bytes = 0;  ///< with their static buffers
};

class StagedPlan;

/// One object on a CUDA device: the caller's current stream, the faults that its kernels found, and captured
/// graphs of the plans that can be padded.
///
/// The stream is read at every step. After a switch the new stream waits, on the device, for what the object
/// launched on the old one. A plan whose graph says can_pad runs at the sizes of its bucket, as one captured
/// graph of three parts: a launch that copies the step's inputs into static buffers, pads them and gathers
/// the rows of tables that they name; the nodes, all layers in one launch where that is faster; and those
/// that write outputs, straight into the caller's tensors where these have the bucket's rows. The first part
/// is updated in every step, the last where the outputs are elsewhere than in the step before. Tables,
/// weights and caches are captured by address; a step that brings others captures anew. Under the caller's
/// own capture, a profiler, MODELTORCH_TRACE or MODELTORCH_BLOCKING the same nodes are launched one by one.
class CudaSession final : public DeviceSession {
 public:
  explicit CudaSession(Device device);
  ~CudaSession() override;

  size_t alignment() const override { return 256; }
  void run(Plan& plan, const StepInfo& step) override;
  void settle() override;
  std::map<std::string, int64_t> counters() const override;

  // For the kernels.
  int32_t* fault(CudaFault kind) const { return faults_.flag(kind); }
  CudaGemm& gemm() { return gemm_; }

  /// Several ways to compute the same; the fastest is measured once for each key, on the data at hand, with
  /// caches cold. A way returns false if it cannot do this, having launched nothing; the last one must be
  /// able to. Runs the chosen way.
  using Way = std::function<bool(void* stream)>;
  void run_fastest(const std::vector<int64_t>& key, std::span<const Way> ways, void* stream);

 private:
  // An output of a plan, and the caller's tensor.
  struct Output {
    int32_t value = -1;
    TensorView given;
  };

  void follow_current_stream();
  void wait_for(cudaStream_t other);
  bool is_capturing(cudaStream_t stream) const;
  size_t measure(std::span<const Way> ways, cudaStream_t stream);
  void run_nodes(Plan& plan, const StepInfo& step, size_t begin, size_t end, cudaStream_t stream);
  void run_layers(Plan& plan, StagedPlan& staged, const StepInfo& step, size_t begin, size_t end,
                  cudaStream_t stream);
  void run_staged(Plan& plan, const StepInfo& step);
  std::vector<Output> bind_outputs(Plan& plan);
  void copy_outputs(Plan& plan, std::span<const Output> outputs);
  bool replay(Plan& plan, StagedPlan& staged, std::span<const CudaGraph::Part> parts);
  void capture(Plan& plan, StagedPlan& staged, std::span<const CudaGraph::Part> parts);

  CudaFaults faults_;
  CudaGemm gemm_;
  cudaStream_t stream_ = nullptr;
  std::vector<cudaStream_t> used_;  ///< that a step on another stream waits for
  cudaEvent_t switched_ = nullptr;
  cudaStream_t capture_stream_ = nullptr;
  CudaMemoryPtr
      output_;  ///< of the steps whose outputs have fewer rows than their bucket; shared by all plans
  size_t output_bytes_ = 0;
  std::map<std::vector<int64_t>, size_t> fastest_;  ///< way, by key
  int64_t captures_ = 0;
  int64_t replays_ = 0;
  int64_t joined_layers_ = 0;  ///< that the last captured step has in one launch
  HeldGraphs held_;
};

/// The session that a CUDA kernel is set up for.
CudaSession& cuda_session(const KernelSetup& setup);

}  // namespace modeltorch
