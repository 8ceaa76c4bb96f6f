#pragma once

// What the stand-alone CUDA benchmarks share: device memory, random tensors, the time of a graph.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

void cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

/// Device memory that is never given back before the process ends, apart from reset().
class Pool {
 public:
  void* take(size_t bytes) {
    void* pointer = nullptr;
    cuda(cudaMalloc(&pointer, std::max<size_t>(bytes, 16)));
    taken_.push_back(pointer);
    return pointer;
  }
  void reset() {
    for (void* pointer : taken_) cuda(cudaFree(pointer));
    taken_.clear();
  }

 private:
  std::vector<void*> taken_;
};

Pool pool;

__device__ float hash_uniform(uint64_t i, uint64_t seed) {
  uint64_t z = i + seed * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<float>((z >> 40) & 0xffffff) / 8388608.0f - 1.0f;
}

template <class T>
__global__ void fill(T* to, size_t n, uint64_t seed, float scale, float shift) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    to[i] = T(hash_uniform(i, seed) * scale + shift);
  }
}

template <class T>
T* random(size_t n, float scale = 1, float shift = 0) {
  static uint64_t seed = 1;
  T* to = static_cast<T*>(pool.take(n * sizeof(T)));
  fill<T><<<1024, 256>>>(to, n, ++seed, scale, shift);
  cuda(cudaGetLastError());
  return to;
}

template <class T>
T* upload(const std::vector<T>& values) {
  T* to = static_cast<T*>(pool.take(values.size() * sizeof(T)));
  cuda(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return to;
}

template <class T>
std::vector<T> download(const T* from, size_t n) {
  std::vector<T> values(n);
  cuda(cudaMemcpy(values.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

double relative_error(const std::vector<double>& want, const std::function<float(size_t)>& got) {
  double difference = 0, norm = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    const double e = got(i) - want[i];
    difference += e * e;
    norm += want[i] * want[i];
  }
  const double error = std::sqrt(difference / norm);
  return error == error ? error : INFINITY;
}

/// Median milliseconds of a replay of the graph of `work`.
double time_graph(const std::function<void(cudaStream_t)>& work, int repeats) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cuda(cudaStreamCreate(&stream));
  cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work(stream);
  cuda(cudaStreamEndCapture(stream, &graph));
  cuda(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<float> times;
  cudaEvent_t start, end;
  cuda(cudaEventCreate(&start));
  cuda(cudaEventCreate(&end));
  for (int i = 0; i < repeats + 3; ++i) {
    cuda(cudaEventRecord(start, stream));
    cuda(cudaGraphLaunch(executable, stream));
    cuda(cudaEventRecord(end, stream));
    cuda(cudaEventSynchronize(end));
    float ms;
    cuda(cudaEventElapsedTime(&ms, start, end));
    if (i >= 3) times.push_back(ms);
  }
  cuda(cudaGraphExecDestroy(executable));
  cuda(cudaGraphDestroy(graph));
  cuda(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace
