#include "torch/tensor_arena.h"

#include "torch/tensors.h"

namespace modeltorch {

std::byte* TensorArena::reserve(size_t bytes) {
  if (bytes > bytes_ || !memory_.defined()) {
    memory_.reset();  // gives the old memory back first: it is scratch, and both at once may not fit
    bytes_ = 0;
    memory_ = make_tensor({DType::kUInt8, {static_cast<int64_t>(bytes)}}, device_);
    bytes_ = bytes;
    ++allocations_;
  }
  return static_cast<std::byte*>(memory_.data_ptr());
}

}  // namespace modeltorch
