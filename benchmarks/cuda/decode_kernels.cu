// Checks and times the kernels of a decode step without torch:
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc benchmarks/cuda/decode_kernels.cu
//        csrc/ops/few_row_linear.cu csrc/ops/row_tile_linear.cu csrc/ops/norm_rows.cu
//        csrc/ops/decode_attention.cu -o decode_kernels
//   decode_kernels check
//   decode_kernels time 7b|1.5b|0.5b ROWS CONTEXT
// `check` compares with plain float64 kernels. `time` replays CUDA graphs: of each kernel over weights that
// do not fit in the L2 cache, and of the whole layer stack with its own weights for every layer.

#include <cstring>
#include <string>

#include "layer_stack.cuh"

namespace {

constexpr double kReadRate = 3157e9;  // bytes a second that one read-only launch of this card reaches

// --- references ---

template <class T>
__global__ void reference_linear(FewRowLinear l, int64_t n, double* out) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= l.rows * n) return;
  const int64_t row = i / n;
  int64_t column = i % n;
  int part = 0;
  while (column >= l.parts[part].n) column -= l.parts[part++].n;
  const T* x = static_cast<const T*>(l.x) + row * l.k;
  const T* w = static_cast<const T*>(l.parts[part].weight) + column * l.k;
  double squares = 0, sum = 0;
  for (int64_t j = 0; j < l.k; ++j) squares += double(float(x[j])) * float(x[j]);
  const double factor = 1 / sqrt(squares / l.k + l.epsilon);
  for (int64_t j = 0; j < l.k; ++j) {
    const double value =
        l.gamma ? float(x[j]) * factor * float(static_cast<const T*>(l.gamma)[j]) : float(x[j]);
    sum += value * float(w[j]);
  }
  if (l.parts[part].bias) sum += float(static_cast<const T*>(l.parts[part].bias)[column]);
  out[i] = sum;
}

/// Where key-value head `kv` of token `t` of sequence `b` lies in a cache; -1: in a bad block, which counts
/// as zeros.
__device__ int64_t cache_offset(const DecodeAttention& a, int64_t b, int t, int64_t kv) {
  const int block = a.block_tables[b * a.table_width + t / a.block_size];
  if (block < 0 || block >= a.blocks) return -1;
  return ((block * a.block_size + t % a.block_size) * a.kv_heads + kv) * a.head_size;
}

/// One thread a query head and token.
template <class T>
__global__ void reference_scores(DecodeAttention a, double* scores) {
  const int64_t i = blockIdx.y, b = i / a.heads, head = i % a.heads, kv = head / (a.heads / a.kv_heads);
  const int t = blockIdx.x * blockDim.x + threadIdx.x, length = a.seq_len[b], d = a.head_size, half = d / 2;
  if (t >= length) return;
  const T* row = static_cast<const T*>(a.qkv) + b * (a.heads + 2 * a.kv_heads) * d;
  const T *cos = static_cast<const T*>(a.cos) + b * d, *sin = static_cast<const T*>(a.sin) + b * d;
  auto roped = [&](const T* x, int j) {
    const double other = j < half ? -double(float(x[j + half])) : double(float(x[j - half]));
    return double(float(T(float(float(x[j]) * double(float(cos[j])) + other * float(sin[j])))));
  };
  const int64_t from = cache_offset(a, b, t, kv);
  double score = 0;
  for (int j = 0; j < d; ++j) {
    const double key = t == length - 1 ? roped(row + (a.heads + kv) * d, j)
                       : from < 0      ? 0
                                       : double(float(static_cast<const T*>(a.k_cache)[from + j]));
    score += roped(row + head * d, j) * key;
  }
  scores[i * a.max_context + t] = score * a.scale;
}

/// One thread an element of the output.
template <class T>
__global__ void reference_values(DecodeAttention a, const double* scores, double* out) {
  const int64_t i = blockIdx.x, b = i / a.heads, head = i % a.heads, kv = head / (a.heads / a.kv_heads);
  const int j = threadIdx.x, length = a.seq_len[b], d = a.head_size;
  const T* v =
      static_cast<const T*>(a.qkv) + (b * (a.heads + 2 * a.kv_heads) + a.heads + a.kv_heads + kv) * d;
  const double* score = scores + i * a.max_context;
  double maximum = -INFINITY, sum = 0, value = 0;
  for (int t = 0; t < length; ++t) maximum = max(maximum, score[t]);
  for (int t = 0; t < length; ++t) {
    const double weight = exp(score[t] - maximum);
    const int64_t from = cache_offset(a, b, t, kv);
    sum += weight;
    value += weight * (t == length - 1 ? float(v[j])
                       : from < 0      ? 0
                                       : float(static_cast<const T*>(a.v_cache)[from + j]));
  }
  out[i * d + j] = length ? value / sum : 0;
}

