// Checks prefill_attention and many_row_linear against float64 on awkward shapes and times them, without
// torch:
//   nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a benchmarks/cuda/prefill_kernels.cu
//        csrc/ops/prefill_attention.cu csrc/ops/many_row_linear.cu -o prefill_kernels && ./prefill_kernels
//        check time
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"
#include "ops/many_row_linear.h"
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

/// Median microseconds of one launch in a CUDA graph of eight, over buffers that rotate.
template <class F>
double time_of(F run) {
  constexpr int kLaunches = 8;
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  cudaStream_t stream;
  require(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kLaunches; ++i) run(i, stream);
  require(cudaStreamEndCapture(stream, &graph));
  require(cudaGraphInstantiate(&replay, graph, 0));
  std::vector<double> times;
  require(cudaDeviceSynchronize());
  std::this_thread::sleep_for(std::chrono::milliseconds(60));  // every case starts on a card that rested
  for (int sample = 0; sample < 9; ++sample) {
    require(cudaEventRecord(begin, stream));
    require(cudaGraphLaunch(replay, stream));
    require(cudaEventRecord(end, stream));
    require(cudaEventSynchronize(end));
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end));
    if (sample > 1) times.push_back(ms * 1000 / kLaunches);
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
  const double us = time_of([&](int i, cudaStream_t stream) {
    T* const at = qkv.data + i % kCopies * tokens * width;
    PrefillAttention a{DType::kBFloat16, tokens, int64_t(c.lengths.size()), c.heads, c.kv_heads, c.head_size};
    a.scale = 1.0f / std::sqrt(float(hd));
    a.q = at, a.k = at + c.heads * hd, a.v = at + (c.heads + c.kv_heads) * hd;
    a.q_stride = a.k_stride = a.v_stride = width;
    a.seq_len = lengths.data, a.y = y.data + i % kCopies * tokens * c.heads * hd;
    modeltorch::prefill_attention(a, stream);
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

/// Sampled elements of a ManyRowLinear in float64, a warp for each; `up` lies behind the weight.
template <class T>
__global__ void linear_reference(const T* x, const T* weight, const T* residual, bool swiglu, int64_t rows,
                                 int64_t n, int64_t k, int samples, double* exact, int64_t* where) {
  const int sample = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (sample >= samples) return;
  const int64_t at =
      static_cast<int64_t>((sample * 0x9e3779b97f4a7c15ull >> 8) % static_cast<uint64_t>(rows * n));
  double a = 0, b = 0;
  for (int64_t i = threadIdx.x % 32; i < k; i += 32) {
    const double value = double(float(x[at / n * k + i]));
    a += value * double(float(weight[at % n * k + i]));
    if (swiglu) b += value * double(float(weight[(n + at % n) * k + i]));
  }
  for (int step = 16; step > 0; step /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, step);
    b += __shfl_xor_sync(0xffffffffu, b, step);
  }
  if (swiglu) a = a / (1 + exp(-a)) * b;
  if (residual) a += double(float(residual[at]));
  exact[sample] = a;
  where[sample] = at;
}

struct LinearCase {
  int64_t rows, n, k;
  bool swiglu, residual;
};

template <class T>
double linear_error(const LinearCase& c, DType dtype) {
  const int kSamples = 20000;
  const int64_t n = c.n, all = c.swiglu ? 2 * n : n;
  Array<T> x(c.rows * c.k), weight(all * c.k), y(c.rows * n + 64), residual(c.rows * n);
  Array<double> exact(kSamples);
  Array<int64_t> where(kSamples);
  fill<<<1024, 256>>>(x.data, c.rows * c.k, 3 + c.rows, 1.0f);
  fill<<<1024, 256>>>(weight.data, all * c.k, 99 + n, 2.0f / std::sqrt(float(c.k)));
  fill<<<1024, 256>>>(residual.data, c.rows * n, 8, 1.0f);
  require(cudaMemset(y.data, 0xff, (c.rows * n + 64) * sizeof(T)));
  if (c.residual)
    require(cudaMemcpy(y.data, residual.data, c.rows * n * sizeof(T), cudaMemcpyDeviceToDevice));
  modeltorch::ManyRowLinear linear{dtype, c.rows, c.k, n, x.data, weight.data};
  linear.up = c.swiglu ? weight.data + n * c.k : nullptr;
  linear.residual = c.residual ? y.data : nullptr;
  linear.y = y.data;
  if (!many_row_linear_fits(linear)) return -1;
  modeltorch::many_row_linear(linear, nullptr);
  linear_reference<<<kSamples / 4, 128>>>(x.data, weight.data, c.residual ? residual.data : nullptr, c.swiglu,
                                          c.rows, n, c.k, kSamples, exact.data, where.data);
  require(cudaDeviceSynchronize());
  std::vector<T> got(c.rows * n + 64);
  std::vector<double> want(kSamples);
  std::vector<int64_t> at(kSamples);
  require(cudaMemcpy(got.data(), y.data, got.size() * sizeof(T), cudaMemcpyDeviceToHost));
  require(cudaMemcpy(want.data(), exact.data, kSamples * 8, cudaMemcpyDeviceToHost));
  require(cudaMemcpy(at.data(), where.data, kSamples * 8, cudaMemcpyDeviceToHost));
  double difference = 0, norm = 0;
  for (int i = 0; i < kSamples; ++i) {
    const double d = double(float(got[at[i]])) - want[i];
    difference += d * d, norm += want[i] * want[i];
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(float(got[i])) != (i >= size_t(c.rows * n))) return NAN;  // unwritten, or written beyond
  }
  return std::sqrt(difference / norm);
}

