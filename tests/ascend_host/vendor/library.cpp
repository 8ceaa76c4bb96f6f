// The library's own functions: contexts and sizes.

#include <atb/atb_infer.h>
#include <atb/utils.h>

#include "driver/host_driver.h"

namespace atb {
namespace {

class HostContext final : public Context {
 public:
  Status SetExecuteStream(aclrtStream stream) override {
    stream_ = stream;
    return NO_ERROR;
  }
  aclrtStream GetExecuteStream() const override { return stream_; }

 private:
  aclrtStream stream_ = nullptr;
};

}  // namespace

Status CreateContext(Context** context) {
  *context = new HostContext;
  ascend_host::count("contexts");
  return NO_ERROR;
}

Status DestroyContext(Context* context) {
  delete context;
  ascend_host::count("contexts", -1);
  return NO_ERROR;
}

Status DestroyOperation(Operation* operation) {
  delete operation;
  return NO_ERROR;
}

uint64_t Utils::GetTensorSize(const Tensor& tensor) {
  const TensorDesc& desc = tensor.desc;
  uint64_t count = 1;
  for (uint64_t axis = 0; axis < desc.shape.dimNum; ++axis) {
    uint64_t size = static_cast<uint64_t>(desc.shape.dims[axis]);
    const bool in_tile = axis + 2 >= desc.shape.dimNum;
    if (desc.format == ACL_FORMAT_FRACTAL_NZ && in_tile && desc.shape.dimNum == 2)
      size = (size + 15) / 16 * 16;
    count *= size;
  }
  return count * aclDataTypeSize(desc.dtype);
}

}  // namespace atb
