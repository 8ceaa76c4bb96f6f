// What csrc/device asks of torch on CUDA: the current stream and memory. CUDA builds only. Everything goes
// through torch's device-neutral interfaces, so that nothing of torch's CUDA libraries is linked.

#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <memory>

#include "core/check.h"
#include "device/cuda.h"
#include "torch/tensors.h"

namespace modeltorch {
namespace {

c10::Stream torch_stream(Device device) {
  return c10::impl::VirtualGuardImpl(at::kCUDA).getStream(torch_device_of(device));
}

cudaStream_t current_stream(int device) {
  return static_cast<cudaStream_t>(torch_stream({DeviceType::kCuda, device}).native_handle());
}

class TensorMemory final : public CudaMemory {
 public:
  TensorMemory(size_t bytes, Device device)
      : device_(device), tensor_(make_tensor({DType::kUInt8, {static_cast<int64_t>(bytes)}}, device)) {}

  std::byte* data() const override { return static_cast<std::byte*>(tensor_.data_ptr()); }

  void use_on_current_stream() override {
    c10::impl::VirtualGuardImpl(at::kCUDA).recordDataPtrOnStream(tensor_.storage().data_ptr(),
                                                                 torch_stream(device_));
  }

 private:
  Device device_;
  at::Tensor tensor_;
};

CudaMemoryPtr allocate(size_t bytes, int device) {
  try {
    return std::make_unique<TensorMemory>(bytes, Device{DeviceType::kCuda, device});
  } catch (const c10::OutOfMemoryError& error) {
    fail(ErrorKind::kRuntime, "no device memory for ", bytes, " bytes: ", error.what_without_backtrace());
  }
}

const bool installed = [] {
  set_cuda_host({.current_stream = current_stream, .allocate = allocate});
  return true;
}();

}  // namespace
}  // namespace modeltorch
