#include "vendor/host_operation.h"

#include <atb/utils.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "driver/host_driver.h"
#include "graph/kernel.h"

namespace ascend_host {
namespace {

using modeltorch::Dims;
using modeltorch::DType;
using modeltorch::Format;
using modeltorch::TensorView;

constexpr uintptr_t kTensorAlignment = 32;
constexpr uintptr_t kWorkspaceAlignment = 512;
constexpr int kScratch = 0xee;

bool dtype_of(aclDataType dtype, DType& ours) {
  switch (dtype) {
    case ACL_FLOAT16:
      ours = DType::kFloat16;
      return true;
    case ACL_BF16:
      ours = DType::kBFloat16;
      return true;
    case ACL_INT32:
      ours = DType::kInt32;
      return true;
    case ACL_INT64:
      ours = DType::kInt64;
      return true;
    default:
      return false;
  }
}

// Says what is wrong with a tensor, or turns it into a view.
std::string view_of(const atb::Tensor& tensor, TensorView& view) {
  if (!dtype_of(tensor.desc.dtype, view.dtype)) return "a data type that no operation takes";
  if (tensor.desc.format != ACL_FORMAT_ND && tensor.desc.format != ACL_FORMAT_FRACTAL_NZ)
    return "an unknown format";
  if (tensor.desc.shape.dimNum == 0 || tensor.desc.shape.dimNum > atb::MAX_DIM)
    return "a wrong number of dimensions";
  for (uint64_t axis = 0; axis < tensor.desc.shape.dimNum; ++axis) {
    if (tensor.desc.shape.dims[axis] <= 0) return "an empty dimension";
    view.dims.push_back(tensor.desc.shape.dims[axis]);
  }
  if (tensor.dataSize != atb::Utils::GetTensorSize(tensor)) return "a dataSize unlike its shape";
  if (tensor.deviceData == nullptr) return "no device data";
  if (reinterpret_cast<uintptr_t>(tensor.deviceData) % kTensorAlignment != 0) return "an unaligned address";
  view.data = tensor.deviceData;
  view.format = tensor.desc.format == ACL_FORMAT_FRACTAL_NZ ? Format::kFractalNz : Format::kPlain;
  return "";
}

std::string views_of(const atb::SVector<atb::Tensor>& tensors, std::vector<TensorView>& views) {
  for (const atb::Tensor& tensor : tensors) {
    TensorView view;
    const std::string fault = view_of(tensor, view);
    if (!fault.empty()) return "tensor " + std::to_string(views.size()) + " has " + fault;
    views.push_back(view);
  }
  return "";
}

bool same(const atb::SVector<atb::Tensor>& a, const atb::SVector<atb::Tensor>& b) {
  if (a.size() != b.size()) return false;
  for (size_t index = 0; index < a.size(); ++index) {
    const atb::Tensor& x = a.at(index);
    const atb::Tensor& y = b.at(index);
    if (x.deviceData != y.deviceData || x.dataSize != y.dataSize || x.desc.dtype != y.desc.dtype ||
        x.desc.format != y.desc.format || x.desc.shape.dimNum != y.desc.shape.dimNum ||
        std::memcmp(x.desc.shape.dims, y.desc.shape.dims, sizeof(x.desc.shape.dims)) != 0) {
      return false;
    }
  }
  return true;
}

// What the operation asks for: it depends on the sizes of what it makes, so that a workspace must grow with
// them.
uint64_t workspace_for(const atb::VariantPack& tensors) {
  uint64_t bytes = 512;
  for (const atb::Tensor& output : tensors.outTensors) {
    const bool in_place =
        std::any_of(tensors.inTensors.begin(), tensors.inTensors.end(),
                    [&](const atb::Tensor& input) { return input.deviceData == output.deviceData; });
    if (!in_place) bytes += output.dataSize;
  }
  return bytes;
}

aclError run_kernel(const Behaviour& behaviour, const KernelTensors& tensors, const atb::VariantPack& pack,
                    uint8_t* workspace, uint64_t workspace_bytes) {
  if (const aclError code = take_fault("kernel", ACL_ERROR_RT_AICORE_EXCEPTION)) return code;
  for (const auto* side : {&pack.inTensors, &pack.outTensors}) {
    for (const atb::Tensor& tensor : *side) {
      if (is_device_memory(tensor.deviceData, tensor.dataSize)) continue;
      count("dead_memory");
      return ACL_ERROR_RT_AICORE_EXCEPTION;
    }
  }
  if (!is_device_memory(workspace, workspace_bytes)) {
    count("dead_memory");
    return ACL_ERROR_RT_AICORE_EXCEPTION;
  }
  std::memset(workspace, kScratch, workspace_bytes);
  const std::string fault = behaviour.compute(tensors);
  if (fault.empty()) return ACL_SUCCESS;
  count("kernel_faults");
  std::fprintf(stderr, "ascend_host: %s: %s\n", behaviour.name.c_str(), fault.c_str());
  return ACL_ERROR_RT_AICORE_EXCEPTION;
}

}  // namespace

atb::Status HostOperation::refuse(atb::Status status, const std::string& rule) const {
  count("violations");
  set_message("the stand-in: " + behaviour_->name + ": " + rule);
  return status;
}

atb::Status HostOperation::Setup(const atb::VariantPack& tensors, uint64_t& workspaceSize,
                                 atb::Context* context) {
  is_set_up_ = false;
  wait_while_held("setup");
  if (const aclError code = take_fault("setup", atb::ERROR_INVALID_PARAM)) return code;
  if (context == nullptr) return refuse(atb::ERROR_INVALID_PARAM, "Setup without a context");
  if (tensors.inTensors.size() != behaviour_->inputs || tensors.outTensors.size() != behaviour_->outputs) {
    return refuse(atb::ERROR_INVALID_IN_TENSOR_NUM, "a wrong number of tensors");
  }
  auto kernel_tensors = std::make_shared<KernelTensors>();
  std::string fault = views_of(tensors.inTensors, kernel_tensors->inputs);
  if (fault.empty()) fault = views_of(tensors.outTensors, kernel_tensors->outputs);
  if (!fault.empty()) return refuse(atb::ERROR_INVALID_TENSOR_DIM_NUM, fault);
  for (const atb::Tensor& tensor : tensors.inTensors) {
    const auto* values = static_cast<const int32_t*>(tensor.hostData);
    const int64_t count = values == nullptr ? 0 : tensor.desc.shape.dims[0];
    kernel_tensors->host.emplace_back(values, values + count);
  }
  fault = behaviour_->check(*kernel_tensors);
  if (!fault.empty()) return refuse(atb::ERROR_INVALID_TENSOR_SIZE, fault);
  tensors_ = tensors;
  kernel_tensors_ = std::move(kernel_tensors);
  context_ = context;
  workspaceSize = workspace_bytes_ = workspace_for(tensors);
  is_set_up_ = true;
  count("setups");
  return atb::NO_ERROR;
}

atb::Status HostOperation::Execute(const atb::VariantPack& tensors, uint8_t* workspace,
                                   uint64_t workspaceSize, atb::Context* context) {
  if (!is_set_up_) return refuse(atb::ERROR_INTERNAL_ERROR, "Execute without a Setup before it");
  is_set_up_ = false;
  wait_while_held("execute");
  if (const aclError code = take_fault("execute", atb::ERROR_CANN_ERROR)) return code;
  if (context != context_) return refuse(atb::ERROR_INTERNAL_ERROR, "Execute in another context than Setup");
  if (!same(tensors.inTensors, tensors_.inTensors) || !same(tensors.outTensors, tensors_.outTensors)) {
    return refuse(atb::ERROR_INTERNAL_ERROR, "Execute with other tensors than Setup");
  }
  if (workspaceSize < workspace_bytes_ || workspace == nullptr) {
    return refuse(atb::ERROR_INTERNAL_ERROR, "a workspace smaller than Setup asked for");
  }
  if (reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment != 0) {
    return refuse(atb::ERROR_INTERNAL_ERROR, "an unaligned workspace");
  }
  count("operations");
  count(behaviour_->name);
  enqueue(context->GetExecuteStream(),
          [behaviour = behaviour_, ours = kernel_tensors_, pack = tensors, workspace,
           bytes = workspace_bytes_]() -> aclError {
            return run_kernel(*behaviour, *ours, pack, workspace, bytes);
          });
  return atb::NO_ERROR;
}

void run_on_cpu(const modeltorch::Operation& operation, const std::vector<TensorView>& inputs,
                const std::vector<TensorView>& outputs) {
  std::vector<modeltorch::TensorDesc> input_descs;
  std::vector<modeltorch::TensorDesc> output_descs;
  std::vector<const TensorView*> input_views;
  std::vector<const TensorView*> output_views;
  for (const TensorView& view : inputs) {
    input_descs.push_back({view.dtype, view.dims});
    input_views.push_back(&view);
  }
  for (const TensorView& view : outputs) {
    output_descs.push_back({view.dtype, view.dims});
    output_views.push_back(&view);
  }
  const modeltorch::KernelFactory factory =
      modeltorch::find_kernel(operation.name(), modeltorch::DeviceType::kCpu);
  const auto kernel = factory({operation, input_descs, output_descs, modeltorch::Device{}});
  constexpr std::align_val_t kAlignment{64};
  void* workspace = ::operator new(kernel->workspace_bytes() + 1, kAlignment);
  const modeltorch::StepInfo step;
  kernel->run({input_views, output_views, workspace, nullptr, &step});
  ::operator delete(workspace, kAlignment);
}

namespace {

constexpr int64_t kTile = 16;

// Calls visit(offset in tiles, offset in the row-major copy) for every element of a batch of matrices. A
// tensor that is described by its tiles, [.., rows, 16], has no padding; a matrix that is described by its
// size has.
template <class Visit>
void each_element(const TensorView& view, int64_t rows, int64_t columns, Visit visit) {
  const int64_t matrices = view.dims.count() / (rows * columns);
  const int64_t padded_rows = view.dims.rank() == 4 ? rows : (rows + kTile - 1) / kTile * kTile;
  const int64_t tiled_size = (columns + kTile - 1) / kTile * kTile * padded_rows;
  for (int64_t matrix = 0; matrix < matrices; ++matrix) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t tiled = (column / kTile * padded_rows + row) * kTile + column % kTile;
        visit(matrix * tiled_size + tiled, (matrix * rows + row) * columns + column);
      }
    }
  }
}

}  // namespace

std::vector<std::byte> to_plain(const TensorView& view, int64_t rows, int64_t columns) {
  const size_t element = modeltorch::dtype_size(view.dtype);
  std::vector<std::byte> plain(view.dims.count() * element);
  const auto* tiled = static_cast<const std::byte*>(view.data);
  each_element(view, rows, columns, [&](int64_t from, int64_t to) {
    std::memcpy(plain.data() + to * element, tiled + from * element, element);
  });
  return plain;
}

void from_plain(const std::vector<std::byte>& plain, const TensorView& view, int64_t rows, int64_t columns) {
  const size_t element = modeltorch::dtype_size(view.dtype);
  auto* tiled = static_cast<std::byte*>(view.data);
  each_element(view, rows, columns, [&](int64_t to, int64_t from) {
    std::memcpy(tiled + to * element, plain.data() + from * element, element);
  });
}

}  // namespace ascend_host
