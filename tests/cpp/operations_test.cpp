// Every operation that works row by row, against float64 loops. linear_test.cpp and attention_test.cpp hold
// the rest.

#include <cmath>
#include <limits>

#include "ops/add.h"
#include "ops/add_rms_norm.h"
#include "ops/argmax_rows.h"
#include "ops/gather_rows.h"
#include "ops/linear.h"
#include "ops/reshape_and_cache.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/split_qkv.h"
#include "ops/swiglu.h"
#include "tensors.h"

using namespace modeltorch;
using namespace test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// {rows, size}: below, at and beside the vector widths; the last ones are cut into parts for threads.
constexpr int64_t kShapes[][2] = {{0, 15}, {1, 1},  {3, 2},   {2, 3},     {5, 4},
                                  {4, 7},  {2, 8},  {3, 15},  {2, 16},    {3, 17},
                                  {1, 77}, {3, 96}, {2, 255}, {1000, 96}, {333, 515}};

std::vector<double> rms_norm_of(const std::vector<double>& x, const std::vector<double>& gamma,
                                double epsilon) {
  std::vector<double> y(x.size());
  const size_t size = gamma.size();
  for (size_t row = 0; row < x.size(); row += size) {
    double squares = 0.0;
    for (size_t i = 0; i < size; ++i) squares += x[row + i] * x[row + i];
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(size) + epsilon);
    for (size_t i = 0; i < size; ++i) y[row + i] = x[row + i] * scale * gamma[i];
  }
  return y;
}

template <class Body>
void each_row_shape(Body&& body) {
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const auto& [rows, size] : kShapes) body(dtype, rows, size);
    }
  });
}

}  // namespace

TEST(add_is_correctly_rounded) {
  Random random(11);
  each_row_shape([&](DType dtype, int64_t rows, int64_t size) {
    const Tensor a = Tensor::random(random, dtype, {rows, size}, -3.0, 3.0);
    const Tensor b = Tensor::random(random, dtype, {rows, size}, -3.0, 3.0);
    const Tensor y = std::move(run_operation(Add(), {&a, &b})[0]);
    Tensor expected(dtype, {rows, size});
    for (int64_t i = 0; i < a.count(); ++i) {
      expected.set(i, static_cast<float>(a.get(i)) + static_cast<float>(b.get(i)));
    }
    expect(y.bits() == expected.bits(), "add ", y.view());
  });
}

TEST(add_keeps_infinities_and_nans) {
  for (const DType dtype : kFloats) {
    const std::vector<double> a = {kInfinity, -kInfinity, kNaN, 3e38, 1.0};
    const Tensor left = Tensor::of(dtype, {1, 5}, a);
    const Tensor right = Tensor::of(dtype, {1, 5}, {1.0, kInfinity, 1.0, 3e38, -1.0});
    const std::vector<double> sums = run_operation(Add(), {&left, &right})[0].values();
    expect(sums[0] == kInfinity && std::isnan(sums[1]) && std::isnan(sums[2]), "infinities and NaN in ",
           dtype);
    expect(sums[3] == kInfinity && sums[4] == 0.0, "overflow and zero in ", dtype);
    const Tensor nans(dtype, {3, 33});  // payloads of all ones, the ones that rounding carries over
    for (const double value : run_operation(Add(), {&nans, &nans})[0].values())
      expect(std::isnan(value), "NaN + NaN");
  }
}

TEST(rms_norm_matches_its_formula) {
  Random random(12);
  each_row_shape([&](DType dtype, int64_t rows, int64_t size) {
    const Tensor x = Tensor::random(random, dtype, {rows, size}, -2.0, 2.0);
    const Tensor gamma = Tensor::random(random, dtype, {size}, 0.5, 2.0);
    for (const float epsilon : {1e-6f, 0.5f}) {
      const Tensor y = std::move(run_operation(RmsNorm(epsilon), {&x, &gamma})[0]);
      expect_close(y, rms_norm_of(x.values(), gamma.values(), epsilon), size, "rms_norm");
    }
  });
}