// --- checks ---

int failures = 0;

struct LinearCase {
  int rows, k;
  std::vector<int> n;
  bool norm, bias, residual, swiglu;
};

template <class T>
void check_linear(const LinearCase& c, DType dtype, double tolerance) {
  FewRowLinear l;
  l.dtype = dtype;
  l.rows = c.rows;
  l.k = c.k;
  l.part_count = static_cast<int>(c.n.size());
  int64_t n = 0;
  for (size_t i = 0; i < c.n.size(); ++i) {
    l.parts[i] = {random<T>(size_t(c.n[i]) * c.k, 1 / std::sqrt(float(c.k))),
                  c.bias ? random<T>(c.n[i]) : nullptr, c.n[i]};
    n += c.n[i];
  }
  const int64_t units = c.swiglu ? n / 2 : n;
  l.x = random<T>(size_t(c.rows) * c.k, 2);
  if (c.norm) l.gamma = random<T>(c.k, 0.5f, 1);
  l.epsilon = 1e-6f;
  l.swiglu = c.swiglu;
  const size_t count = size_t(c.rows) * units, guard = 64;
  T* y = random<T>(count + guard);
  const auto before = download(y, count + guard);
  if (c.residual) l.residual = y;
  l.y = y;
  l.workspace = pool.take(few_row_linear_workspace(l));
  double* sums = static_cast<double*>(pool.take(c.rows * n * sizeof(double)));
  reference_linear<T><<<(c.rows * n + 127) / 128, 128>>>(l, n, sums);
  cuda(cudaGetLastError());
  const auto raw = download(sums, c.rows * n);
  std::vector<double> want(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t row = i / units, u = i % units;
    const double a = raw[row * n + u];
    want[i] = c.swiglu ? a / (1 + std::exp(-a)) * raw[row * n + units + u] : a;
    if (c.residual) want[i] += float(before[i]);
  }
  double error = INFINITY;
  if (few_row_linear_fits(l)) {
    few_row_linear(l, nullptr);
    const auto got = download(y, count + guard);
    error = relative_error(want, [&](size_t i) { return float(got[i]); });
    if (std::memcmp(&got[count], &before[count], guard * sizeof(T)) != 0) error = INFINITY;
  }
  if (!(error < tolerance)) {
    ++failures;
    std::printf("FAIL linear %s rows %d k %d n", dtype_name(dtype), c.rows, c.k);
    for (int part : c.n) std::printf(" %d", part);
    std::printf(" norm %d bias %d residual %d swiglu %d: error %.3g\n", c.norm, c.bias, c.residual, c.swiglu,
                error);
  }
  pool.reset();
}

void check_linears() {
  int cases = 0;
  for (const int rows : {1, 2, 3, 4, 5, 8, 9, 16, 32, 50, 64, 100, 128}) {
    const bool few = rows <= 8;  // from 9 on swiglu goes by eights, and without a residual
    std::vector<LinearCase> list;
    for (const int k : {8, 72, 896, 1000, 3584}) {
      list.push_back({rows, k, {131}, true, true, false, false});
      list.push_back({rows, k, {256, 33, 5}, true, true, false, false});
      list.push_back({rows, k, {897}, false, false, true, false});
      list.push_back({rows, k, {264}, false, true, true, false});
      list.push_back({rows, k, {few ? 202 : 200, few ? 202 : 200}, true, false, false, true});
      list.push_back({rows, k, {2 * (few ? 707 : 704)}, true, true, few, true});
    }
    list.push_back({rows, 4864, {896}, false, false, true, false});
    list.push_back({rows, 18944, {300}, false, false, true, false});
    list.push_back({rows, 896, {9728}, true, false, false, true});
    list.push_back({rows, 896, {40000}, true, true, false, false});
    list.push_back({rows, 896, {40000}, false, false, true, false});
    list.push_back({rows, 3584, {3584, 512, 512}, true, true, false, false});
    list.push_back({rows, 64, {1}, true, true, true, false});
    for (const LinearCase& c : list) {
      check_linear<__nv_bfloat16>(c, DType::kBFloat16, 6e-3);
      check_linear<__half>(c, DType::kFloat16, 8e-4);
      cases += 2;
    }
  }
  std::printf("linear: %d cases, %d failures\n", cases, failures);
}

