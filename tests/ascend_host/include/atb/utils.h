#pragma once

#include "atb/types.h"

namespace atb {

class Utils {
 public:
  static uint64_t GetTensorSize(const Tensor& tensor);
};

}  // namespace atb
