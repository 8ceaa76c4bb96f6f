// Checks prefill_attention against float64 on awkward shapes and times it, without torch. Build and run:
//   nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a benchmarks/cuda/prefill_kernels.cu
//        csrc/ops/prefill_attention.cu -o prefill_kernels && ./prefill_kernels check time
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/check.h"
#include "ops/prefill_attention.h"

namespace {

using modeltorch::DType;
using modeltorch::PrefillAttention;

void require(cudaError_t status) {
  if (status != cudaSuccess) {
    std::printf("CUDA: %s\n", cudaGetErrorString(status));
    std::exit(1);
  }
}

template <class T>
struct Array {
  T* data = nullptr;
  explicit Array(size_t count) { require(cudaMalloc(&data, count * sizeof(T))); }
  explicit Array(const std::vector<T>& host) : Array(host.size()) {
    require(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data); }
};

/// Pseudo random values, about normal, in every element.
template <class T>
__global__ void fill(T* data, size_t count, uint64_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint64_t z = seed + i * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float a = (z & 0xffff) / 65536.0f, b = (z >> 16 & 0xffff) / 65536.0f,
                c = (z >> 32 & 0xffff) / 65536.0f;
    data[i] = static_cast<T>((a + b + c - 1.5f) * 2.0f * scale);
  }
}

/// One block for one row of one head, in float64; `starts` is the first row of each row's sequence.
template <class T>
__global__ void reference(const T* q, int64_t qs, const T* k, int64_t ks, const T* v, int64_t vs,
                          const int* starts, int group, int head_size, double scale, double* y) {
  extern __shared__ double weights[];
  __shared__ double shared_sum;
  const int row = blockIdx.x, head = blockIdx.y, start = starts[row], count = row - start + 1;
  const int column = head / group * head_size;
  for (int j = threadIdx.x; j < count; j += blockDim.x) {
    double score = 0;
    for (int d = 0; d < head_size; ++d) {
      score +=
          double(float(q[row * qs + head * head_size + d])) * double(float(k[(start + j) * ks + column + d]));
    }
    weights[j] = score * scale;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double top = weights[0], sum = 0;
    for (int j = 1; j < count; ++j) top = fmax(top, weights[j]);
    for (int j = 0; j < count; ++j) sum += weights[j] = exp(weights[j] - top);
    shared_sum = sum;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < head_size; d += blockDim.x) {
    double out = 0;
    for (int j = 0; j < count; ++j) out += weights[j] * double(float(v[(start + j) * vs + column + d]));
    y[(int64_t{row} * gridDim.y + head) * head_size + d] = out / shared_sum;
  }
}

struct Case {
  std::vector<int> lengths;
  int heads, kv_heads, head_size;
  int spare = 0;  ///< rows of the bucket beyond the sum
};

/// Relative error of one case; the spare rows must keep their poison and NaN in spare keys must not leak.
template <class T>
double error_of(const Case& c, DType dtype, float spread) {
  std::vector<int> starts;
  int sum = 0;
  for (const int length : c.lengths) {
    starts.insert(starts.end(), length, sum);
    sum += length;
  }
  const int64_t tokens = sum + c.spare, hd = c.head_size, width = (c.heads + 2 * c.kv_heads) * hd + 8;
  Array<T> qkv(tokens * width), y(tokens * c.heads * hd);
  Array<double> exact(size_t(sum) * c.heads * hd);
  Array<int> start(starts), lengths(c.lengths);
  fill<<<1024, 256>>>(qkv.data, size_t(sum) * width, 77 + sum, spread);
  require(cudaMemset(qkv.data + sum * width, 0xff, c.spare * width * sizeof(T)));  // NaN
  require(cudaMemset(y.data, 0x7f, tokens * c.heads * hd * sizeof(T)));
  PrefillAttention a{dtype, tokens, int64_t(c.lengths.size()), c.heads, c.kv_heads, c.head_size};
  a.scale = 1.0f / std::sqrt(float(hd));
  a.q = qkv.data, a.k = qkv.data + c.heads * hd, a.v = qkv.data + (c.heads + c.kv_heads) * hd;
  a.q_stride = a.k_stride = a.v_stride = width;
  a.seq_len = lengths.data, a.y = y.data;
  if (!prefill_attention_fits(a)) return -1;
  modeltorch::prefill_attention(a, nullptr);
  require(cudaDeviceSynchronize());
  const int longest = *std::max_element(c.lengths.begin(), c.lengths.end());
  require(cudaFuncSetAttribute(reference<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, 200000));
  reference<T><<<dim3(sum, c.heads), 128, longest * 8>>>(
      qkv.data, width, qkv.data + c.heads * hd, width, qkv.data + (c.heads + c.kv_heads) * hd, width,
      start.data, c.heads / c.kv_heads, hd, a.scale, exact.data);
  require(cudaDeviceSynchronize());
  std::vector<T> got(tokens * c.heads * hd);
  std::vector<double> want(size_t(sum) * c.heads * hd);
  require(cudaMemcpy(got.data(), y.data, got.size() * sizeof(T), cudaMemcpyDeviceToHost));
  require(cudaMemcpy(want.data(), exact.data, want.size() * 8, cudaMemcpyDeviceToHost));
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = double(float(got[i])) - want[i];
    difference += d * d, norm += want[i] * want[i];
  }
  for (size_t i = want.size(); i < got.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, &got[i], 2);
    if (bits != 0x7f7f) return NAN;
  }
  return std::sqrt(difference / norm);
}

