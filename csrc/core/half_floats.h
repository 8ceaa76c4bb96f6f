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

/// IEEE binary16, rounded to nearest even.
struct Float16 {
  uint16_t bits;

  Float16() = default;

  // After F. Giesen, "Float->half variants" (public domain): round in the float's own bits.
  explicit Float16(float value) {
    const uint32_t word = std::bit_cast<uint32_t>(value);
    const uint32_t magnitude = word & 0x7fffffffu;
    uint32_t half = 0;
    if (magnitude >= 0x47800000u) {
      half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (magnitude < 0x38800000u) {
      half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    bits = static_cast<uint16_t>(half | ((word >> 16) & 0x8000u));
  }

  explicit operator float() const {
    const uint32_t shifted = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    uint32_t word = std::bit_cast<uint32_t>(std::bit_cast<float>(shifted) * 0x1p112f);
    if (shifted >= 0x0f800000u) word = shifted | 0x7f800000u;
    return std::bit_cast<float>(word | (static_cast<uint32_t>(bits & 0x8000u) << 16));
  }
};

}  // namespace modeltorch
