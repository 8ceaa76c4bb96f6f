#include "torch/tensor_arena.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include "torch/tensors.h"

namespace modeltorch {

std::byte* TensorArena::reserve(size_t bytes) {
  if (bytes > bytes_ || !memory_.defined()) {
    memory_.reset();  // gives the old memory back first: it is scratch, and both at once may not fit
    bytes_ = 0;
    memory_ = make_tensor({DType::kUInt8, {static_cast<int64_t>(bytes)}}, device_);
    bytes_ = bytes;
    stream_.reset();
    ++allocations_;
  }
  if (current_device_for(device_)) tell_stream();
  return static_cast<std::byte*>(memory_.data_ptr());
}

// Freed memory goes to work that comes later on the stream it was allocated for. Where the caller has changed
// to another stream, the allocator must wait for that one too.
void TensorArena::tell_stream() {
  const at::Device device = torch_device_of(device_);
  const c10::Stream current = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  if (stream_ && *stream_ != current) {
    c10::impl::VirtualGuardImpl(device.type()).recordDataPtrOnStream(memory_.storage().data_ptr(), current);
  }
  stream_ = current;
}

}  // namespace modeltorch
