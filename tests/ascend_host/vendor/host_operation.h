#pragma once

#include <atb/atb_infer.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/dims.h"
#include "core/dtype.h"
#include "core/tensor_view.h"
#include "graph/operation.h"

namespace ascend_host {

/// What a kernel is given when its turn on the stream comes: the tensors of Execute, and the host data of
/// Setup.
struct KernelTensors {
  std::vector<modeltorch::TensorView> inputs;
  std::vector<modeltorch::TensorView> outputs;
  std::vector<std::vector<int32_t>> host;  ///< by input; empty where Setup saw no host data
};

/// The behaviour of one operation.
struct Behaviour {
  std::string name;
  size_t inputs = 0;
  size_t outputs = 0;
  /// Says what is wrong with the tensors, or nothing. Called by Setup.
  std::function<std::string(const KernelTensors&)> check;
  /// Computes. Called on the stream's thread; what it says is wrong becomes an error of the stream.
  std::function<std::string(const KernelTensors&)> compute;
};

/// An operation that keeps the vendor's rules: every Execute after a Setup of its own with the same tensors
/// and the same context, on a workspace as large as Setup asked for. Each broken rule is counted and refused.
class HostOperation final : public atb::Operation {
 public:
  explicit HostOperation(Behaviour behaviour)
      : behaviour_(std::make_shared<const Behaviour>(std::move(behaviour))) {}

  std::string GetName() const override { return behaviour_->name; }
  atb::Status Setup(const atb::VariantPack& tensors, uint64_t& workspaceSize, atb::Context* context) override;
  atb::Status Execute(const atb::VariantPack& tensors, uint8_t* workspace, uint64_t workspaceSize,
                      atb::Context* context) override;

 private:
  atb::Status refuse(atb::Status status, const std::string& rule) const;

  std::shared_ptr<const Behaviour> behaviour_;
  bool is_set_up_ = false;
  atb::VariantPack tensors_;
  std::shared_ptr<KernelTensors> kernel_tensors_;
  uint64_t workspace_bytes_ = 0;
  atb::Context* context_ = nullptr;
};

/// Runs an operation of ours with its CPU kernel.
void run_on_cpu(const modeltorch::Operation& operation, const std::vector<modeltorch::TensorView>& inputs,
                const std::vector<modeltorch::TensorView>& outputs);

/// A row-major copy of a matrix, or of a batch of them, that may lie in tiles; and the way back.
std::vector<std::byte> to_plain(const modeltorch::TensorView& view, int64_t rows, int64_t columns);
void from_plain(const std::vector<std::byte>& plain, const modeltorch::TensorView& view, int64_t rows,
                int64_t columns);

}  // namespace ascend_host
