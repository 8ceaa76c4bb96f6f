// What csrc/device asks of torch_npu: the current stream, the task queue, memory, the chip. Ascend builds
// only.

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <torch_npu/csrc/core/npu/NPUCachingAllocator.h>
#include <torch_npu/csrc/core/npu/NPUFormat.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <string>
#include <utility>

#include "core/check.h"
#include "device/npu.h"
#include "torch/tensors.h"

namespace modeltorch {
namespace {

at::Device torch_device(int device) {
  return {at::kPrivateUse1, static_cast<at::DeviceIndex>(device)};
}

aclrtStream current_stream(int device) {
  return c10_npu::getCurrentNPUStream(static_cast<c10::DeviceIndex>(device)).stream(/*need_empty=*/false);
}

void drain(int device) {
  c10_npu::getCurrentNPUStream(static_cast<c10::DeviceIndex>(device)).stream();
}

void enqueue(std::function<void()> task) {
  at_npu::native::OpCommand command;
  command.Name("modeltorch");
  // A code other than 0 would stop torch_npu's queue for good: the task keeps its errors to itself.
  command.SetCustomHandler([task = std::move(task)]() -> int {
    task();
    return 0;
  });
  command.Run();
}

NpuMemory allocate(size_t bytes, int device, aclrtStream stream) {
  const c10::DeviceGuard guard(torch_device(device));
  try {
    c10_npu::NPUCachingAllocator::NPUAllocator* allocator = c10_npu::NPUCachingAllocator::get();
    return {allocator->raw_alloc_with_stream(bytes, stream),
            [allocator](void* data) { allocator->raw_delete(data); }};
  } catch (const c10::OutOfMemoryError& error) {
    fail(ErrorKind::kRuntime, "no device memory for a workspace of ", bytes,
         " bytes: ", error.what_without_backtrace());
  }
}

NpuMemory upload(const void* data, size_t bytes, int device) {
  const at::Tensor host = at::from_blob(const_cast<void*>(data), {static_cast<int64_t>(bytes)}, at::kByte);
  const auto copy = std::make_shared<at::Tensor>(host.to(torch_device(device)));
  return {copy, copy->data_ptr()};
}

Format format_of(const at::Tensor& tensor) {
  return at_npu::native::get_npu_format(tensor) == ACL_FORMAT_FRACTAL_NZ ? Format::kFractalNz
                                                                         : Format::kPlain;
}

const bool installed = [] {
  set_npu_host({.current_stream = current_stream,
                .drain = drain,
                .enqueue = enqueue,
                .allocate = allocate,
                .upload = upload});
  set_format_reader(format_of);
  return true;
}();

}  // namespace
}  // namespace modeltorch
