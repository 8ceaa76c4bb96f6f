#pragma once

#include <ATen/core/Tensor.h>

#include "core/device.h"
#include "graph/runner.h"

namespace modeltorch {

/// An arena in a tensor of torch's allocator.
class TensorArena final : public Arena {
 public:
  explicit TensorArena(Device device) : device_(device) {}

  std::byte* reserve(size_t bytes) override;

  size_t bytes() const { return bytes_; }
  int64_t allocations() const { return allocations_; }

 private:
  Device device_;
  at::Tensor memory_;
  size_t bytes_ = 0;
  int64_t allocations_ = 0;
};

}  // namespace modeltorch