TEST(rms_norm_of_odd_values) {
  for (const DType dtype : kFloats) {
    const int64_t size = 33;
    Tensor x = Tensor::of(dtype, {4, size}, std::vector<double>(4 * size, 0.0));
    for (int64_t i = 0; i < size; ++i) {
      x.set(size + i, i % 2 == 0 ? 1e4 : -1e4);
      x.set(2 * size + i, 1e-4);
    }
    x.set(3 * size + 32, kNaN);  // in the tail of the vector loop
    const Tensor gamma = Tensor::of(dtype, {size}, std::vector<double>(size, 1.0));
    const std::vector<double> y = run_operation(RmsNorm(1e-6f), {&x, &gamma})[0].values();
    for (int64_t i = 0; i < size; ++i) {
      expect(y[i] == 0.0, "zeros stay zeros");
      expect(std::abs(std::abs(y[size + i]) - 1.0) < 1e-2, "large values, got ", y[size + i]);
      expect(std::abs(y[2 * size + i] - 0.0995) < 1e-3, "epsilon holds small values down, got ",
             y[2 * size + i]);
      expect(std::isnan(y[3 * size + i]), "a NaN fills its row");
    }
  }
}

TEST(add_rms_norm_equals_its_two_nodes) {
  Random random(13);
  each_row_shape([&](DType dtype, int64_t rows, int64_t size) {
    const Tensor a = Tensor::random(random, dtype, {rows, size}, -2.0, 2.0);
    const Tensor b = Tensor::random(random, dtype, {rows, size}, -2.0, 2.0);
    const Tensor gamma = Tensor::random(random, dtype, {size}, 0.5, 2.0);
    const std::vector<Tensor> fused = run_operation(AddRmsNorm(1e-5f), {&a, &b, &gamma});
    const std::vector<Tensor> sum = run_operation(Add(), {&a, &b});
    const std::vector<Tensor> norm = run_operation(RmsNorm(1e-5f), {&sum[0], &gamma});
    expect(fused[0].bits() == sum[0].bits(), "sum ", sum[0].view());
    expect(fused[1].bits() == norm[0].bits(), "norm ", norm[0].view());
  });
}

TEST(swiglu_matches_its_formula) {
  Random random(14);
  each_row_shape([&](DType dtype, int64_t rows, int64_t size) {
    const Tensor x = Tensor::random(random, dtype, {rows, 2 * size}, -8.0, 8.0);
    std::vector<double> expected(rows * size);
    for (int64_t i = 0; i < rows * size; ++i) {
      const int64_t at = i / size * 2 * size + i % size;
      const double gate = x.get(at);
      expected[i] = gate / (1.0 + std::exp(-gate)) * x.get(at + size);
    }
    expect_close(run_operation(SwiGlu(), {&x})[0], expected, size, "swiglu");
  });
}

// Rounded to quarters, so that rows have several equal largest elements, of which the first counts; and with
// a NaN, which counts as the largest.
TEST(argmax_is_the_first_of_the_largest) {
  Random random(15);
  each_row_shape([&](DType dtype, int64_t rows, int64_t size) {
    Tensor x = Tensor::random(random, dtype, {rows, size}, -3.0, 3.0);
    for (int64_t i = 0; i < x.count(); ++i) x.set(i, std::round(4.0 * x.get(i)) / 4.0 - 4.0);
    if (rows > 1) x.set(size + size / 2, std::numeric_limits<double>::quiet_NaN());
    const std::vector<double> y = run_operation(ArgmaxRows(), {&x})[0].values();
    for (int64_t row = 0; row < rows; ++row) {
      int64_t best = 0;
      for (int64_t i = 1; i < size; ++i) {
        if (x.get(row * size + i) > x.get(row * size + best)) best = i;
      }
      if (row == 1) best = size / 2;
      expect(y[row] == static_cast<double>(best), "row ", row, ": ", y[row], ", not ", best);
    }
  });
}

// Every element by itself, over all gates for which exp(-gate) is a float32.
TEST(swiglu_is_exact_over_its_whole_range) {
  const int64_t size = 17601;
  for (const DType dtype : kFloats) {
    Tensor x(dtype, {1, 2 * size});
    for (int64_t i = 0; i < size; ++i) {
      x.set(i, static_cast<double>(i) / 100.0 - 88.0);
      x.set(size + i, 1.0);
    }
    const std::vector<double> y = run_operation(SwiGlu(), {&x})[0].values();
    for (int64_t i = 0; i < size; ++i) {
      const double expected = x.get(i) / (1.0 + std::exp(-x.get(i)));
      // float16 has nothing between 0 and 2^-24.
      const double limit = (dtype == DType::kFloat32 ? 1e-6 : 4e-3) * std::abs(expected);
      expect(std::abs(y[i] - expected) <= limit + (dtype == DType::kFloat16 ? 0x1p-24 : 0.0), "gate ",
             x.get(i), ": ", y[i]);
    }
  }
}

