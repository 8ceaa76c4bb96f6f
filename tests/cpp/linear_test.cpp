#include <array>
#include <cmath>

#include "ops/linear.h"
#include "ops/linear_swiglu.h"
#include "ops/panel_weight.h"
#include "ops/panels.h"
#include "tensors.h"

using namespace modeltorch;
using namespace test;

namespace {

struct Part {
  int64_t n;
  bool transposed;
  bool has_bias;
};

int64_t packed_runs = 0;

// Runs a Linear of these parts on random tensors, as they are and packed, and compares it with plain loops.
void check_linear(Random& random, DType dtype, int64_t rows, int64_t k, const std::vector<Part>& parts) {
  const Tensor x = Tensor::random(random, dtype, {rows, k});
  std::vector<Tensor> weights;
  std::vector<LinearPart> layout;
  int64_t columns = 0;
  for (const Part& part : parts) {
    weights.push_back(Tensor::random(random, dtype, part.transposed ? Dims{part.n, k} : Dims{k, part.n}));
    if (part.has_bias) weights.push_back(Tensor::random(random, dtype, {part.n}, -4.0, 4.0));
    layout.push_back({part.transposed, part.has_bias});
    columns += part.n;
  }
  std::vector<const Tensor*> inputs{&x};
  for (const Tensor& weight : weights) inputs.push_back(&weight);
  const Linear linear(layout);
  const Tensor y = std::move(run_operation(linear, inputs)[0]);
  expect(y.dims() == Dims{rows, columns}, "shape ", y.view());

  std::vector<double> expected(rows * columns);
  const std::vector<double> left = x.values();
  int64_t column = 0;
  size_t at = 0;
  for (const Part& part : parts) {
    const std::vector<double> weight = weights[at++].values();
    const std::vector<double> bias =
        part.has_bias ? weights[at++].values() : std::vector<double>(part.n, 0.0);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < part.n; ++j) {
        double sum = bias[j];
        for (int64_t p = 0; p < k; ++p)
          sum += left[i * k + p] * weight[part.transposed ? j * k + p : p * part.n + j];
        expected[i * columns + column + j] = sum;
      }
    }
    column += part.n;
  }
  const std::string what =
      concat("linear of ", parts.size(), " parts, first ", parts[0].n, " columns, [n, k] ",
             parts[0].transposed, ", bias ", parts[0].has_bias, ", k ", k);
  expect_close(y, expected, columns, what);
  const PackedInputs packed = pack_inputs(linear, inputs);
  if (packed.packed == nullptr) return;
  ++packed_runs;
  expect_close(run_operation(linear, inputs, packed)[0], expected, columns, "packed ", what);
}

}  // namespace

// Up to 8 rows go through our loops, more through gemm.
TEST(linear_matches_plain_loops) {
  const std::vector<std::vector<Part>> layouts = {
      {{1, true, false}},
      {{1, false, true}},
      {{67, true, true}},
      {{67, false, true}},
      {{130, false, false}},
      {{64, true, false}},
      {{77, true, true}, {15, true, true}, {15, true, true}},
      {{33, true, true}, {96, false, false}, {5, false, true}},
  };
  Random random(21);
  for (const DType dtype : kFloats) {
    for (const int64_t rows : {0, 1, 2, 3, 4, 7, 8, 9, 17}) {
      for (const int64_t k : {1, 15, 17, 77, 96}) {
        for (const std::vector<Part>& parts : layouts) check_linear(random, dtype, rows, k, parts);
      }
    }
  }
}

// Wide enough to be cut into column groups for several threads, whose ends are no multiple of anything.
TEST(linear_is_cut_into_columns) {
  Random random(22);
  const ThreeThreads threads;
  for (const DType dtype : kFloats) {
    for (const int64_t rows : {1, 5, 8}) {
      check_linear(random, dtype, rows, 301, {{1201, true, true}});
      check_linear(random, dtype, rows, 301, {{1201, false, true}});
    }
  }
}

// Panels of 16 columns, tiles of 6 and of 32 rows, chunks of 192 rows: sizes at and beside each of them.
TEST(packed_linear_matches_plain_loops) {
  const std::vector<std::vector<Part>> layouts = {
      {{2, true, false}},
      {{16, true, true}},
      {{66, false, true}},
      {{130, false, false}},
      {{64, true, true}, {18, true, true}, {18, true, true}},
      {{34, true, false}, {95, false, true}, {7, true, false}},
  };
  Random random(23);
  packed_runs = 0;
  on_one_and_three_threads([&] {
    for (const int64_t rows : {0, 1, 2, 5, 6, 7, 8, 9, 13, 16, 17, 31, 32, 33, 47, 200}) {
      for (const int64_t k : {2, 30, 32, 34, 96}) {
        for (const std::vector<Part>& parts : layouts) check_linear(random, DType::kBFloat16, rows, k, parts);
      }
    }
    // Wide enough for several threads, and too many summands for one pass over the panels.
    for (const int64_t rows : {1, 9, 193})
      check_linear(random, DType::kBFloat16, rows, 64, {{1202, true, true}});
    for (const int64_t rows : {1, 9, 40})
      check_linear(random, DType::kBFloat16, rows, 5190, {{18, true, true}});
    // Some tens of rows, whose sums are taken in parts over several groups of columns at a time.
    for (const int64_t rows : {9, 32, 33, 64, 65})
      check_linear(random, DType::kBFloat16, rows, 902, {{338, true, true}});
    // So many summands that they are taken in passes over all columns, with blocks of no whole number of
    // tiles.
    for (const int64_t rows : {33, 64})
      check_linear(random, DType::kBFloat16, rows, 14464, {{130, true, true}});
    check_linear(random, DType::kBFloat16, 97, 8960, {{66, true, false}});
    // Columns enough for rows to be copied into tiles, whole and with a part of a tile of summands behind.
    for (const int64_t rows : {65, 96, 193})
      check_linear(random, DType::kBFloat16, rows, 94, {{3202, true, true}});
  });
  const bool has_panels = panel_kernels() != nullptr;
  expect(packed_runs == (has_panels ? 2 * (16 * 5 * 6 + 17) : 0), "packed runs: ", packed_runs);
}

