// Times the linears of Qwen2.5-0.5B over packed weights on two threads, and what tiles alone reach beside
// them, without torch. Weights are those of 24 layers, so that each is as cold as in a step of the model:
//   g++ -std=c++20 -O3 -pthread -static-libstdc++ -Icsrc benchmarks/cpu/panels.cpp csrc/core/*.cpp
//       csrc/ops/panel_linear.cpp csrc/ops/panels*.cpp -o panels && taskset -c 2,4 ./panels
// An argument is the number of rounds (5). Processors with AVX-512 BF16 only.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/cpu_level.h"
#include "core/host_buffer.h"
#include "core/parallel.h"
#include "ops/panel_linear.h"

using namespace modeltorch;

namespace {

double seconds_of(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The calling thread and one more that waits for work without sleeping.
class TwoThreads {
 public:
  TwoThreads() : other_([this] { serve(); }) {}
  ~TwoThreads() {
    quits_ = true;
    other_.join();
  }

  void run(int64_t count, ParallelBody body, void* context) {
    body_ = body;
    context_ = context;
    count_ = count;
    asked_.fetch_add(1);
    body(context, 0, (count + 1) / 2);
    while (done_.load() != asked_.load()) _mm_pause();
  }

 private:
  void serve() {
    for (int64_t seen = 0;;) {
      while (asked_.load() == seen) {
        if (quits_.load()) return;
        _mm_pause();
      }
      ++seen;
      if (count_ > 1) body_(context_, (count_ + 1) / 2, count_);
      done_.fetch_add(1);
    }
  }

  ParallelBody body_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> asked_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<bool> quits_{false};
  std::thread other_;
};

TwoThreads& two_threads() {
  static TwoThreads threads;
  return threads;
}

void fill(BFloat16* to, int64_t count, float size) {
  std::minstd_rand random(7);
  constexpr int64_t kPeriod = 65521;  // of values, which no row length divides
  const int64_t drawn = std::min(count, kPeriod);
  for (int64_t i = 0; i < drawn; ++i)
    to[i] = BFloat16(size * (static_cast<float>(random() % 2001) / 1000.0f - 1.0f));
  for (int64_t i = drawn; i < count; i += drawn)
    std::memcpy(static_cast<void*>(to + i), to, static_cast<size_t>(std::min(drawn, count - i)) * 2);
}

struct Shape {
  const char* name;
  int64_t n;
  int64_t k;
  bool is_gated;
};

constexpr Shape kLayer[] = {{"qkv", 1152, 896, false},
                            {"o", 896, 896, false},
                            {"gate_up", 9728, 896, true},
                            {"down", 896, 4864, false}};
constexpr Shape kHead = {"lm_head", 151936, 896, false};
constexpr int64_t kLayers = 24;
constexpr int64_t kMostRows = 2048;

std::shared_ptr<const PanelWeight> weight_of(const Shape& shape) {
  const auto buffer = std::make_shared<HostBuffer>(PanelWeight::bytes_for(shape.n, shape.k, false));
  fill(static_cast<BFloat16*>(buffer->data()), panel_elements(shape.n, shape.k), 0.03f);
  const HostBytes bytes(buffer, static_cast<const std::byte*>(buffer->data()));
  return std::make_shared<PanelWeight>(shape.n, shape.k, false, shape.is_gated, bytes);
}

// The linears of a step, with rows of their own.
class Model {
 public:
  Model() : x_(kMostRows * 4864 * 2), y_(kMostRows * 9728 * 2 + 151936 * 64 * 2) {
    fill(static_cast<BFloat16*>(x_.data()), kMostRows * 4864, 1.0f);
    std::memset(y_.data(), 0, y_.bytes());
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      for (const Shape& shape : kLayer) linears_.push_back({shape, weight_of(shape)});
    }
    linears_.push_back({kHead, weight_of(kHead)});
  }

  // Adds the seconds of each kind of linear.
  void step(int64_t rows, std::map<std::string, double>& seconds) {
    for (const auto& [shape, weight] : linears_) {
      const int64_t used = shape.name == kHead.name && rows > 64 ? 1 : rows;
      PanelLinear linear(weight, used);
      if (workspace_.size() < linear.workspace_bytes() + 64) workspace_.resize(linear.workspace_bytes() + 64);
      seconds[shape.name] += seconds_of([&] { run(linear, shape, used); });
    }
  }

  // The largest error of some results of the first linear that is not gated, over the largest result.
  double error(int64_t rows) {
    const auto& [shape, weight] = linears_[1];
    PanelLinear linear(weight, rows);
    workspace_.resize(std::max(workspace_.size(), linear.workspace_bytes() + 64));
    run(linear, shape, rows);
    const auto* x = static_cast<const BFloat16*>(x_.data());
    const auto* y = static_cast<const BFloat16*>(y_.data());
    std::vector<BFloat16> row(static_cast<size_t>(shape.k));
    double worst = 0.0, largest = 0.0;
    for (int64_t j = 0; j < shape.n; j += 37) {
      unpack_panel_row(weight->data(), j, shape.k, row.data());
      for (int64_t i = 0; i < rows; ++i) {
        double sum = 0.0;
        for (int64_t k = 0; k < shape.k; ++k)
          sum += static_cast<double>(static_cast<float>(x[i * shape.k + k])) * static_cast<float>(row[k]);
        worst = std::max(worst, std::abs(sum - static_cast<float>(y[i * shape.n + j])));
        largest = std::max(largest, std::abs(sum));
      }
    }
    return worst / largest;
  }

 private:
  void run(PanelLinear& linear, const Shape& shape, int64_t rows) {
    const TensorView x{x_.data(), DType::kBFloat16, {rows, shape.k}};
    const TensorView y{y_.data(), DType::kBFloat16, {rows, shape.is_gated ? shape.n / 2 : shape.n}};
    const TensorView* inputs[] = {&x};
    const TensorView* outputs[] = {&y};
    const auto at = reinterpret_cast<uintptr_t>(workspace_.data());
    linear.run({inputs, outputs, workspace_.data() + (64 - at % 64) % 64});
  }

  HostBuffer x_;
  HostBuffer y_;
  std::vector<std::pair<Shape, std::shared_ptr<const PanelWeight>>> linears_;
  std::vector<std::byte> workspace_ = std::vector<std::byte>(64);
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void time_linears(int rounds) {
  Model model;
  for (const int64_t rows : {1, 8, 33, 200})
    std::printf("error of %ld rows: %.2g\n", long(rows), model.error(rows));
  std::printf("ms of a step; (GB/s of weights, TFLOP/s of products), %d rounds\n", rounds);
  for (const int64_t rows : {1, 8, 16, 32, 64, 128, 512, 2048}) {
    std::map<std::string, std::vector<double>> seen;
    for (int round = 0; round < rounds; ++round) {
      std::map<std::string, double> seconds;
      model.step(rows, seconds);
      for (const auto& [name, value] : seconds) seen[name].push_back(value);
    }
    std::printf("%4ld rows", long(rows));
    for (const Shape& shape : {kLayer[0], kLayer[1], kLayer[2], kLayer[3], kHead}) {
      const bool is_head = shape.name == kHead.name;
      const double weights = static_cast<double>(shape.n * shape.k) * (is_head ? 1 : kLayers);
      const double used = static_cast<double>(is_head && rows > 64 ? 1 : rows);
      const double value = median(seen[shape.name]);
      std::printf("  %s %.2f (%.1f, %.2f)", shape.name, value * 1e3, 2e-9 * weights / value,
                  2e-12 * weights * used / value);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace

// Only after the library's headers, whose functions must run everywhere.
#pragma GCC target("amx-tile,amx-bf16")

namespace {

struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t kProducts = 4 * 28 * 16 * 40;  // four a step, 28 steps a block, 16 blocks

// What one thread multiplies: rows of a lie a_stride elements apart, and tiles of panels in a row.
template <bool kLoads>
void multiply_tiles(const BFloat16* a, int64_t a_stride, int64_t a_step, int64_t a_block,
                    const BFloat16* panels) {
  alignas(64) const TileConfig config;
  __asm__ volatile("ldtilecfg\t%0" : : "m"(config));
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + 512, 64);
  _tile_loadd(6, panels, 64);
  _tile_loadd(7, panels + 512, 64);
  for (int64_t block = 0; block < 16 * 40; ++block) {
    const BFloat16* at = a + block % 16 * a_block;
    for (int64_t step = 0; step < 28; ++step) {
      if constexpr (kLoads) {
        _tile_loadd(6, panels + step % 14 * 1024, 64);
        _tile_loadd(4, at + step * a_step, a_stride * 2);
        _tile_loadd(7, panels + step % 14 * 1024 + 512, 64);
        _tile_loadd(5, at + 16 * a_stride + step * a_step, a_stride * 2);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
}

void time_tiles(int rounds) {
  constexpr int64_t kElements = 512 * 896 + 4096;
  HostBuffer values(2 * kElements * 2), zeros(2 * kElements * 2);
  fill(static_cast<BFloat16*>(values.data()), 2 * kElements, 1.0f);
  std::memset(zeros.data(), 0, zeros.bytes());
  const auto* random = static_cast<const BFloat16*>(values.data());
  const auto* nothing = static_cast<const BFloat16*>(zeros.data());
  struct Case {
    const char* name;
    void (*run)(const BFloat16*, int64_t, int64_t, int64_t, const BFloat16*);
    const BFloat16* from;
    int64_t a_stride, a_step, a_block;
    std::vector<double> seconds = {};
  };
  std::array<Case, 4> cases = {Case{"registers, zeros", multiply_tiles<false>, nothing, 32, 0, 0},
                               Case{"registers", multiply_tiles<false>, random, 32, 0, 0},
                               Case{"first cache", multiply_tiles<true>, random, 32, 0, 0},
                               Case{"rows of second cache", multiply_tiles<true>, random, 896, 32, 32 * 896}};
  // Each for a while: what a processor allows itself for a moment is more than it keeps up.
  for (Case& one : cases) {
    for (int round = 0; round < 200 * rounds; ++round) {
      one.seconds.push_back(seconds_of([&] {
        parallel_for(2, 1, [&](int64_t begin, int64_t end) {
          for (int64_t thread = begin; thread < end; ++thread) {
            const BFloat16* from = one.from + thread * kElements;
            one.run(from, one.a_stride, one.a_step, one.a_block, from);
          }
        });
      }));
    }
    std::printf("tiles of %-22s %.2f TFLOP/s\n", one.name,
                2.0 * kProducts * 2 * 16 * 16 * 32 / median(one.seconds) * 1e-12);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::max(1, std::atoi(argv[1])) : 5;
  set_parallel_backend({.run = [](int64_t count, int64_t, ParallelBody body,
                                  void* context) { two_threads().run(count, body, context); },
                        .width = [] { return int64_t{2}; },
                        .set_width = [](int64_t) {}});
  std::printf("%s, two threads\n", cpu_level_name(cpu_level()));
  if (panel_kernels() == nullptr) {
    std::printf("this processor has no bfloat16 products\n");
    return 1;
  }
  if (cpu_level() == CpuLevel::kAmx) time_tiles(rounds);
  time_linears(rounds);
}
