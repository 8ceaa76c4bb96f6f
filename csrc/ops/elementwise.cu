#include "ops/elementwise.h"

#include "ops/add.h"
#include "ops/cuda_kernel.cuh"
#include "ops/swiglu.h"

namespace modeltorch {
namespace {

constexpr int kThreads = 256;

// N elements at a time.
template <class T, int N>
struct alignas(N * sizeof(T)) Group {
  T values[N];
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads) add_kernel(const T* a, const T* b, int64_t groups, T* y) {
  using G = Group<T, N>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < groups; at += step) {
    G left = reinterpret_cast<const G*>(a)[at];
    const G right = reinterpret_cast<const G*>(b)[at];
#pragma unroll
    for (int i = 0; i < N; ++i)
      left.values[i] = from_float<T>(to_float(left.values[i]) + to_float(right.values[i]));
    reinterpret_cast<G*>(y)[at] = left;
  }
}

// `size` is counted in groups.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const T* x, const T* residual, int64_t rows, int64_t size, T* y) {
  using G = Group<T, N>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < rows * size; at += step) {
    const int64_t row = at / size;
    const int64_t column = at - row * size;
    G gate = reinterpret_cast<const G*>(x)[row * 2 * size + column];
    const G up = reinterpret_cast<const G*>(x)[row * 2 * size + size + column];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float value = silu(to_float(gate.values[i])) * to_float(up.values[i]);
      if (residual != nullptr) value += to_float(residual[at * N + i]);
      gate.values[i] = from_float<T>(value);
    }
    reinterpret_cast<G*>(y)[at] = gate;
  }
}

class AddCuda final : public CudaKernel<Add> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    const int64_t count = args.in(0).dims.count();
    if (count == 0) return;
    for_type(dtype_, [&](auto type) {
      using T = Pointee<decltype(type)>;
      const auto* a = args.in(0).as<const T>();
      const auto* b = args.in(1).as<const T>();
      auto* y = args.out(0).as<T>();
      constexpr int kSize = Pack<T>::kSize;
      if (packs_fit<T>(count, a, b, y)) {
        add_kernel<T, kSize>
            <<<blocks_for(count / kSize, kThreads, kMostBlocks), kThreads, 0, stream_of(args)>>>(
                a, b, count / kSize, y);
      } else {
        add_kernel<T, 1>
            <<<blocks_for(count, kThreads, kMostBlocks), kThreads, 0, stream_of(args)>>>(a, b, count, y);
      }
      check_launch("Add");
    });
  }

 private:
  static constexpr int64_t kMostBlocks = 4096;
};

class SwiGluCuda final : public CudaKernel<SwiGlu> {
 public:
  using CudaKernel::CudaKernel;

  void run(const KernelArgs& args) override {
    swiglu_rows(dtype_, args.in(0).data, nullptr, args.out(0).dims[0], args.out(0).dims[1], args.out(0).data,
                args.stream);
  }
};

const bool add_registered = register_cuda<Add, AddCuda>();
const bool swiglu_registered = register_cuda<SwiGlu, SwiGluCuda>();

}  // namespace

void swiglu_rows(DType dtype, const void* x, const void* residual, int64_t rows, int64_t size, void* y,
                 void* stream) {
  if (rows * size == 0) return;
  for_type(dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    constexpr int64_t kMostBlocks = 65536;
    constexpr int kSize = Pack<T>::kSize;
    const auto launch = [&](auto kernel, int64_t group) {
      const int64_t groups = rows * size / group;
      kernel<<<blocks_for(groups, kThreads, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(x), static_cast<const T*>(residual), rows, size / group, static_cast<T*>(y));
    };
    if (packs_fit<T>(size, x, y)) {
      launch(swiglu_kernel<T, kSize>, kSize);
    } else {
      launch(swiglu_kernel<T, 1>, 1);
    }
    check_launch("SwiGlu");
  });
}

}  // namespace modeltorch
