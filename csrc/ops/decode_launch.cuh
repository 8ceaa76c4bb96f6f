#pragma once

// Host side of the decode kernels: what the device is, and launches that the kernel behind may overlap.

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "device/cuda_check.h"

namespace modeltorch {

/// What a launch must know of the current device.
struct DecodeDevice {
  int multiprocessors = 0;
  bool hopper = false;  ///< compute capability 9.0: bulk copies, clusters, programmatic dependent launch
};

/// The current device's properties, asked for once a device.
inline const DecodeDevice& decode_device() {
  constexpr int kMaxDevices = 64;
  static const auto devices = [] {
    struct Table {
      DecodeDevice of[kMaxDevices];
    } table;
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    for (int i = 0; i < count && i < kMaxDevices; ++i) {
      int major = 0, minor = 0;
      check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i),
                 "cudaDeviceGetAttribute");
      check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i),
                 "cudaDeviceGetAttribute");
      check_cuda(cudaDeviceGetAttribute(&table.of[i].multiprocessors, cudaDevAttrMultiProcessorCount, i),
                 "cudaDeviceGetAttribute");
      table.of[i].hopper = major == 9 && minor == 0;
    }
    return table;
  }();
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return devices.of[device < kMaxDevices ? device : 0];
}

/// Lets `kernel` have up to `bytes` of dynamic shared memory, and gives shared memory all of the cache that
/// it can have: kernels that divide it differently cannot share a multiprocessor, so that one that could
/// begin before the other has ended would wait for an empty one.
template <class Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "cudaFuncSetAttribute");
}

/// How a kernel is launched.
struct LaunchShape {
  dim3 grid;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  ///< blocks of a cluster
};

/// Launches `kernel(params...)`. On Hopper it may start before the kernel in front is done.
template <class... Params>
void launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, void* stream, const char* name,
                   const std::type_identity_t<Params>&... params) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (decode_device().hopper) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, params...), name);
}

}  // namespace modeltorch