// Where exp(-gate) leaves float32 the result is gate * up, or next to nothing, and always a number.
TEST(swiglu_of_large_magnitudes) {
  const std::vector<double> gates = {0.0,    -0.0, 1e-30, 88.5, -88.5, 89.0, -89.0, 104.0,
                                     -104.0, 1e3,  -1e3,  1e4,  -1e4,  1e30, -1e30};
  const auto size = static_cast<int64_t>(gates.size());
  for (const DType dtype : kFloats) {
    for (const double up : {1.5, -0.25, 1e4}) {
      std::vector<double> row = gates;
      row.insert(row.end(), size, up);
      const Tensor x = Tensor::of(dtype, {1, 2 * size}, row);
      const std::vector<double> y = run_operation(SwiGlu(), {&x})[0].values();
      for (int64_t i = 0; i < size; ++i) {
        if (std::isinf(x.get(i))) continue;
        Tensor expected(dtype, {1});  // rounded: what float16 cannot hold is infinite
        expected.set(0, x.get(i) / (1.0 + std::exp(-x.get(i))) * x.get(size + i));
        const double limit = gates[i] < 0.0 ? 1e-3 : 1e-2 * std::abs(expected.get(0));
        expect(y[i] == expected.get(0) || std::abs(y[i] - expected.get(0)) <= limit, "gate ", gates[i],
               " up ", up, ": ", y[i], ", not ", expected.get(0));
      }
    }
    const Tensor nans(dtype, {2, 34});
    for (const double value : run_operation(SwiGlu(), {&nans})[0].values())
      expect(std::isnan(value), "NaN stays");
  }
}

TEST(rope_rotates_halves) {
  Random random(15);
  const auto check_heads = [](const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y) {
    const int64_t heads = x.dims()[1];
    const int64_t d = x.dims()[2];
    std::vector<double> expected(x.count());
    for (int64_t i = 0; i < x.count(); ++i) {
      const int64_t at = i % d;
      const int64_t table = i / (heads * d) * d + at;
      const double partner = at < d / 2 ? -x.get(i + d / 2) : x.get(i - d / 2);
      expected[i] = x.get(i) * cos.get(table) + partner * sin.get(table);
    }
    expect_close(y, expected, d, "rope");
  };
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const int64_t d : {2, 6, 34, 64, 80, 96, 128, 256}) {
        for (const auto& [tokens, heads, kv_heads] :
             {std::array<int64_t, 3>{0, 2, 1}, {1, 1, 1}, {3, 7, 1}, {50, 8, 4}}) {
          const Tensor q = Tensor::random(random, dtype, {tokens, heads, d});
          const Tensor k = Tensor::random(random, dtype, {tokens, kv_heads, d});
          // Unequal halves, unlike real tables: each half must be read from its own columns.
          const Tensor cos = Tensor::random(random, dtype, {tokens, d});
          const Tensor sin = Tensor::random(random, dtype, {tokens, d});
          const std::vector<Tensor> out = run_operation(Rope(), {&q, &k, &cos, &sin});
          check_heads(q, cos, sin, out[0]);
          check_heads(k, cos, sin, out[1]);
        }
      }
    }
  });
}

TEST(gather_rows_copies_bits) {
  Random random(16);
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const int64_t size : {1, 15, 17, 77, 96}) {
        for (const int64_t rows : {0, 1, 2, 9, 3000}) {
          const int64_t count = 40;
          const Tensor table = Tensor::random(random, dtype, {count, size});
          Tensor indices(DType::kInt64, {rows});
          for (int64_t i = 0; i < rows; ++i) indices.set(i, static_cast<double>((i * 23 + 39) % count));
          const Tensor y = std::move(run_operation(GatherRows(), {&table, &indices})[0]);
          expect(y.dims() == Dims{rows, size}, "shape ", y.view());
          for (int64_t i = 0; i < rows; ++i) {
            const auto row = static_cast<int64_t>(indices.get(i));
            expect(y.bits(i * size, size) == table.bits(row * size, size), "row ", i, " of ", y.view());
          }
        }
      }
    }
  });
}

