#pragma once

// Declarations of the vendor's library for the build without it; see README.md for what they were written
// from.

#include <acl/acl.h>

#include <cstdint>

#include "atb/svector.h"

namespace atb {

using Status = int;

enum ErrorType : int {
  NO_ERROR = 0,
  ERROR_INVALID_PARAM,
  ERROR_INVALID_GRAPH,
  ERROR_INTERNAL_ERROR,
  ERROR_INVALID_IN_TENSOR_NUM,
  ERROR_INVALID_TENSOR_DIM_NUM,
  ERROR_INVALID_TENSOR_SIZE,
  ERROR_CANN_ERROR,
  ERROR_OUT_OF_DEVICE_MEMORY,
};

constexpr uint64_t MAX_DIM = 8;

struct Dims {
  int64_t dims[MAX_DIM] = {};
  uint64_t dimNum = 0;
};

struct TensorDesc {
  aclDataType dtype = ACL_DT_UNDEFINED;
  aclFormat format = ACL_FORMAT_UNDEFINED;
  Dims shape;
};

struct Tensor {
  TensorDesc desc;
  void* deviceData = nullptr;
  void* hostData = nullptr;
  uint64_t dataSize = 0;
};

struct VariantPack {
  SVector<Tensor> inTensors;
  SVector<Tensor> outTensors;
};

}  // namespace atb