struct AttentionCase {
  int heads, kv_heads, head_size, block_size;
  std::vector<int> lengths;
  bool broken = false;  // a bad block, a bad slot and a slot of -1
};

template <class T>
void check_attention(const AttentionCase& c, DType dtype, double tolerance) {
  std::mt19937 generator(7);
  DecodeAttention a;
  a.dtype = dtype;
  a.sequences = c.lengths.size();
  a.heads = c.heads;
  a.kv_heads = c.kv_heads;
  a.head_size = c.head_size;
  a.scale = 1 / std::sqrt(float(c.head_size));
  const int64_t b = a.sequences, d = a.head_size;
  a.qkv = random<T>(b * (c.heads + 2 * c.kv_heads) * d, 2);
  a.cos = random<T>(b * d);
  a.sin = random<T>(b * d);
  a.block_size = c.block_size;
  const int longest = *std::max_element(c.lengths.begin(), c.lengths.end());
  a.table_width = longest / c.block_size + 2;
  a.max_context = a.table_width * a.block_size;
  a.blocks = b * a.table_width + 3;
  std::vector<int32_t> order(a.blocks), slots(b), lengths(c.lengths.begin(), c.lengths.end());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), generator);
  std::vector<int32_t> tables(order.begin(), order.begin() + b * a.table_width);
  for (int64_t i = 0; i < b; ++i) {
    const int at = lengths[i] - 1;
    slots[i] = at < 0 ? -1 : tables[i * a.table_width + at / c.block_size] * c.block_size + at % c.block_size;
  }
  if (c.broken) {
    slots[0] = -1;
    slots[1] = static_cast<int32_t>(a.blocks * a.block_size);
    tables[2 * a.table_width] = static_cast<int32_t>(a.blocks);
    tables[3 * a.table_width] = -5;
  }
  a.block_tables = upload(tables);
  a.slots = upload(slots);
  a.seq_len = upload(lengths);
  const size_t cache = a.blocks * a.block_size * a.kv_heads * d;
  T *k_cache = random<T>(cache, 2), *v_cache = random<T>(cache);
  a.k_cache = k_cache;
  a.v_cache = v_cache;
  const size_t count = b * c.heads * d;
  T* y = random<T>(count);
  a.y = y;
  a.fault = upload(std::vector<int32_t>{0});
  a.workspace = pool.take(decode_attention_workspace(a));
  double* scratch = static_cast<double*>(pool.take(b * c.heads * a.max_context * sizeof(double)));
  double* out = static_cast<double*>(pool.take(count * sizeof(double)));
  const auto k_before = download(k_cache, cache);
  reference_scores<T><<<dim3((longest + 127) / 128, b * c.heads), 128>>>(a, scratch);
  reference_values<T><<<b * c.heads, d>>>(a, scratch, out);
  cuda(cudaGetLastError());
  const auto want = download(out, count);
  decode_attention(a, nullptr);
  const auto got = download(y, count);
  double error = relative_error(want, [&](size_t i) { return float(got[i]); });
  const auto k_after = download(k_cache, cache), v_after = download(v_cache, cache);
  const auto qkv = download(static_cast<const T*>(a.qkv), b * (c.heads + 2 * c.kv_heads) * d);
  size_t changed = 0, expected = 0;
  for (size_t i = 0; i < cache; i += d) changed += std::memcmp(&k_before[i], &k_after[i], d * sizeof(T)) != 0;
  for (int64_t i = 0; i < b; ++i) {
    if (slots[i] < 0 || slots[i] >= a.blocks * a.block_size || lengths[i] == 0) continue;
    expected += c.kv_heads;
    const T* v = &qkv[(i * (c.heads + 2 * c.kv_heads) + c.heads + c.kv_heads) * d];
    if (std::memcmp(v, &v_after[slots[i] * size_t(c.kv_heads) * d], c.kv_heads * d * sizeof(T)) != 0)
      error = INFINITY;
  }
  const bool fault = download(a.fault, 1)[0] != 0;
  if (!(error < tolerance) || changed != expected || fault != c.broken) {
    ++failures;
    std::printf(
        "FAIL attention %s heads %d/%d d %d block %d B %d longest %d: error %.3g, rows written %zu of %zu, "
        "fault %d\n",
        dtype_name(dtype), c.heads, c.kv_heads, c.head_size, c.block_size, int(b), longest, error, changed,
        expected, fault);
  }
  pool.reset();
}

