#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>

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
  void tell_stream();

  Device device_;
  at::Tensor memory_;
  size_t bytes_ = 0;
  int64_t allocations_ = 0;
  std::optional<c10::Stream> stream_;  ///< the last one that the allocator knows to use the memory
};

}  // namespace modeltorch
