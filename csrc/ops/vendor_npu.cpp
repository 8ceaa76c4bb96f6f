#include "ops/vendor_npu.h"

#include <atb/utils.h>

#include <string>
#include <utility>

namespace modeltorch {
namespace {

// What the device's copies need of an address.
constexpr uintptr_t kAddressAlignment = 32;

aclDataType vendor_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return ACL_FLOAT16;
    case DType::kBFloat16:
      return ACL_BF16;
    case DType::kFloat32:
      return ACL_FLOAT;
    case DType::kInt32:
      return ACL_INT32;
    case DType::kInt64:
      return ACL_INT64;
    default:
      fail(ErrorKind::kNotImplemented, "the vendor's operations are not given ", dtype);
  }
}

// The element type that an operation computes in: that of its first output, or of its first input if it has
// none.
DType compute_dtype(const KernelSetup& setup) {
  const DType dtype = setup.outputs.empty() ? setup.inputs[0].dtype : setup.outputs[0].dtype;
  check_dtype(DeviceType::kNpu, dtype);
  return dtype;
}

bool has_empty_tensor(const KernelArgs& args) {
  for (const TensorView* view : args.inputs) {
    if (view->dims.count() == 0) return true;
  }
  for (const TensorView* view : args.outputs) {
    if (view->dims.count() == 0) return true;
  }
  return false;
}

std::string describe(const atb::Tensor& tensor) {
  std::string text;
  for (const auto& [dtype, name] : {std::pair{ACL_FLOAT16, "float16"}, std::pair{ACL_BF16, "bfloat16"},
                                    std::pair{ACL_INT32, "int32"}, std::pair{ACL_INT64, "int64"}}) {
    if (tensor.desc.dtype == dtype) text = name;
  }
  for (uint64_t axis = 0; axis < tensor.desc.shape.dimNum; ++axis) {
    text += (axis == 0 ? "[" : ", ") + std::to_string(tensor.desc.shape.dims[axis]);
  }
  return text + (tensor.desc.format == ACL_FORMAT_FRACTAL_NZ ? "] in tiles" : "]");
}

std::string describe(const std::vector<atb::Tensor>& tensors) {
  std::string text;
  for (const atb::Tensor& tensor : tensors) text += (text.empty() ? "" : ", ") + describe(tensor);
  return text;
}

}  // namespace

NpuKernel::NpuKernel(const KernelSetup& setup)
    : session_(dynamic_cast<NpuSession&>(*setup.session)), dtype_(compute_dtype(setup)) {}

void NpuKernel::prepare(const KernelArgs& args) {
  empty_ = has_empty_tensor(args);
  if (empty_) return;
  bind(args);
  for (Call& call : calls_) {
    call.workspace_bytes = 0;
    const int64_t status = call.operation->Setup(call.tensors, call.workspace_bytes, session_.context());
    if (status != 0) fail_at(call, "Setup", status);
    call.workspace = call.workspace_bytes == 0 ? nullptr : session_.workspace(call.workspace_bytes);
  }
}

void NpuKernel::run(const KernelArgs&) {
  if (empty_) return;
  for (Call& call : calls_) {
    const int64_t status =
        call.operation->Execute(call.tensors, call.workspace, call.workspace_bytes, session_.context());
    if (status != 0) fail_at(call, "Execute", status);
  }
}

void NpuKernel::fail_at(const Call& call, const char* function, int64_t status) {
  const char* message = aclGetRecentErrMsg();
  fail(ErrorKind::kRuntime, call.operation->GetName(), ": the vendor's ", function, " returned ", status,
       " for (", describe(call.inputs), ") -> (", describe(call.outputs), ")",
       message == nullptr || *message == 0 ? "" : ": ", message == nullptr ? "" : message);
}

void NpuKernel::set(size_t index, std::initializer_list<atb::Tensor> inputs,
                    std::initializer_list<atb::Tensor> outputs) {
  Call& call = calls_[index];
  call.inputs = inputs;
  call.outputs = outputs;
  call.tensors = {};
  for (const atb::Tensor& tensor : inputs) call.tensors.inTensors.push_back(tensor);
  for (const atb::Tensor& tensor : outputs) call.tensors.outTensors.push_back(tensor);
}

atb::Tensor vendor_tensor(const TensorView& view, const Dims& dims) {
  check(reinterpret_cast<uintptr_t>(view.data) % kAddressAlignment == 0, "tensor ", view,
        " must begin at a multiple of ", kAddressAlignment, " bytes: pass a copy instead of a slice");
  atb::Tensor tensor;
  tensor.desc.dtype = vendor_dtype(view.dtype);
  tensor.desc.format = view.format == Format::kFractalNz ? ACL_FORMAT_FRACTAL_NZ : ACL_FORMAT_ND;
  tensor.desc.shape.dimNum = static_cast<uint64_t>(dims.rank());
  for (int axis = 0; axis < dims.rank(); ++axis) tensor.desc.shape.dims[axis] = dims[axis];
  tensor.deviceData = view.data;
  tensor.dataSize = atb::Utils::GetTensorSize(tensor);
  return tensor;
}

atb::Tensor vendor_tensor(const TensorView& view) {
  return vendor_tensor(view, view.dims);
}

atb::Tensor vendor_cache(const TensorView& view, const NpuSession& session) {
  if (!session.is_first_generation()) return vendor_tensor(view);
  constexpr int64_t kTile = 16;
  const int64_t row = view.dims[2] * view.dims[3];
  check(row % kTile == 0, "on this Ascend chip kv_heads * head_size must be a multiple of ", kTile,
        ", got a cache ", view);
  TensorView tiled = view;
  tiled.format = Format::kFractalNz;
  return vendor_tensor(tiled, {view.dims[0], row / kTile, view.dims[1], kTile});
}

atb::Tensor vendor_lengths(const TensorView& view, const KernelArgs& args) {
  const std::vector<int32_t>& lengths = args.step->sequence_lengths;
  if (static_cast<int64_t>(lengths.size()) != view.dims[0]) {
    fail(ErrorKind::kNotImplemented,
         "attention on Ascend needs the sequence lengths on the host, as execute gets them");
  }
  atb::Tensor tensor = vendor_tensor(view);
  tensor.hostData = const_cast<int32_t*>(lengths.data());
  return tensor;
}

}  // namespace modeltorch