void check_attentions() {
  const int before = failures;
  int cases = 0;
  const std::vector<std::vector<int>> lengths = {
      {1}, {2}, {16}, {17}, {500}, {3000}, {0, 1, 33, 129}, {700, 0, 15, 64, 65, 1, 300, 90}};
  for (const int d : {64, 80, 96, 128, 256}) {
    for (const auto& [heads, kv_heads] : {std::pair{14, 2}, {4, 4}, {28, 4}, {20, 1}, {32, 1}}) {
      for (const int block : {16, 128, 24}) {
        for (const auto& l : lengths) {
          check_attention<__nv_bfloat16>({heads, kv_heads, d, block, l}, DType::kBFloat16, 6e-3);
          ++cases;
        }
      }
      check_attention<__half>({heads, kv_heads, d, 32, lengths[7]}, DType::kFloat16, 1e-3);
      check_attention<__nv_bfloat16>({heads, kv_heads, d, 16, {40, 50, 60, 70, 0}, true}, DType::kBFloat16,
                                     6e-3);
      check_attention<__nv_bfloat16>({heads, kv_heads, d, 64, std::vector<int>(100, 77)}, DType::kBFloat16,
                                     6e-3);
      cases += 3;
    }
  }
  std::printf("attention: %d cases, %d failures\n", cases, failures - before);
}

// --- times ---

using Bf16 = __nv_bfloat16;

void report(const char* name, double us, double bytes) {
  std::printf("  %-10s %8.2f us %8.0f GB/s  %5.1f %% of the read rate\n", name, us, bytes / us * 1e-3,
              bytes / us * 1e8 / kReadRate);
}

using Bf16 = __nv_bfloat16;

void time_model(const Model& model, int rows, int context) {
  Stack<Bf16> stack(model, rows, context);
  std::printf("%s %d x %d\n", model.name, rows, context);
  {
    FewRowLinear l;
    l.rows = 1;
    l.k = 64;
    l.part_count = 1;
    l.parts[0] = {random<Bf16>(132 * 64), nullptr, 132};
    l.x = random<Bf16>(64);
    l.y = random<Bf16>(132);
    const double ms = time_graph(
        [&](cudaStream_t s) {
          for (int i = 0; i < 100; ++i) few_row_linear(l, s);
        },
        10);
    std::printf("  tiny       %8.2f us\n", ms * 10);
  }
  using Launch = int64_t (Stack<Bf16>::*)(int64_t, int, cudaStream_t);
  const std::pair<const char*, Launch> kernels[] = {{"qkv", &Stack<Bf16>::qkv},
                                                    {"o", &Stack<Bf16>::o},
                                                    {"gate_up", &Stack<Bf16>::gate_up},
                                                    {"down", &Stack<Bf16>::down},
                                                    {"lm_head", &Stack<Bf16>::head}};
  for (const auto& [name, launch] : kernels) {
    const bool head = launch == &Stack<Bf16>::head;
    const int count = head ? 4 : 2 * model.layers;
    int64_t elements = 0;
    const double ms = time_graph(
        [&](cudaStream_t s) {
          int64_t at = 0;
          for (int i = 0; i < count; ++i) {
            if (at + elements > stack.weights()) at = 0;
            elements = (stack.*launch)(at, i % model.layers, s);
            at += elements;
          }
        },
        10);
    report(name, ms * 1e3 / count, elements * 2.0);
  }
  const double attention = time_graph(
      [&](cudaStream_t s) {
        for (int i = 0; i < 2 * model.layers; ++i) stack.attention(i % model.layers, s);
      },
      10);
  report("attention", attention * 1e3 / (2 * model.layers), stack.kv_bytes());
  const double step = time_graph([&](cudaStream_t s) { stack.step(s); }, 15);
  const double bytes = stack.weights() * 2.0 + stack.kv_bytes() * double(model.layers);
  std::printf("  step %.3f ms, floor %.3f ms (x %.3f)\n", step, bytes / kReadRate * 1e3,
              step / (bytes / kReadRate * 1e3));
  pool.reset();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check") {
    check_linears();
    check_attentions();
    return failures != 0;
  }
  if (mode == "time" && argc == 5) {
    for (const Model& model : kModels) {
      if (std::strcmp(model.name, argv[2]) == 0) time_model(model, std::atoi(argv[3]), std::atoi(argv[4]));
    }
    return 0;
  }
  std::printf("usage: decode_kernels check | time 7b|1.5b|0.5b ROWS CONTEXT\n");
  return 2;
}
