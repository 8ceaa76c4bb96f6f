#pragma once

#include <cuda_runtime_api.h>

#include "core/check.h"

namespace modeltorch {

/// Throws a runtime error that names the call and what the driver says of it, unless `code` is 0.
inline void check_cuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // an error that is no longer news must not be found by the next check
  fail(ErrorKind::kRuntime, call, ": ", cudaGetErrorString(code));
}

}  // namespace modeltorch
