// bfloat16 and float16: what a conversion rounds to, alone and in the vector loops.

#include "core/half_floats.h"

#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "core/cpu_level.h"
#include "ops/add.h"
#include "tensors.h"

using namespace modeltorch;
using namespace test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Float16 float16_of(int bits) {
  Float16 value;
  value.bits = static_cast<uint16_t>(bits);
  return value;
}

}  // namespace

// run.sh asks for every level in turn: a run must not quietly test another one.
TEST(the_level_is_the_one_asked_for) {
  const char* asked = std::getenv("MODELTORCH_CPU_LEVEL");
  expect(asked == nullptr || *asked == '\0' || std::string(asked) == cpu_level_name(cpu_level()),
         "the level is ", cpu_level_name(cpu_level()));
}

TEST(bfloat16_rounds_to_nearest_even) {
  const std::pair<uint32_t, uint16_t> cases[] = {
      {0x3f800000u, 0x3f80}, {0x3f807fffu, 0x3f80}, {0x3f808000u, 0x3f80}, {0x3f808001u, 0x3f81},
      {0x3f818000u, 0x3f82}, {0x3f817fffu, 0x3f81}, {0xbf808001u, 0xbf81}, {0x7f7fffffu, 0x7f80},
      {0x7f800000u, 0x7f80}, {0xff800000u, 0xff80}, {0x80000000u, 0x8000}, {0x7f800001u, 0x7fc0},
      {0x7fffffffu, 0x7fc0}, {0xffffffffu, 0x7fc0}, {0x00008000u, 0x0000}, {0x00018000u, 0x0002},
  };
  for (const auto& [word, bits] : cases) {
    expect(BFloat16(std::bit_cast<float>(word)).bits == bits, "float32 bits ", word);
  }
}

// Against the definition: the nearest of the finite float16 numbers, the even one of two, infinity from 65520
// on.
TEST(float16_rounds_to_nearest_even) {
  const auto value_of = [](int bits) { return static_cast<double>(static_cast<float>(float16_of(bits))); };
  expect(value_of(0x3c00) == 1.0 && value_of(0x0001) == 0x1p-24 && value_of(0x0400) == 0x1p-14,
         "known numbers");
  expect(value_of(0x7bff) == 65504.0 && value_of(0x7c00) == kInfinity && value_of(0xbc01) == -1.0009765625,
         "more of them");
  for (int bits = 0; bits < 0x7c00; ++bits) {
    const double here = value_of(bits);
    const double next = bits == 0x7bff ? 65536.0 : value_of(bits + 1);
    expect(next > here, "float16 numbers grow with their bits");
    const auto middle = static_cast<float>((here + next) / 2);
    const int even = bits % 2 == 0 ? bits : bits + 1;
    expect(Float16(static_cast<float>(here)).bits == bits, "bits ", bits, " there and back");
    expect(Float16(middle).bits == even, "halfway above ", here);
    expect(Float16(std::nextafter(middle, 0.0f)).bits == bits, "just below halfway above ", here);
    expect(Float16(std::nextafter(middle, kInfinity)).bits == bits + 1, "just above halfway above ", here);
    expect(Float16(-middle).bits == (even | 0x8000), "halfway below ", -here);
  }
  expect(
      Float16(kInfinity).bits == 0x7c00 && Float16(-kInfinity).bits == 0xfc00 && Float16(1e9f).bits == 0x7c00,
      "inf");
  for (const int bits : {0x7c01, 0x7e00, 0x7fff, 0xfc01, 0xffff})
    expect(std::isnan(value_of(bits)), "NaN ", bits);
  for (const uint32_t word : {0x7f800001u, 0x7fffffffu, 0xff800001u}) {
    expect((Float16(std::bit_cast<float>(word)).bits & 0x7fff) > 0x7c00, "float32 NaN ", word, " stays one");
  }
}

// The vector loops must convert as the two structs do, in every lane: x + 0 for numbers of every size.
TEST(vector_loops_round_like_scalars) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const int64_t size = 65536;
    Tensor x(dtype, {1, size});
    const Tensor ones = Tensor::of(dtype, {1, size}, std::vector<double>(size, 1.0 / 3.0));
    for (int64_t i = 0; i < size; ++i) x.view().as<uint16_t>()[i] = static_cast<uint16_t>(i);
    const Tensor y = std::move(run_operation(Add(), {&x, &ones})[0]);
    Tensor expected(dtype, {1, 1});
    for (int64_t i = 0; i < size; ++i) {
      const double exact = static_cast<float>(x.get(i)) + static_cast<float>(ones.get(i));
      expected.set(0, exact);
      expect(std::isnan(exact) ? std::isnan(y.get(i)) : y.bits(i, 1) == expected.bits(), dtype, " bits ", i);
    }
  }
}