int check_linear() {
  std::vector<LinearCase> cases;
  for (const int64_t rows : {1, 127, 129, 256, 300, 640, 1000, 2048}) {
    for (const auto& [n, k] : {std::pair{8, 64}, {96, 72}, {104, 8}, {328, 896}, {4864, 896}}) {
      cases.push_back({rows, n, k, true, false});
      cases.push_back({rows, n, k, false, false});
      cases.push_back({rows, n, k, false, true});
    }
    cases.push_back({rows, 3584, 3584, false, true});
  }
  int bad = 0;
  double worst = 0;
  for (const LinearCase& c : cases) {
    const double bf16 = linear_error<__nv_bfloat16>(c, DType::kBFloat16);
    const double fp16 = linear_error<__half>(c, DType::kFloat16);
    worst = std::max({worst, bf16, fp16 * 8});
    if (!(bf16 >= 0 && bf16 < 3e-3 && fp16 >= 0 && fp16 < 4e-4)) {
      ++bad;
      std::printf("BAD linear rows %d n %d k %d swiglu %d: bf16 %.2e fp16 %.2e\n", int(c.rows), int(c.n),
                  int(c.k), c.swiglu, bf16, fp16);
    }
  }
  std::printf("linear: %zu cases, %d bad, worst error %.2e (bf16)\n", cases.size() * 2, bad, worst);
  return bad;
}

void time_linear_case(const char* name, const LinearCase& c) {
  using T = __nv_bfloat16;
  const int copies = c.k * c.n > 8000000 ? 2 : 8;
  const int64_t n = c.n, all = c.swiglu ? 2 * n : n;
  Array<T> x(c.rows * c.k * 4), weight(size_t(copies) * all * c.k), y(c.rows * n * 2);
  fill<<<1024, 256>>>(x.data, c.rows * c.k * 4, 3, 1.0f);
  fill<<<1024, 256>>>(weight.data, size_t(copies) * all * c.k, 9, 0.02f);
  fill<<<1024, 256>>>(y.data, c.rows * n * 2, 4, 1.0f);
  modeltorch::ManyRowLinear linear{DType::kBFloat16, c.rows, c.k, n};
  linear.y = y.data;
  linear.residual = c.residual ? y.data + c.rows * n : nullptr;
  const double us = time_of([&](int i, cudaStream_t stream) {
    const T* const from = weight.data + size_t(i % copies) * all * c.k;
    linear.x = x.data + i % 4 * c.rows * c.k;
    linear.weight = from;
    linear.up = c.swiglu ? from + n * c.k : nullptr;
    modeltorch::many_row_linear(linear, stream);
  });
  std::printf("%-12s rows %5d %9.1f us %7.1f TFLOP/s, yield %.2f\n", name, int(c.rows), us,
              2.0 * c.rows * all * c.k / us * 1e-6, many_row_linear_yield(linear));
}

void time_linear() {
  for (const int64_t rows : {256, 512, 1024, 2048, 8192}) {
    time_linear_case("7B gate_up", {rows, 18944, 3584, true, false});
    time_linear_case("7B down", {rows, 3584, 18944, false, true});
    time_linear_case("7B o", {rows, 3584, 3584, false, true});
    time_linear_case("0.5B gate_up", {rows, 4864, 896, true, false});
    time_linear_case("0.5B down", {rows, 896, 4864, false, true});
  }
}

}  // namespace

int main(int count, char** words) {
  int bad = 0;
  for (int i = 1; i < count; ++i) {
    if (!std::strcmp(words[i], "check")) bad += check_all(true);
    if (!std::strcmp(words[i], "quick")) bad += check_all(false);
    if (!std::strcmp(words[i], "linear")) bad += check_linear();
    if (!std::strcmp(words[i], "time")) time_all();
    if (!std::strcmp(words[i], "linear-time")) time_linear();
  }
  return bad != 0;
}
