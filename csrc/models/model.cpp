#include "models/model.h"

#include "core/check.h"

namespace modeltorch {

void fail_place(const GivenTensor& tensor, const std::string& label, Device device, const char* reason) {
  check(tensor.device == device, label, " must be on ", device, reason, ", got ", tensor.view, " on ",
        tensor.device);
  fail(ErrorKind::kValue, label, " must be contiguous, got a ", tensor.layout, " ", tensor.view);
}

}  // namespace modeltorch
