#include "core/content_hash.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/parallel.h"

namespace modeltorch {
namespace {

__extension__ using Word = unsigned __int128;

constexpr Word word(uint64_t high, uint64_t low) {
  return static_cast<Word>(high) << 64 | low;
}

// Digits of the golden ratio and of square roots, made odd.
constexpr Word kFirst = word(0x9e3779b97f4a7c15u, 0xf39cc0605cedc835u);
constexpr Word kSecond = word(0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu);
constexpr Word kThird = word(0xa54ff53a5f1d36f1u, 0x510e527fade682d1u);

constexpr int kLanes = 4;
constexpr size_t kBlock = kLanes * sizeof(Word);
constexpr size_t kPart = size_t{1} << 20;

constexpr Word rotate(Word value, int bits) {
  return value << bits | value >> (128 - bits);
}

constexpr Word mix(Word state, Word input) {
  return rotate(state + input * kSecond, 57) * kFirst;
}

struct Lanes {
  Word state[kLanes];

  void take(const char* block) {
    for (int lane = 0; lane < kLanes; ++lane) {
      Word input;
      std::memcpy(&input, block + lane * sizeof(Word), sizeof(Word));
      state[lane] = mix(state[lane], input);
    }
  }
};

// Every bit of the result depends on every bit of the lanes.
Word finish(const Lanes& lanes, uint64_t bytes) {
  Word result = kThird + bytes;
  for (const Word lane : lanes.state) result = (result ^ mix(0, lane)) * kFirst + kThird;
  result ^= result >> 65;
  result *= kSecond;
  result ^= result >> 59;
  result *= kFirst;
  return result ^ result >> 64;
}

// Zeros fill the last block; the number of bytes tells them from bytes that are zero.
Digest hash_part(const char* data, size_t bytes, uint64_t seed) {
  Lanes lanes{{seed * kFirst + kSecond, seed + kThird, seed ^ kFirst, seed * kThird + kFirst}};
  size_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) lanes.take(data + at);
  if (at < bytes) {
    char last[kBlock] = {};
    std::memcpy(last, data + at, bytes - at);
    lanes.take(last);
  }
  const Word result = finish(lanes, bytes);
  return {static_cast<uint64_t>(result >> 64), static_cast<uint64_t>(result)};
}

}  // namespace

std::string Digest::hex() const {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (const uint64_t half : {high, low}) {
    for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[half >> shift & 15];
  }
  return text;
}

Digest content_hash(const void* data, size_t bytes) {
  const auto* from = static_cast<const char*>(data);
  std::vector<Digest> parts((bytes + kPart - 1) / kPart);
  parallel_for(static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const size_t at = static_cast<size_t>(part) * kPart;
      parts[part] = hash_part(from + at, std::min(kPart, bytes - at), static_cast<uint64_t>(part));
    }
  });
  return hash_part(reinterpret_cast<const char*>(parts.data()), parts.size() * sizeof(Digest), ~bytes);
}

}  // namespace modeltorch