// Gate and up as one weight and as two; halves that are whole panels, and others. Returns gated packed
// weights.
int64_t check_linear_swiglu(Random& random, DType dtype, int64_t rows, int64_t k, int64_t size, bool is_one,
                            bool has_bias) {
  const Tensor x = Tensor::random(random, dtype, {rows, k});
  std::vector<Tensor> weights;
  std::vector<LinearPart> layout;
  for (int64_t part = 0; part < (is_one ? 1 : 2); ++part) {
    const int64_t n = is_one ? 2 * size : size;
    weights.push_back(Tensor::random(random, dtype, {n, k}));
    if (has_bias) weights.push_back(Tensor::random(random, dtype, {n}));
    layout.push_back({true, has_bias});
  }
  std::vector<const Tensor*> inputs{&x};
  std::vector<double> rows_of_weights, bias;
  for (size_t at = 0; at < weights.size(); ++at) {
    inputs.push_back(&weights[at]);
    std::vector<double>& to = has_bias && at % 2 == 1 ? bias : rows_of_weights;
    for (const double value : weights[at].values()) to.push_back(value);
  }
  bias.resize(2 * size);
  const std::vector<double> left = x.values();
  const auto dot = [&](int64_t row, int64_t column) {
    double sum = bias[column];
    for (int64_t p = 0; p < k; ++p) sum += left[row * k + p] * rows_of_weights[column * k + p];
    return sum;
  };
  std::vector<double> expected;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < size; ++column) {
      const double gate = dot(row, column);
      expected.push_back(gate / (1.0 + std::exp(-gate)) * dot(row, size + column));
    }
  }
  const LinearSwiGlu op(layout);
  const std::string what = concat("linear and swiglu of ", layout.size(), " parts, size ", size, ", k ", k);
  expect_close(run_operation(op, inputs)[0], expected, size, what);
  const PackedInputs packed = pack_inputs(op, inputs);
  if (packed.packed == nullptr) return 0;
  expect_close(run_operation(op, inputs, packed)[0], expected, size, "packed ", what);
  return dynamic_cast<const PanelWeight&>(*packed.packed).is_gated ? 1 : 0;
}

TEST(linear_and_swiglu_match_plain_loops) {
  Random random(24);
  int64_t gated = 0;
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 200}) {
        for (const int64_t size : {1, 16, 34, 112}) {
          for (const bool is_one : {true, false}) {
            gated += check_linear_swiglu(random, dtype, rows, 34, size, is_one, false);
            gated += check_linear_swiglu(random, dtype, rows, 34, size, is_one, true);
          }
        }
      }
    }
    gated += check_linear_swiglu(random, DType::kBFloat16, 40, 5190, 16, false, false);
    gated += check_linear_swiglu(random, DType::kBFloat16, 70, 98, 1600, true, false);
  });
  expect(gated == (panel_kernels() == nullptr ? 0 : 2 * (12 * 2 * 2 + 2)), "gated weights: ", gated);
}

// Blocks of rows, and sums of several passes over all columns of a thread before the next pass.
TEST(packed_linear_is_cut_into_blocks_and_passes) {
  Random random(25);
  on_one_and_three_threads([&] {
    check_linear(random, DType::kBFloat16, 530, 928, {{70, true, true}});
    check_linear(random, DType::kBFloat16, 290, 3680, {{34, true, true}});
    check_linear(random, DType::kBFloat16, 100, 10300, {{34, true, true}});
  });
}

// Sums are float32 at least: a long sum of ones would stop at 256 in bfloat16, at 2048 in float16.
TEST(linear_sums_in_float32) {
  const int64_t k = 4096;
  for (const DType dtype : kFloats) {
    for (const bool transposed : {true, false}) {
      for (const int64_t rows : {1, 3, 9}) {
        const Tensor x = Tensor::of(dtype, {rows, k}, std::vector<double>(rows * k, 1.0));
        const Tensor w = Tensor::of(dtype, transposed ? Dims{1, k} : Dims{k, 1}, std::vector<double>(k, 1.0));
        const std::vector<LinearPart> parts = {{transposed, false}};
        for (const double sum : run_operation(Linear(parts), {&x, &w})[0].values()) {
          expect(sum == 4096.0, dtype, ": got ", sum);
        }
        const Tensor two =
            Tensor::of(dtype, transposed ? Dims{2, k} : Dims{k, 2}, std::vector<double>(2 * k, 1.0));
        const PackedInputs packed = pack_inputs(Linear(parts), {&x, &two});
        if (packed.packed == nullptr) continue;
        for (const double sum : run_operation(Linear(parts), {&x, &two}, packed)[0].values()) {
          expect(sum == 4096.0, dtype, ": packed, got ", sum);
        }
      }
    }
  }
}
