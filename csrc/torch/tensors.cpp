#include "torch/tensors.h"

#include <ATen/ops/empty.h>

#include "core/check.h"

namespace modeltorch {
namespace {

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kChar:
      return DType::kInt8;
    case at::kByte:
      return DType::kUInt8;
    case at::kInt:
      return DType::kInt32;
    case at::kLong:
      return DType::kInt64;
    case at::kBool:
      return DType::kBool;
    case at::kShort:
      return DType::kInt16;
    case at::kDouble:
      return DType::kFloat64;
    case at::kComplexFloat:
      return DType::kComplex64;
    case at::kComplexDouble:
      return DType::kComplex128;
    default:
      return DType::kOther;
  }
}

at::ScalarType scalar_type_of(DType dtype) {
  constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kChar,
                                       at::kByte,  at::kInt,      at::kLong, at::kBool};
  return kTypes[static_cast<int>(dtype)];
}

Device device_of(const at::Device& device) {
  const int index = device.has_index() ? device.index() : 0;
  if (device.is_cpu()) return {DeviceType::kCpu, 0};
  if (device.is_cuda()) return {DeviceType::kCuda, index};
  if (device.is_privateuseone()) return {DeviceType::kNpu, index};
  return {device.is_meta() ? DeviceType::kMeta : DeviceType::kOther, 0};
}

Format (*installed_format_reader)(const at::Tensor& tensor) = nullptr;

}  // namespace

void set_format_reader(Format (*reader)(const at::Tensor& tensor)) {
  installed_format_reader = reader;
}

at::Device torch_device_of(Device device) {
  if (device.type == DeviceType::kCpu) return at::kCPU;
  const at::DeviceType type = device.type == DeviceType::kCuda ? at::kCUDA : at::kPrivateUse1;
  return {type, static_cast<at::DeviceIndex>(device.index)};
}

std::optional<at::Device> current_device_for(Device device) {
  if (device.type != DeviceType::kCuda && device.type != DeviceType::kNpu) return std::nullopt;
  return torch_device_of(device);
}

GivenTensor describe(const at::Tensor& tensor) {
  check(tensor.defined(), "expected a tensor, got an undefined one");
  check(!tensor.is_nested(), "expected a tensor, got a nested one");
  GivenTensor given;
  given.device = device_of(tensor.device());
  given.view.dtype = tensor.dim() <= Dims::kMaxRank ? dtype_of(tensor.scalar_type()) : DType::kOther;
  if (tensor.dim() > Dims::kMaxRank) return given;
  for (const int64_t size : tensor.sizes()) given.view.dims.push_back(size);
  if (tensor.layout() != at::kStrided) {
    given.layout = Layout::kSparse;
    return given;
  }
  // A lazy negation or conjugation is not in memory: such a tensor must be copied as a strided one must.
  const bool is_plain = tensor.is_contiguous() && !tensor.is_neg() && !tensor.is_conj();
  given.layout = is_plain ? Layout::kContiguous : Layout::kStrided;
  const bool has_memory = given.device.type != DeviceType::kMeta && given.device.type != DeviceType::kOther;
  if (has_memory) given.view.data = tensor.data_ptr();
  if (given.device.type == DeviceType::kNpu && installed_format_reader != nullptr) {
    given.view.format = installed_format_reader(tensor);
  }
  return given;
}

std::vector<GivenTensor> describe(const std::vector<at::Tensor>& tensors) {
  std::vector<GivenTensor> given;
  given.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) given.push_back(describe(tensor));
  return given;
}

std::vector<TensorView> views_of(const std::vector<GivenTensor>& given) {
  std::vector<TensorView> views;
  views.reserve(given.size());
  for (const GivenTensor& tensor : given) views.push_back(tensor.view);
  return views;
}

at::Tensor make_tensor(const TensorDesc& desc, Device device) {
  const at::TensorOptions options =
      at::TensorOptions(scalar_type_of(desc.dtype)).device(torch_device_of(device));
  return at::empty({desc.dims.begin(), static_cast<size_t>(desc.dims.rank())}, options);
}

}  // namespace modeltorch
