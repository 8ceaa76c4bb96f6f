#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "core/tensor_view.h"
#include "graph/operation.h"
#include "graph/packing.h"

namespace modeltorch {

/// The host's knowledge of one step: true counts and lengths, which a plan does not contain.
struct StepInfo {
  int64_t tokens = 0;                     ///< n, rows of the token dimension
  int64_t sequences = 0;                  ///< B
  int64_t logit_rows = 0;                 ///< rows of the returned logits
  std::vector<int32_t> sequence_lengths;  ///< [B], "seqLen" of the call

  int64_t rows(Rows rows) const {
    return rows == Rows::kTokens ? tokens : rows == Rows::kSequences ? sequences : logit_rows;
  }
};

/// Everything a kernel may touch in one run. Views carry the true sizes of the step.
struct KernelArgs {
  std::span<const TensorView* const> inputs;
  std::span<const TensorView* const> outputs;
  void* workspace = nullptr;  ///< as many bytes as the kernel asked for
  void* stream = nullptr;     ///< the caller's current stream; null on the CPU
  const StepInfo* step = nullptr;

  const TensorView& in(size_t index) const { return *inputs[index]; }
  const TensorView& out(size_t index) const { return *outputs[index]; }
};

/// One operation set up on one device for one plan.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual size_t workspace_bytes() const { return 0; }

  /// Work of the host before run() that the device's session may do ahead, or on another thread. Only
  /// sessions of devices whose kernels have such work call it; args are those of the run() that follows.
  virtual void prepare(const KernelArgs&) {}

  virtual void run(const KernelArgs& args) = 0;
};

class DeviceSession;

/// What a kernel is set up from: shapes are those of the bucket, the largest that a run will bring.
struct KernelSetup {
  const Operation& operation;
  const std::vector<TensorDesc>& inputs;
  const std::vector<TensorDesc>& outputs;
  Device device;
  PackedWeightPtr packed =
      nullptr;  ///< stands for the inputs that the packer replaced; their views have no data
  DeviceSession* session = nullptr;  ///< of the runner; it outlives the kernel
};

using KernelFactory = std::unique_ptr<Kernel> (*)(const KernelSetup& setup);

/// Makes a device's kernel for an operation known; called by static objects of the device's files.
bool register_kernel(std::string_view operation, DeviceType device, KernelFactory factory);

/// The factory for (operation, device), or null where the device has no such kernel.
KernelFactory find_kernel(std::string_view operation, DeviceType device);

}  // namespace modeltorch
