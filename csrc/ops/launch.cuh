#pragma once

// What the device is, and launches that the kernel behind may overlap.

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "core/check.h"
#include "device/cuda_check.h"

namespace modeltorch {

/// What a launch must know of a device.
struct CudaDevice {
  int multiprocessors = 0;
  bool hopper = false;  ///< compute capability 9.0: bulk copies, clusters, programmatic dependent launch
};

/// The current device's properties, asked for once a device.
inline const CudaDevice& current_cuda_device() {
  constexpr int kMaxDevices = 64;
  static const auto devices = [] {
    struct Table {
      CudaDevice of[kMaxDevices];
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

/// Kernels that allow_shared_memory has made ready, each on a device, and for how many bytes. Thread-safe. A
/// device that is reset behind its back is not seen.
class ReadyKernels {
 public:
  /// Runs `prepare` unless it has once succeeded for this kernel and the current device.
  template <class Prepare>
  void once(const void* kernel, int bytes, Prepare prepare) {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    if (is_ready({kernel, device}, bytes)) return;
    prepare();  // outside the lock: it may load code, which may wait for the device
    const std::lock_guard lock(mutex_);
    ready_[{kernel, device}] = bytes;
  }

 private:
  using Key = std::pair<const void*, int>;

  bool is_ready(const Key& key, int bytes) {
    const std::lock_guard lock(mutex_);
    const auto found = ready_.find(key);
    if (found == ready_.end()) return false;
    check(found->second == bytes, "a kernel was made ready for ", found->second,
          " bytes of shared memory and is launched with ", bytes);
    return true;
  }

  std::mutex mutex_;
  std::map<Key, int> ready_;
};

inline ReadyKernels& ready_kernels() {
  static ReadyKernels kernels;
  return kernels;
}

/// Lets `kernel` have up to `bytes` of dynamic shared memory, the same in every call, and gives shared memory
/// all of the cache that it can have: kernels that divide it differently cannot share a multiprocessor, so
/// that one that could begin before the other has ended would wait for an empty one. `large_clusters`: of
/// more than eight blocks, on Hopper.
template <class Kernel>
void allow_shared_memory(Kernel kernel, int bytes, bool large_clusters = false) {
  // The driver takes longer over an attribute that is set already than a launch should.
  ready_kernels().once(reinterpret_cast<const void*>(kernel), bytes, [&] {
    const auto set = [&](cudaFuncAttribute attribute, int value) {
      check_cuda(cudaFuncSetAttribute(kernel, attribute, value), "cudaFuncSetAttribute");
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (large_clusters) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  });
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
  if (current_cuda_device().hopper) {
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