// A word embedding that shares the packed form of a tied lm_head: the rows come back bit for bit.
TEST(gather_rows_unpacks_bits) {
  Random random(19);
  const Linear lm_head({{true, false}});
  const WeightPacker* packer = find_packer(Linear::kName, DeviceType::kCpu);
  const WeightPacker* sharer = find_packer(GatherRows::kName, DeviceType::kCpu);
  expect(packer->format(lm_head) == sharer->format(GatherRows()) && sharer->pack == nullptr,
         "one form for both");
  expect(packer->format(Linear({{false, false}})) != packer->format(lm_head), "[k, n] is another form");
  expect(packer->format(Linear({{true, true}})) != packer->format(lm_head), "a bias makes another form");
  on_one_and_three_threads([&] {
    for (const auto& [count, size] : {std::pair<int64_t, int64_t>{2, 2}, {40, 96}, {18, 34}}) {
      const Tensor table = Tensor::random(random, DType::kBFloat16, {count, size});
      const Tensor x = Tensor::random(random, DType::kBFloat16, {1, size});
      Tensor indices(DType::kInt64, {3000});
      for (int64_t i = 0; i < 3000; ++i) indices.set(i, static_cast<double>((i * 23 + 1) % count));
      const PackedInputs packed = pack_inputs(lm_head, {&x, &table});
      if (packed.packed == nullptr) continue;  // this level reads matrices as they are
      const Tensor y = std::move(run_operation(GatherRows(), {&table, &indices}, {packed.packed, {0}})[0]);
      for (int64_t i = 0; i < 3000; ++i) {
        const auto row = static_cast<int64_t>(indices.get(i));
        expect(y.bits(i * size, size) == table.bits(row * size, size), "row ", i, " of ", y.view());
      }
    }
  });
}

TEST(split_qkv_copies_bits) {
  Random random(17);
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const auto& [n, heads, kv, d] : {std::array<int64_t, 4>{0, 2, 1, 4},
                                            {1, 1, 1, 2},
                                            {3, 7, 1, 80},
                                            {5, 4, 4, 6},
                                            {200, 14, 2, 64}}) {
        const int64_t width = (heads + 2 * kv) * d;
        const Tensor qkv = Tensor::random(random, dtype, {n, width});
        const std::vector<Tensor> out = run_operation(SplitQkv(heads, kv, d), {&qkv});
        expect(out[0].dims() == Dims{n, heads, d} && out[1].dims() == Dims{n, kv, d} &&
                   out[2].dims() == out[1].dims(),
               "shapes of ", qkv.view());
        for (int64_t token = 0; token < n; ++token) {
          int64_t column = token * width;
          for (const Tensor& part : out) {
            const int64_t size = part.dims()[1] * d;
            expect(part.bits(token * size, size) == qkv.bits(column, size), "token ", token, " of ",
                   qkv.view());
            column += size;
          }
        }
      }
    }
  });
}

TEST(reshape_and_cache_writes_its_slots_only) {
  Random random(18);
  on_one_and_three_threads([&] {
    for (const DType dtype : kFloats) {
      for (const auto& [n, kv, d] : {std::array<int64_t, 3>{0, 1, 2}, {1, 1, 2}, {7, 2, 80}, {60, 4, 96}}) {
        const Tensor k = Tensor::random(random, dtype, {n, kv, d});
        const Tensor v = Tensor::random(random, dtype, {n, kv, d});
        const Tensor k_cache(dtype, {9, 8, kv, d});  // poisoned: a row that nobody writes keeps its bits
        const Tensor v_cache(dtype, {9, 8, kv, d});
        Tensor slots(DType::kInt32, {n});
        std::vector<int64_t> owner(9 * 8, -1);
        for (int64_t token = 0; token < n; ++token) {
          const int64_t slot = token % 3 == 1 ? -1 : (token * 29 + 71) % 72;
          slots.set(token, static_cast<double>(slot));
          if (slot >= 0) owner[slot] = token;
        }
        const Tensor poison(dtype, {1, kv, d});
        const std::vector<Tensor> none =
            run_operation(ReshapeAndCache(), {&k, &v, &k_cache, &v_cache, &slots});
        expect(none.empty(), "no outputs");
        const int64_t size = kv * d;
        for (int64_t slot = 0; slot < 72; ++slot) {
          const int64_t token = owner[slot];
          expect(k_cache.bits(slot * size, size) == (token < 0 ? poison.bits() : k.bits(token * size, size)),
                 "key of slot ", slot, " of ", n, " tokens");
          expect(v_cache.bits(slot * size, size) == (token < 0 ? poison.bits() : v.bits(token * size, size)),
                 "value of slot ", slot, " of ", n, " tokens");
        }
      }
    }
  });
}
