#pragma once

#include <bit>
#include <cstdint>

namespace modeltorch {

/// The upper half of a float32, rounded to nearest even.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;

  explicit BFloat16(float value) {
    const uint32_t word = std::bit_cast<uint32_t>(value);
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = is_nan ? uint16_t{0x7fc0} : static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }

  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

}  // namespace modeltorch
