// Checks and times all layers of a decode step in one launch, without torch:
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc benchmarks/cuda/decode_stack.cu
//        csrc/ops/few_row_linear.cu csrc/ops/row_tile_linear.cu csrc/ops/norm_rows.cu
//        csrc/ops/decode_attention.cu csrc/ops/decode_stack.cu -o decode_stack
//   decode_stack check
//   decode_stack time 7b|1.5b|0.5b ROWS CONTEXT
// `check` compares with the chain of launches that decode_kernels.cu checks. `time` replays CUDA graphs of
// both in turn; the layers have weights of their own, which do not fit in the L2 cache. Built with
// -DMODELTORCH_STACK_STAMPS it also prints where the cycles go.

#include <array>
#include <cstring>
#include <string>

#include "layer_stack.cuh"

namespace {

using Bf16 = __nv_bfloat16;

int cases = 0, failures = 0;

template <class T>
std::vector<double> wide(const std::vector<T>& values) {
  std::vector<double> to(values.size());
  for (size_t i = 0; i < values.size(); ++i) to[i] = float(values[i]);
  return to;
}

/// What a way to run the layers left behind.
template <class T>
struct Left {
  std::vector<T> y, caches;
  bool fault;
};

template <class T>
Left<T> collect(const Stack<T>& stack, const T* y) {
  Left<T> left{download(y, stack.hidden_elements()), download(stack.caches(), stack.cache_elements()),
               download(stack.fault(), 1)[0] != 0};
  cuda(cudaMemset(stack.fault(), 0, 4));
  return left;
}

template <class T>
void check_stack(const Model& model, const StackOptions& options, double tolerance) {
  ++cases;
  Stack<T> stack(model, options);
  const auto x = download(stack.hidden(), stack.hidden_elements());
  const auto caches = download(stack.caches(), stack.cache_elements());
  const auto restore = [&] {
    cuda(cudaMemcpy(stack.hidden(), x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    cuda(cudaMemcpy(stack.caches(), caches.data(), caches.size() * sizeof(T), cudaMemcpyHostToDevice));
  };
  stack.layers(nullptr);
  const Left<T> want = collect(stack, stack.hidden());
  T* y = random<T>(stack.hidden_elements());
  DecodeStack all = stack.describe(y);
  double error = INFINITY, cache_error = INFINITY;
  bool same = true, fits = decode_stack_fits(all), fault = false;
  if (fits) {
    all.state = pool.take(decode_stack_state_bytes(all));
    cuda(cudaMemset(all.state, 0xff, decode_stack_state_bytes(all)));
    Left<T> first;
    for (int run = 0; run < 4; ++run) {
      restore();
      if (run == 3) all.y = stack.hidden();  // in place
      decode_stack(all, nullptr);
      const Left<T> got = collect(stack, static_cast<const T*>(all.y));
      if (run == 0) {
        first = got;
        error = relative_error(wide(want.y), [&](size_t i) { return float(got.y[i]); });
        cache_error = relative_error(wide(want.caches), [&](size_t i) { return float(got.caches[i]); });
        fault = got.fault;
      }
      same = same && std::memcmp(first.y.data(), got.y.data(), got.y.size() * sizeof(T)) == 0 &&
             std::memcmp(first.caches.data(), got.caches.data(), got.caches.size() * sizeof(T)) == 0;
    }
  }
  const bool right = error < tolerance && cache_error < tolerance && same && fault == want.fault;
  failures += !right;
  std::printf("%s %s hidden %d inner %d heads %d/%d x %d block %d parts %d lengths", right ? "  ok" : "FAIL",
              std::is_same_v<T, __half> ? "half" : "bf16", model.hidden, model.intermediate, model.heads,
              model.kv_heads, model.head_size, options.block_size, options.has_parts);
  for (const int length : options.lengths) std::printf(" %d", length);
  std::printf(": fits %d error %.2g caches %.2g same %d fault %d/%d\n", fits, error, cache_error, same, fault,
              want.fault);
  std::fflush(stdout);
  pool.reset();
}

void check_stacks() {
  const auto scale = [](int hidden) { return 2 / std::sqrt(float(hidden)); };
  const std::vector<std::vector<int>> lengths = {{1},
                                                 {15},
                                                 {16},
                                                 {17},
                                                 {512},
                                                 {513},
                                                 {8192},
                                                 {0},
                                                 {300, 20},
                                                 {3, 2000, 100},
                                                 {0, 1, 33, 129},
                                                 {40, 50, 60, 70, 80},
                                                 {0, 0},
                                                 {9, 8, 7, 6, 5, 4, 3},
                                                 {700, 0, 15, 64, 65, 1, 300, 90},
                                                 std::vector<int>(8, 512)};
  const Model small = {"0.5b", 896, 4864, 14, 2, 64, 2, 8};
  for (const auto& l : lengths) check_stack<Bf16>(small, {.lengths = l, .weight_scale = scale(896)}, 1e-2);
  check_stack<Bf16>(
      small, {.lengths = {100, 7}, .block_size = 24, .weight_scale = scale(896), .has_parts = true}, 1e-2);
  check_stack<Bf16>(
      small,
      {.lengths = {40, 50, 60, 70, 0}, .block_size = 16, .weight_scale = scale(896), .is_broken = true},
      1e-2);
  check_stack<__half>(small, {.lengths = {77}, .weight_scale = scale(896)}, 2e-3);
  check_stack<__half>(small, {.lengths = {7, 900, 0, 30, 1}, .weight_scale = scale(896)}, 2e-3);
  for (const Model& m : {Model{"", 1536, 8960, 12, 2, 128, 3, 8}, Model{"", 1024, 2816, 16, 4, 64, 3, 8},
                         Model{"", 2048, 11008, 16, 2, 128, 2, 8}, Model{"", 160, 352, 16, 1, 64, 5, 8},
                         Model{"", 3584, 18944, 28, 4, 128, 2, 8}}) {
    check_stack<Bf16>(m, {.lengths = {1000}, .block_size = 64, .weight_scale = scale(m.hidden)}, 1e-2);
    check_stack<Bf16>(m, {.lengths = {20, 300}, .weight_scale = scale(m.hidden), .has_parts = true}, 1e-2);
  }
  std::printf("decode_stack: %d cases, %d failures\n", cases, failures);
}

#ifdef MODELTORCH_STACK_STAMPS
/// Mean cycles of a layer in what thread 0 of a block saw: of blocks with attention, and of the others.
void print_stamps(const std::vector<long long>& stamps, int blocks, int layers) {
  constexpr const char* kKinds[] = {"qkv", "o", "gate_up", "down"};
  for (const bool attends : {true, false}) {
    double sums[4][6] = {}, whole = 0;
    int count = 0;
    for (int block = 0; block < blocks; ++block) {
      if ((stamps[size_t(block) * 4 * layers * 8 + 6] >= 0) != attends) continue;
      ++count;
      const auto at = [&](int task, int i) {
        return static_cast<double>(stamps[(size_t(block) * 4 * layers + task) * 8 + i]);
      };
      for (int task = 4; task < 4 * layers; ++task) {
        for (int i = 0; i < 4; ++i) sums[task % 4][i] += at(task, i + 1) - at(task, i);
        sums[task % 4][4] += at(task, 0) - (task % 4 == 1 ? at(task, 5) : at(task - 1, 4));
        if (task % 4 == 1) sums[1][5] += at(task, 5) - at(task - 1, 4);
      }
      whole += at(4 * layers - 1, 4) - at(3, 4);
    }
    if (!count) continue;
    const double by = 1.0 / count / (layers - 1);
    std::printf("  %d blocks %s attention: %.0f cycles a layer\n", count, attends ? "with" : "without",
                whole * by);
    for (int kind = 0; kind < 4; ++kind) {
      std::printf("    %-8s attention %6.0f before %6.0f x %6.0f multiply %6.0f barrier %6.0f finish %6.0f\n",
                  kKinds[kind], sums[kind][5] * by, sums[kind][4] * by, sums[kind][0] * by,
                  sums[kind][1] * by, sums[kind][2] * by, sums[kind][3] * by);
    }
  }
}
#endif

void time_stack(const Model& model, int rows, int context) {
  Stack<Bf16> stack(model, rows, context);
  DecodeStack all = stack.describe(stack.hidden());
  if (!decode_stack_fits(all)) {
    std::printf("%s %d x %d: does not fit\n", model.name, rows, context);
    pool.reset();
    return;
  }
  all.state = pool.take(decode_stack_state_bytes(all));
  cuda(cudaMemset(all.state, 0xff, decode_stack_state_bytes(all)));
  std::array<std::vector<double>, 4> times;
  for (int round = 0; round < 3; ++round) {
    times[0].push_back(time_graph([&](cudaStream_t s) { stack.layers(s); }, 15));
    times[1].push_back(time_graph([&](cudaStream_t s) { decode_stack(all, s); }, 15));
    times[2].push_back(time_graph([&](cudaStream_t s) { stack.step(s); }, 15));
    times[3].push_back(time_graph(
        [&](cudaStream_t s) {
          decode_stack(all, s);
          stack.head(stack.layer_weights() * model.layers, 0, s);
        },
        15));
  }
  for (auto& list : times) std::sort(list.begin(), list.end());
  std::printf(
      "%s %d x %d: layers by launches %.4f ms, stack %.4f ms (%.4f to %.4f); with lm_head %.4f, %.4f\n",
      model.name, rows, context, times[0][1], times[1][1], times[1][0], times[1][2], times[2][1],
      times[3][1]);
#ifdef MODELTORCH_STACK_STAMPS
  int blocks = 0;
  cuda(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0));
  const size_t count = size_t(blocks) * 4 * model.layers * 8;
  all.stamps = static_cast<long long*>(pool.take(count * 8));
  for (int run = 0; run < 2; ++run) decode_stack(all, nullptr);
  print_stamps(download(all.stamps, count), blocks, model.layers);
#endif
  std::fflush(stdout);
  pool.reset();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check") {
    check_stacks();
    return failures != 0;
  }
  if (mode == "time" && argc == 5) {
    for (const Model& model : kModels) {
      if (std::strcmp(model.name, argv[2]) == 0) time_stack(model, std::atoi(argv[3]), std::atoi(argv[4]));
    }
    return 0;
  }
  std::printf("usage: decode_stack check | time 7b|1.5b|0.5b ROWS CONTEXT\n");
  return 2;
}