int check_all(bool deep) {
  std::vector<Case> cases;
  for (const int head_size : {64, 80, 96, 128, 256}) {
    for (const int length : {1, 63, 64, 65, 127, 128, 129, 300}) {
      cases.push_back({{length}, 14, 2, head_size, 5});
      cases.push_back({{length, 3, 0, length}, 2, 1, head_size, 200});
    }
    std::vector<int> many;
    for (int i = 0; i < 70; ++i) many.push_back(1 + i * 37 % 211);
    cases.push_back({many, 7, 1, head_size, 0});
    cases.push_back({{1000, 20, 517}, 4, 4, head_size, 31});
    if (deep) cases.push_back({{2500}, 28, 4, head_size, 60});
  }
  int bad = 0;
  double worst = 0;
  for (const Case& c : cases) {
    for (const float spread : {1.0f, 4.0f}) {  // 4: peaked weights, scores up to some hundreds
      const double bf16 = error_of<__nv_bfloat16>(c, DType::kBFloat16, spread);
      const double fp16 = error_of<__half>(c, DType::kFloat16, spread);
      worst = std::max({worst, bf16, fp16 * 8});
      if (!(bf16 >= 0 && bf16 < 4e-3 && fp16 >= 0 && fp16 < 5e-4)) {
        ++bad;
        std::printf(
            "BAD head_size %d heads %d/%d sequences %zu first length %d spread %g: bf16 %.2e fp16 %.2e\n",
            c.head_size, c.heads, c.kv_heads, c.lengths.size(), c.lengths[0], spread, bf16, fp16);
      }
    }
  }
  std::printf("%zu cases, %d bad, worst error %.2e (bf16)\n", cases.size() * 2, bad, worst);
  return bad;
}

/// Median microseconds of one launch, over buffers that rotate.
template <class F>
double time_of(F run) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < 3; ++i) run(i);
  for (int sample = 0; sample < 9; ++sample) {
    const int repeat = 8;
    require(cudaEventRecord(begin));
    for (int i = 0; i < repeat; ++i) run(i);
    require(cudaEventRecord(end));
    require(cudaEventSynchronize(end));
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms * 1000 / repeat);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void time_case(const char* name, const Case& c) {
  using T = __nv_bfloat16;
  const int kCopies = 4;
  int64_t tokens = 0;
  double flops = 0;
  for (const int length : c.lengths) {
    tokens += length;
    flops += 2.0 * length * length * c.heads * c.head_size;
  }
  const int64_t hd = c.head_size, width = (c.heads + 2 * c.kv_heads) * hd;
  Array<T> qkv(tokens * width * kCopies), y(tokens * c.heads * hd * kCopies);
  Array<int> lengths(c.lengths);
  fill<<<1024, 256>>>(qkv.data, size_t(tokens * width * kCopies), 5, 1.0f);
  const double us = time_of([&](int i) {
    T* const at = qkv.data + i % kCopies * tokens * width;
    PrefillAttention a{DType::kBFloat16, tokens, int64_t(c.lengths.size()), c.heads, c.kv_heads, c.head_size};
    a.scale = 1.0f / std::sqrt(float(hd));
    a.q = at, a.k = at + c.heads * hd, a.v = at + (c.heads + c.kv_heads) * hd;
    a.q_stride = a.k_stride = a.v_stride = width;
    a.seq_len = lengths.data, a.y = y.data + i % kCopies * tokens * c.heads * hd;
    modeltorch::prefill_attention(a, nullptr);
  });
  require(cudaDeviceSynchronize());
  std::printf("%-22s %9.1f us %7.1f TFLOP/s\n", name, us, flops / us * 1e-6);
}

void time_all() {
  const std::vector<int> packed(8, 1024);
  std::vector<int> mixed;
  for (int i = 0; i < 64; ++i) mixed.push_back(64 + i * 89 % 449);
  time_case("7B 1x512", {{512}, 28, 4, 128});
  time_case("7B 1x2048", {{2048}, 28, 4, 128});
  time_case("7B 8x1024", {packed, 28, 4, 128});
  time_case("7B 1x8192", {{8192}, 28, 4, 128});
  time_case("7B 64 x 64..512", {mixed, 28, 4, 128});
  time_case("0.5B 1x512", {{512}, 14, 2, 64});
  time_case("0.5B 1x2048", {{2048}, 14, 2, 64});
  time_case("0.5B 8x1024", {packed, 14, 2, 64});
  time_case("0.5B 1x8192", {{8192}, 14, 2, 64});
  for (const int head_size : {80, 96, 256}) {
    time_case(("16/4 heads, size " + std::to_string(head_size)).c_str(), {{4096}, 16, 4, head_size});
  }
}

}  // namespace

int main(int count, char** words) {
  int bad = 0;
  for (int i = 1; i < count; ++i) {
    if (!std::strcmp(words[i], "check")) bad += check_all(true);
    if (!std::strcmp(words[i], "quick")) bad += check_all(false);
    if (!std::strcmp(words[i], "time")) time_all();
  }
  return bad != 0;
}
